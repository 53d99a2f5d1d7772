"""Read the .bin files of torch without torch. A .bin file is a zip archive of a pickle and the bytes of tensors.

A pickle is a program, and could execute any function. The reader in this file makes only dictionaries of tensors. If a
pickle names a function or class that no tensor needs, the reader raises ValueError and does not execute it.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

from stickjax.storage.hugging_face.files import FLOATS, Lazy, in_file

# {name of a torch storage class: the type of its elements}. The class itself is not needed.
_STORAGES = {
    "FloatStorage": FLOATS["F32"], "HalfStorage": FLOATS["F16"], "BFloat16Storage": FLOATS["BF16"],
    "DoubleStorage": "F64", "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip


def open_bin(path: Path) -> dict[str, Lazy]:
    """Return {name: tensor} of a .bin file, which torch.save has written from a state_dict.

    Each tensor is read when it is used. Raise ValueError if the file is damaged, contains other values than tensors, or
    has another format.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            places = {info.filename: (info, _begin(file, info)) for info in archive.infolist()}
            roots = {name.removesuffix("data.pkl") for name in places if name.endswith("/data.pkl")}
            if len(roots) != 1:
                raise ValueError(f"the zip archive has {len(roots)} files data.pkl, but a file of torch.save has one")
            (root,) = roots
            if f"{root}byteorder" in places and archive.read(f"{root}byteorder") != b"little":
                raise ValueError("the bytes are in big-endian order, but must be in little-endian order")
            with archive.open(f"{root}data.pkl") as program:
                tensors = _Tensors(program, path, root, places).load()
        if not isinstance(tensors, dict):
            raise ValueError(f"the file contains a {type(tensors).__name__}, not a dictionary of tensors")
        for name, tensor in tensors.items():
            if not (isinstance(name, str) and isinstance(tensor, Lazy)):
                raise ValueError(f"entry {name!r:.80} is a {type(tensor).__name__}, not a tensor")
    # A damaged pickle may raise any exception.
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read: {reason}") from error
    return dict(tensors)


def _begin(file, info: zipfile.ZipInfo) -> int:
    """Return the position in a zip archive at which the bytes of one entry begin.

    `file` is the open archive, and `info` describes the entry. The bytes come after a header, and only the header
    itself says how long it is. Raise ValueError if the entry is compressed.
    """
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed; save the file with torch.save")
    file.seek(info.header_offset)
    header = file.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name + extra


class _Tensors(pickle._Unpickler):
    """An unpickler that raises ValueError if the pickle names a function or class that no tensor needs.

    In the result, every tensor is a `Lazy` array.

    The base class is Python's unpickler that is written in Python. The usual unpickler, which is written in C, would
    allocate as much memory as a damaged file asks for.

    Args:
      program: the open pickle.
      path: the path of the archive.
      root: the folder inside the archive that has all its entries, such as "archive/".
      places: {path of an entry in the archive: (its ZipInfo, position of its first byte in the archive)}.
    """

    def __init__(self, program, path: Path, root: str, places: dict):
        super().__init__(program)
        self._path, self._root, self._places = path, root, places

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        # Every call returns a new function, so that a pickle cannot change a function that other pickles use.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: self._tensor(*arguments)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, requires_grad, hooks: tensor
        if module == "torch" and name in _STORAGES:
            return name
        raise ValueError(
            f"the pickle asks for {module}.{name}, a function or class that no tensor needs; it was not executed"
        )

    def persistent_load(self, pid):
        """Return (element type, path in the archive, number of elements) of a storage: the bytes of some tensors.

        `pid` is the tuple that stands for the storage in the pickle: ("storage", name of its torch class, its entry in
        the archive, device, number of elements).
        """
        _, kind, entry, _, count = pid
        return _STORAGES[kind], f"{self._root}data/{entry}", count

    def _tensor(self, storage, offset, shape, stride, requires_grad=False, hooks=None, metadata=None) -> Lazy:
        dtype, entry, count = storage
        info, begin = self._places[entry]
        if any(type(n) is not int or n < 0 for n in (offset, count, *shape, *stride)):
            raise ValueError(
                f"a tensor of {entry} has a wrong shape {shape}, stride {stride}, offset {offset} or number of "
                f"elements {count}: these must be whole numbers of at least 0"
            )
        contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        if any(n > 1 and own != wanted for n, own, wanted in zip(shape, stride, contiguous, strict=True)):
            raise ValueError(
                f"a tensor of {entry} is not contiguous: it has stride {stride} for shape {shape}; save it again after "
                ".contiguous()"
            )
        size = dtype.itemsize if isinstance(dtype, np.dtype) else 1  # tensors of other types are never read
        if (offset + math.prod(shape)) > count or count * size > info.file_size:
            raise ValueError(f"a tensor of shape {shape} does not fit into {entry} of {info.file_size} bytes")
        return in_file(self._path, dtype, tuple(shape), begin + offset * size)
