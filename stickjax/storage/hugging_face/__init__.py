"""Read and write Hugging Face folders. Such a folder has a config.json and files with the parameters of a model.

The parameters are tensors with the names that the package transformers uses. The module `configs` has the supported
model types.
"""

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stickjax.config import Config
from stickjax.config.decoder import ModelConfig
from stickjax.data.special_tokens import TOKEN_IDS, read_object, write_files
from stickjax.data.tokenizer import Tokenizer
from stickjax.storage.hugging_face import configs, names
from stickjax.storage.hugging_face.files import FLOATS, Lazy, write_sharded
from stickjax.storage.hugging_face.folder import open_folder
from stickjax.storage.hugging_face.folding import scaled
from stickjax.storage.hugging_face.tables import PER_EXPERT, TABLES
from stickjax.system.disk import write_file

# The code in PyTorch that is copied into a folder of the type `stickjax`. stickjax itself runs no code of a folder.
_REMOTE_CODE = Path(__file__).parent / "remote_code"
# The names of the buffers (arrays that are not parameters) in files of the original ModuleFormer code.
_BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(mask|cum_weight)")


def is_folder(path: Path) -> bool:
    """Return whether the folder `path` is a Hugging Face folder: its config.json has the entry `model_type`."""
    try:
        return "model_type" in read_object((path / "config.json").read_bytes(), path)
    except (OSError, ValueError):
        return False


def read_config(path: Path) -> Config:
    """Make a stickjax Config for the model in a Hugging Face folder.

    The section `model` is made from config.json. `model.param_dtype` is the dtype of the tensors, or float32 if they
    have several dtypes. `model.dtype` is the same dtype, but float32 instead of float16. `data.T` is the longest
    sequence length, if config.json has it. `data.tokenizer` is the path of tokenizer.json in the folder, even if this
    file does not exist. All other fields have their default values.

    Raise ValueError if the model is not supported or the folder is damaged, or if it has F16 and BF16 tensors.
    """
    try:
        tree = read_object((path / "config.json").read_bytes(), "the file")
        model, T = configs.to_model_config(tree)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from error
    names_of = {tensor.dtype: name for name, tensor in _tensors(path, model, configs.type_of(tree)).items()}
    found = names_of.keys() & set(FLOATS.values())
    if found >= {FLOATS["F16"], FLOATS["BF16"]}:
        half, brain = names_of[FLOATS["F16"]], names_of[FLOATS["BF16"]]
        raise ValueError(
            f"{path} mixes the types F16 ({half}) and BF16 ({brain}), so its files may belong to different models; "
            "convert all tensors to one type"
        )
    dtype = found.pop().name if len(found) == 1 else "float32"
    computed = "float32" if dtype == "float16" else dtype  # a CPU has no matrix product of float16
    changes = {"model.dtype": computed, "model.param_dtype": dtype, "data.tokenizer": str(path / "tokenizer.json")}
    return Config(model).replace(changes | ({} if T is None else {"data.T": T}))


def read(path: Path, model: ModelConfig) -> dict[str, Lazy]:
    """Return {name in stickjax: parameter} of a Hugging Face folder. Each parameter is read when it is used.

    `path` is the folder, and `model` is the config of its model, as `read_config` returns it. Raise ValueError if the
    folder lacks tensors or has unknown ones, or if a tensor has a wrong shape or a dtype other than F32, F16 and BF16.
    The message names the tensors.
    """
    kind = configs.type_of(read_object((path / "config.json").read_bytes(), "the file"))
    tensors = _tensors(path, model, kind)
    if model.L > len(tensors):  # checked first, because L may be huge and the names of all layers are made next
        raise ValueError(
            f"{path}: config.json says {model.L} layers, but the files have only {len(tensors)} tensors, "
            "fewer than one per layer"
        )
    if kind in PER_EXPERT and model.experts.E > len(tensors):  # for the same reason
        raise ValueError(
            f"{path}: config.json says {model.experts.E} experts, but the files have only {len(tensors)} tensors, "
            "fewer than one per expert"
        )
    table = names.table(kind, model)
    expected = names.tensor_shapes(table, model)
    check(tensors, expected, str(path))
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS.values():
            raise ValueError(f"{path}: {name} is of type {tensor.dtype}, not one of {', '.join(FLOATS)}")
    return names.leaves_from_tensors(table, model, tensors)


def write(
    path: Path, config: Config, leaves: dict[str, Lazy], shard_bytes: int, tokenizer: Tokenizer | None,
    files: Mapping[str, bytes], kind: str | None = None,
) -> None:  # fmt: skip
    """Write a model as a Hugging Face folder. `read` returns the same parameters from the folder, bit for bit.

    There is one exception: if the model has muP multipliers, and the model_type is "stickbreaking_attn", the written
    parameters contain the multipliers (see `folding`).

    Args:
      path: the folder; it is created if it does not exist.
      config: the config of the model. Its `data.T` is written as the longest sequence length.
      leaves: the parameters, as {name in stickjax: parameter}.
      shard_bytes: the largest number of bytes of tensors in a file. A file with a single tensor may be larger.
      tokenizer: the tokenizer of the model; None if it has no tokenizer.
      files: {name: content} of files that are written into the folder: `tokenizer.files`, or, without a tokenizer, only
        the files that name special tokens. The file TOKEN_IDS is not written; its entries go into config.json.
      kind: the model_type; None: the only model_type that can hold the model.
    """
    kind = configs.model_type_for(config.model, kind)
    c, factors = configs.stored(config.model, kind)
    tree = configs.to_config_json(c, config.data.T, kind)
    table = names.table(kind, c)
    tree |= read_object(files.get(TOKEN_IDS, b"{}"), TOKEN_IDS)
    if tokenizer is not None and tokenizer.eot < c.vocabulary and tree.get("eos_token_id") is None:
        tree["eos_token_id"] = tokenizer.eot  # otherwise transformers uses a default id of the model type
    if tokenizer is not None and tokenizer.bos is not None and tree.get("bos_token_id") is None:
        tree["bos_token_id"] = tokenizer.bos
    path.mkdir(parents=True, exist_ok=True)
    write_files({name: content for name, content in files.items() if name != TOKEN_IDS}, path)
    for code in _REMOTE_CODE.glob("*.py") if "auto_map" in tree else ():
        write_file(path / code.name, code.read_text())
    write_file(path / "config.json", json.dumps(tree, indent=2) + "\n")
    write_sharded(path, names.tensors_from_leaves(table, c, scaled(leaves, factors)), shard_bytes)


def check(found: dict[str, Lazy], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Check that a folder has exactly the expected tensors, with the expected shapes. Raise ValueError if it does not.

    `found` is {name: tensor} of the folder, and `expected` is {name: shape}. The message begins with `where`, such as
    the path of the folder.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    problems = [f"{word} {_listed(x)}" for word, x in (("lacks", missing), ("has unknown tensors:", extra)) if x]
    if problems:
        similar = difflib.get_close_matches(extra[0], missing, n=1, cutoff=0.5) if extra else []
        hint = f" ({extra[0]} is similar to the missing {similar[0]})" if similar else ""
        raise ValueError(f"{where} {' and '.join(problems)}{hint}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(f"{where}: {name} has shape {list(found[name].shape)}, but the config says {list(shape)}")


def _listed(words: list[str], most: int = 8) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _tensors(path: Path, model: ModelConfig, kind: str) -> dict[str, Lazy]:
    """Return {published name: tensor} of a Hugging Face folder, without buffers (arrays that are not parameters).

    `kind` is the type of the model, as `configs.type_of` returns it.

    A published name is the name that the authors of the model use; `names.published` returns it. If `model.tied` is
    true, the output matrix is the embedding, and the tensor "lm_head.weight" is only a copy of it. This copy is left
    out. Raise ValueError if it differs from the embedding.
    """
    tensors = {names.published(name): t for name, t in open_folder(path).items() if not _BUFFERS.fullmatch(name)}
    if model.tied and "lm_head.weight" in tensors:
        # A tied model may store its embedding a second time, as the output matrix. If the two differ, it is not tied.
        embedding = next(row.theirs for row in TABLES[kind](model) if row.ours == "embed")
        head, embed = tensors.pop("lm_head.weight"), tensors.get(embedding)
        if embed is not None and not np.array_equal(head.read(None), embed.read(None)):
            raise ValueError(
                f"{path}: lm_head.weight differs from the embedding, so tie_word_embeddings in config.json must "
                "be false"
            )
    return tensors
