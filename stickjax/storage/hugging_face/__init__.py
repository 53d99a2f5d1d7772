"""Read and write folders in the Hugging Face layout (config.json and weights), for the model types in `configs`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stickjax.config import Config
from stickjax.config.decoder import ModelConfig
from stickjax.config.fields import nearest
from stickjax.data.special_tokens import TOKEN_IDS, read_object, write_files
from stickjax.data.tokenizer import Tokenizer
from stickjax.storage.hugging_face import configs, names
from stickjax.storage.hugging_face.files import FLOATS, Lazy, write_sharded
from stickjax.storage.hugging_face.folder import open_folder
from stickjax.system.disk import write_file

# Buffers, not parameters, in the files of the original ModuleFormer.
_BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(mask|cum_weight)")


def is_folder(path: Path) -> bool:
    """Whether the config.json of a folder names a model_type."""
    try:
        return "model_type" in read_object((path / "config.json").read_bytes(), path)
    except (OSError, ValueError):
        return False


def read_config(path: Path) -> Config:
    """Read the config of a folder: the model, the path of tokenizer.json (even if there is none), the sequence length.

    The parameters keep their type in the files. If the files have several types, the parameters become float32.
    """
    try:
        model, T = configs.to_model_config(read_object((path / "config.json").read_bytes(), "it"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from error
    found = {tensor.dtype for tensor in _tensors(path, model).values()} & set(FLOATS.values())
    dtype = found.pop().name if len(found) == 1 else "float32"
    computed = "float32" if dtype == "float16" else dtype  # a CPU has no matrix product of float16
    changes = {"model.dtype": computed, "model.param_dtype": dtype, "data.tokenizer": str(path / "tokenizer.json")}
    return Config(model).replace(changes | ({} if T is None else {"data.T": T}))


def read(path: Path, model: ModelConfig) -> dict[str, Lazy]:
    """Return the leaves of the model in a folder, by name.

    Raise ValueError, naming the tensors, if some are missing, unknown, of another shape or not floating-point numbers.
    """
    table = names.table(read_object((path / "config.json").read_bytes(), "it")["model_type"], model)
    tensors = _tensors(path, model)
    if model.L > len(tensors):  # checked first, because L may be huge and the names of all layers are made next
        raise ValueError(f"{path}: the config says L={model.L} layers, but there are only {len(tensors)} tensors")
    expected = names.tensor_shapes(table, model)
    check(tensors, expected, str(path))
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS.values():
            raise ValueError(f"{path}: {name} is of type {tensor.dtype}, not one of {', '.join(FLOATS)}")
    return names.leaves_from_tensors(table, model, tensors)


def write(
    path: Path, config: Config, leaves: dict[str, Lazy], shard_bytes: int, tokenizer: Tokenizer | None,
    files: Mapping[str, bytes],
) -> None:  # fmt: skip
    """Write the folder of a model. `read` returns the same parameters from it, bit for bit.

    `files`: the files of the tokenizer; for a model without a tokenizer, the files in its folder about special tokens.
    """
    c = config.model
    tree = configs.to_config_json(c, config.data.T)
    table = names.table(tree["model_type"], c)
    tree |= read_object(files.get(TOKEN_IDS, b"{}"), TOKEN_IDS)
    if tokenizer is not None and tokenizer.eot < c.vocabulary and tree.get("eos_token_id") is None:
        tree["eos_token_id"] = tokenizer.eot  # otherwise transformers uses a default id of the model type
    path.mkdir(parents=True, exist_ok=True)
    write_files({name: content for name, content in files.items() if name != TOKEN_IDS}, path)
    write_file(path / "config.json", json.dumps(tree, indent=2) + "\n")
    write_sharded(path, names.tensors_from_leaves(table, c, leaves), shard_bytes)


def check(found: dict[str, Lazy], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Raise ValueError unless the names and shapes are exactly the expected ones."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    problems = [f"{word} {_listed(x)}" for word, x in (("lacks", missing), ("has unknown tensors:", extra)) if x]
    if problems:
        hint = nearest(extra[0], missing) if extra else ""
        raise ValueError(f"{where} {' and '.join(problems)}{hint}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(f"{where}: {name} has shape {list(found[name].shape)}, the config says {list(shape)}")


def _listed(words: list[str], most: int = 8) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _tensors(path: Path, model: ModelConfig) -> dict[str, Lazy]:
    """Return the tensors of a folder by their published names, without duplicates and without buffers."""
    tensors = {names.published(name): t for name, t in open_folder(path).items() if not _BUFFERS.fullmatch(name)}
    if model.tied and "lm_head.weight" in tensors:
        # A tied model may store its embedding a second time, as the output matrix. If they differ, it is not tied.
        head, embed = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if embed is not None and not np.array_equal(head.read(None), embed.read(None)):
            raise ValueError(f"{path}: lm_head.weight differs from the embedding, but tie_word_embeddings is true")
    return tensors
