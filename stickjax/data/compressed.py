"""Read files that are compressed by gzip (.gz) or zstd (.zst)."""

import gzip
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from stickjax.system.text import printable

ENDINGS = (".gz", ".zst")
_CHUNK = 2**17  # bytes that are read from a file at a time


def content_suffix(file: Path) -> str:
    """Return the ending of a file's name in lower case. The ending of a compression, such as ".gz", is removed first.

    >>> content_suffix(Path("a.JSONL.gz")), content_suffix(Path("a.jsonl")), content_suffix(Path("a.gz"))
    ('.jsonl', '.jsonl', '')
    """
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in ENDINGS else suffix


def open_compressed(file: Path) -> BinaryIO:
    """Open a .gz or .zst file, and return a stream of its decompressed bytes. Only a small part is in memory.

    A file may consist of several parts that were compressed one by one. Their contents follow one another.

    Raises ValueError if the file is a .zst, and neither the module `compression.zstd` of Python 3.14 nor the package
    `zstandard` is there. Raises OSError if the file cannot be opened. If the file is damaged or cut off, reading the
    stream raises ValueError.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "a.txt.gz")
    ...     _ = file.write_bytes(gzip.compress(b"one") + gzip.compress(b"two"))
    ...     with open_compressed(file) as stream:
    ...         stream.read()
    b'onetwo'
    """
    if file.suffix.lower() == ".gz":
        return io.BufferedReader(_Checked(gzip.open(file), file, "gzip", (OSError, EOFError, zlib.error)), _CHUNK)
    return io.BufferedReader(_opened_zstd(file), _CHUNK)


def _opened_zstd(file: Path) -> "_Checked":
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(
                f"{printable(file)} needs the package zstandard: pip install 'stickjax[zstd]'; or unpack it first"
            ) from error
        stream = io.BufferedReader(_ZstdFrames(file.open("rb"), zstandard), _CHUNK)
        return _Checked(stream, file, "zstd", (OSError, EOFError, zstandard.ZstdError))
    return _Checked(zstd.open(file), file, "zstd", (OSError, EOFError, zstd.ZstdError))


class _Stream(io.RawIOBase):
    """A stream of bytes. A subclass implements `readinto`. Closing it also closes the stream `source`."""

    def __init__(self, source: BinaryIO):
        self._source = source

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._source.close()
        super().close()


class _Checked(_Stream):
    """The decompressed bytes of the file at the path `file`. They are read from the stream `source`.

    If reading from `source` raises one of `errors`, this class raises ValueError. The message names the file. It gives
    the error of the disk, or says that the data are damaged or cut off. `kind` is the compression, such as "gzip".
    """

    def __init__(self, source: BinaryIO, file: Path, kind: str, errors: tuple[type[Exception], ...]):
        super().__init__(source)
        self._file, self._kind, self._errors = file, kind, errors

    def readinto(self, buffer) -> int:
        try:
            data = self._source.read(len(buffer))
        except self._errors as error:
            if getattr(error, "strerror", None):  # an error of the disk
                raise ValueError(f"cannot read {printable(self._file)}: {error.strerror}") from error
            raise ValueError(
                f"cannot read {printable(self._file)}: its {self._kind} data are damaged or cut off: {error}"
            ) from error
        buffer[: len(data)] = data
        return len(data)


class _ZstdFrames(_Stream):
    """The decompressed bytes of a zstd stream `source`, which the package `zstandard` decompresses.

    The reader of that package accepts a file that is cut off. For such a file, this class raises EOFError.
    """

    def __init__(self, source: BinaryIO, zstandard: ModuleType):
        super().__init__(source)
        self._new_frame: Callable = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._frame = None  # the decompressor of the frame that has begun
        self._packed, self._ready = b"", memoryview(b"")

    def readinto(self, buffer) -> int:
        while not self._ready:
            if not self._packed and not (packed := self._source.read(_CHUNK)):
                if self._frame is not None:
                    raise EOFError("the last frame is incomplete")
                return 0
            elif not self._packed:
                self._packed = packed
            if self._frame is None:
                self._frame = self._new_frame()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
