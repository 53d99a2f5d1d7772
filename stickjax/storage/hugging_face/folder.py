"""Open the tensors of a Hugging Face folder: one or several safetensors files, or .bin files of PyTorch."""

import json
import os
from pathlib import Path

from stickjax.storage.hugging_face.files import Lazy, open_safetensors
from stickjax.storage.hugging_face.pickles import open_bin


def open_folder(folder: str | os.PathLike) -> dict[str, Lazy]:
    """Return {name: tensor} of a Hugging Face folder. Each tensor is read from its file when it is used.

    The tensors are in safetensors files or in .bin files of PyTorch: one file, or several files (shards) that an index
    lists. If a folder has both formats, the safetensors files are read. If there are shards and a single file
    of the same format, the shards are read.

    Raise ValueError if there are no tensors, if a shard is missing or damaged, or if the index and the shards name
    different tensors.
    """
    folder = Path(folder)
    for single, open_file in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_bin)):
        if (index := folder / f"{single}.index.json").exists():
            return _open_shards(index, open_file)
        if (folder / single).exists():
            return open_file(folder / single)
    raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin, nor an index of shards")


def _open_shards(index: Path, open_file) -> dict[str, Lazy]:
    try:
        weight_map = json.loads(index.read_text("utf-8-sig"))["weight_map"]
        files = sorted(set(weight_map.values()))
        if not all(file == Path(file).name for file in files):
            raise ValueError("a shard is outside of the folder of the index")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of shards: {type(error).__name__}: {error}") from error
    if missing := [file for file in files if not (index.parent / file).exists()]:
        raise ValueError(f"{index} names shards that do not exist: {', '.join(missing)}")
    tensors: dict[str, Lazy] = {}
    for file in files:
        found = open_file(index.parent / file)
        expected = {name for name, shard in weight_map.items() if shard == file}
        if wrong := sorted(found.keys() ^ expected):
            where = "lacks" if wrong[0] in expected else "also has"
            raise ValueError(f"{index} and {file} disagree: {file} {where} the tensor {wrong[0]}")
        tensors |= found
    return tensors
