"""Convert models to and from the Hugging Face layout. The conversion does not need torch.

python -m stickjax.convert FOLDER OUT [--step N] [--shard-bytes N] [--eot TOKEN] [--type TYPE] [--remote-code] [--push]

If FOLDER is in the Hugging Face layout, OUT becomes a folder that `evaluate`, `generate` and `train --init-from` can
read. If FOLDER is a run folder, OUT becomes a folder in the Hugging Face layout. FOLDER may also be a model on the
Hugging Face hub, such as org/name. With --push, OUT is a model on the hub.

A training checkpoint is read into memory completely. Other models are copied one tensor at a time, so they may be
larger than the memory.
"""

import math
import os
import sys
from pathlib import Path

import numpy as np

from stickjax.config import Config
from stickjax.config.command import Parser, command, step_or_best
from stickjax.data.special_tokens import read_files, write_files
from stickjax.models.transformer import Transformer
from stickjax.storage import hugging_face
from stickjax.storage.hub import local_folder, new_folder
from stickjax.storage.hugging_face.configs import OWN
from stickjax.storage.hugging_face.files import finite, write_safetensors
from stickjax.storage.run_config import MODEL_FILE, read_config, write_config
from stickjax.storage.run_folder import Loaded, in_memory, load, model_leaves, tokenizer_of

SHARD_BYTES = 5_000_000_000


def export(
    model: Loaded | Transformer, path: str, *, type: str | None = None, shard_bytes: int = SHARD_BYTES,
    push: bool = False,
) -> None:  # fmt: skip
    """Write a decoder as a Hugging Face folder: config.json, model.safetensors, and tokenizer.json if there is one.

    `stickjax.load(path)` returns the same parameters, bit for bit. The only exception is a model with muP multipliers
    that is written as type="stickbreaking_attn". This type has no muP multipliers, so `export` multiplies them into the
    written parameters. The logits stay the same, up to rounding. The page docs/guides/hugging_face.md lists the model
    types, and which models they can hold.

    Args:
      model: the result of `stickjax.load`, or only the module with the parameters. A module has no tokenizer, so no
        tokenizer.json is written for it.
      path: a folder that does not exist yet; it appears only when it is complete.
      type: the model type in config.json, such as "llama". None: the type is chosen, if exactly one type other than
        "stickjax" can hold the model. The type "stickjax" can hold every decoder with attention "stick_breaking" or
        "softmax" and without added or pruned experts. With this type, the folder also has PyTorch code.
      shard_bytes: the largest size of a file with parameters, in bytes. A larger model is divided into several files,
        and an index file lists them.
      push: True to write the model to the Hugging Face hub instead. `path` is then its name, such as "org/name".

    Raises:
      ValueError: the folder exists; the model type cannot express the model (the message names the config fields);
        `type` is None, and the number of types other than "stickjax" that can express the model is not 1 (the message
        names them); a parameter is not finite; or the upload fails (see `stickjax.storage.hub.new_folder`).

    >>> import jax, tempfile
    >>> from stickjax import ModelConfig, load
    >>> from stickjax.models.transformer import init
    >>> config = ModelConfig(V=16, D=8, L=2, N=2, K=1, H=4, F=16, attention="softmax")
    >>> folder = tempfile.mkdtemp() + "/model"
    >>> export(init(config, jax.random.key(0)), folder, type="llama")
    >>> load(folder).model.embed.shape
    (16, 8)
    """
    config = model.config if isinstance(model, Loaded) else Config(model.config)
    params = model.model if isinstance(model, Loaded) else model
    tokenizer = model.tokenizer if isinstance(model, Loaded) else None
    with new_folder(path, push) as folder:
        files = tokenizer.files if tokenizer else {}
        hugging_face.write(folder, config, finite(in_memory(params), "the model"), shard_bytes, tokenizer, files, type)


def convert(
    source: str, path: str, *, step: int | str | None = None, shard_bytes: int = SHARD_BYTES, eot: str | None = None,
    type: str | None = None, push: bool = False,
) -> str:  # fmt: skip
    """Convert a Hugging Face folder into a run folder, or a run folder into a Hugging Face folder.

    If `source` has training checkpoints, one checkpoint is read into memory completely, because Orbax cannot read a
    part of an array. Other models are copied one tensor at a time, so only the largest tensor has to fit into memory.

    Args:
      source: the folder to read, or the name of a model on the Hugging Face hub, such as "org/name".
      path: the folder to write, which must not exist yet.
      step: the step of the checkpoint, if `source` is a run folder, or "best"; None: the newest checkpoint.
      shard_bytes: the largest size of a file with parameters in a Hugging Face folder, in bytes.
      eot: the added token of the tokenizer that ends a text, such as "<|im_end|>"; it becomes the config field
        `data.eot`. None: `data.eot` is not changed. If `data.eot` is None too, the token is read from the files beside
        the tokenizer.json.
      type: the model type of a Hugging Face folder that is written, such as "llama". None: the type is chosen,
        if exactly one type other than "stickjax" can hold the model.
      push: True to write the Hugging Face folder to the hub. `path` is then the name of the model, such as "org/name".

    Returns:
      A line for the terminal that says what was written and how many parameters the model has.

    Raises:
      ValueError: the model cannot be read or written, for the reasons that `stickjax.load` and `export` list. Then
        nothing is written.
    """
    source = os.fspath(local_folder(source))
    to_run = hugging_face.is_folder(Path(source))
    if to_run and push:
        raise ValueError(f"--push needs a run folder, but {source} is a Hugging Face folder")
    if to_run and type is not None:
        raise ValueError(f"--type={type} needs a run folder, but {source} is a Hugging Face folder")
    config = read_config(source)
    config = config if eot is None else config.replace({"data.eot": eot})
    leaves = None if step is not None else model_leaves(source, config.model)
    if leaves is None:
        loaded = load(source, step=step)
        leaves = in_memory(loaded.model)
    leaves, tokenizer, note = finite(leaves, source), tokenizer_of(config), ""
    files = tokenizer.files if tokenizer else read_files(Path(config.data.tokenizer).parent)
    with new_folder(path, push) as folder:
        if to_run:
            if tokenizer is None:
                note = ", without a tokenizer.json; to use text, copy one into this folder, or set "
                note += "data.tokenizer=byte if it is a model of bytes"
            write_files(files, folder)
            write_config(folder, config.replace({"data.tokenizer": str(Path(path).absolute() / "tokenizer.json")}))
            write_safetensors(folder / MODEL_FILE, leaves)
        else:
            hugging_face.write(folder, config, leaves, shard_bytes, tokenizer, files, type)
    count = sum(int(np.prod(leaf.shape)) for leaf in leaves.values())
    return f"{path}: {'a run folder' if to_run else 'the Hugging Face layout'}, {count:,} parameters{note}"


@command
def main(argv: list[str] | None = None) -> int:
    """Run `python -m stickjax.convert` with the arguments `argv`; None: `sys.argv[1:]`. Return the exit code."""
    parser = Parser(
        prog="python -m stickjax.convert", description="Convert a model to or from the Hugging Face layout."
    )
    parser.add_argument("folder", help="a run folder, a folder in the Hugging Face layout, or a model on the hub")
    parser.add_argument("out", help="the folder to write, in the other layout; it must not exist")
    parser.add_argument("--step", type=step_or_best, help="step of a run's checkpoint, or best (default: the newest)")
    parser.add_argument(
        "--shard-bytes", type=float, default=SHARD_BYTES, help="largest file size in bytes (default 5e9)"
    )
    parser.add_argument(
        "--eot", metavar="TOKEN", help="added token that ends a text (default: the token that FOLDER names)"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--type", help="model_type of the folder to write, such as llama (default: the only one that fits the model)"
    )
    kind.add_argument(
        "--remote-code", dest="type", action="store_const", const=OWN,
        help=f"write the type {OWN}: nearly any decoder, with a file of PyTorch code that transformers runs",
    )  # fmt: skip
    parser.add_argument("--push", action="store_true", help="OUT is a model on the Hugging Face hub, such as org/name")
    words = parser.parse_args(argv)
    if not 1 <= words.shard_bytes < math.inf:
        raise ValueError(f"--shard-bytes={words.shard_bytes} must be a number of bytes, at least 1")
    options = dict(step=words.step, shard_bytes=int(words.shard_bytes), eot=words.eot, type=words.type)
    options["push"] = words.push
    print(convert(words.folder, words.out, **options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
