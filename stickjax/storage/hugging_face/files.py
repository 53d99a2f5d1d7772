"""Read and write safetensors files, one tensor at a time, so that a model may be larger than the memory.

The files are not mapped into memory (mmap): mapped pages would count as memory of this process until the operating
system frees them.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from stickjax.system.disk import write_file, writing

# {name of a type in a safetensors file: the type}, for all types that a parameter may have.
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}


@dataclass(frozen=True)
class Lazy:
    """An array that is read only when it is used, for example from a file.

    `read`: read(None) returns the whole array, and read(i) returns array[i], such as the values of layer i.
    `shape`: the shape of the array.
    `dtype`: its NumPy dtype; or a text, such as "I64", for a dtype that no parameter may have.
    `stacked`: whether the first axis is the axis L of layers. A stacked array may be larger than the memory, so it is
      copied layer by layer.
    """

    shape: tuple[int, ...]
    dtype: np.dtype | str
    read: Callable[[int | None], np.ndarray]
    stacked: bool = False

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield the array in pieces that fit into memory: every layer of a stacked array, otherwise the whole array."""
        yield from (self.read(i) for i in range(self.shape[0])) if self.stacked else [self.read(None)]


def finite(leaves: dict[str, Lazy], where: str | os.PathLike) -> dict[str, Lazy]:
    """Return copies of Lazy arrays that check their values: reading a NaN or an infinity raises ValueError.

    `leaves` is {name: array}. The message begins with `where`, such as the path of the file, and names the array.
    """

    def checked(name: str, leaf: Lazy) -> Lazy:
        def read(i: int | None) -> np.ndarray:
            piece = leaf.read(i)
            if wrong := piece.size - np.count_nonzero(np.isfinite(piece)):
                layer = "" if i is None else f", layer {i},"
                raise ValueError(f"{where}: {wrong} of {piece.size} values of {name}{layer} are not finite")
            return piece

        return dataclasses.replace(leaf, read=read)

    return {name: checked(name, leaf) for name, leaf in leaves.items()}


def in_file(path: Path, dtype: np.dtype | str, shape: tuple[int, ...], offset: int, stacked: bool = False) -> Lazy:
    """Return a Lazy array that reads its values from the file `path`.

    `offset` is the number of bytes in the file before the array. `dtype`, `shape` and `stacked` are as in `Lazy`.
    """

    def read(row: int | None) -> np.ndarray:
        own = shape if row is None else shape[1:]
        count = math.prod(own)
        array = np.fromfile(path, dtype, count, offset=offset + (row or 0) * count * dtype.itemsize)
        if array.size != count:
            raise ValueError(f"{path} became shorter while it was read")
        return array.reshape(own)

    return Lazy(shape, dtype, read, stacked)


def open_safetensors(path: Path) -> dict[str, Lazy]:
    """Return {name: tensor} of a safetensors file. Each tensor is read when it is used.

    If the name of a tensor begins with "blocks/", its first axis is the axis L of layers, and it is a stacked `Lazy`
    array. Raise ValueError if the file cannot be read, is truncated, or has a damaged header: wrong JSON, a name that
    occurs twice, or tensors that overlap or are outside of the file.
    """
    try:
        with safe_open(path, framework="np"):  # this checks the whole header against the size of the file
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size), object_pairs_hook=partial(_without_duplicates, path))
    return {
        name: in_file(
            path, FLOATS.get(x["dtype"], x["dtype"]), tuple(x["shape"]), 8 + size + x["data_offsets"][0],
            stacked=name.startswith("blocks/"),
        )
        for name, x in header.items()
        if name != "__metadata__"
    }  # fmt: skip


def _without_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in pairs:
        if name in tree:
            raise ValueError(f"{path} cannot be read: the name {name!r} occurs twice in its header")
        tree[name] = value
    return tree


def write_safetensors(path: Path, arrays: dict[str, Lazy]) -> None:
    """Write `arrays` {name: array} as a safetensors file. Only one array is in memory at a time.

    If an array is stacked, only one layer of it is in memory at a time. The package `safetensors` is not used to write
    files, because it needs all arrays in memory. Raise OSError if the file cannot be written.
    """
    names, end = {dtype: name for name, dtype in FLOATS.items()}, 0
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without this entry
    for name, array in arrays.items():
        begin, end = end, end + math.prod(array.shape) * array.dtype.itemsize
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with writing(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            for piece in array.pieces():
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))


def write_sharded(folder: Path, arrays: dict[str, Lazy], shard_bytes: int) -> None:
    """Write the tensors `arrays` {name: tensor} into a folder, as one safetensors file or as several files (shards).

    A file has at most `shard_bytes` bytes of tensors, or a single larger tensor. If one file is enough, its name is
    model.safetensors. Otherwise there is also an index: a JSON file that says in which shard each tensor is.
    """
    shards, sizes = [{}], [0]
    for name, array in arrays.items():
        size = math.prod(array.shape) * array.dtype.itemsize
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = array
        sizes[-1] += size
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", arrays)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    write_file(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
