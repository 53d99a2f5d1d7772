"""Files that are there when they are complete or not at all, and one clear reason when the disk refuses one."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """An OSError inside says what is wrong and that it happened while `path` was written.

    >>> with writing("run/config.json"):
    ...     raise OSError(errno.ENOSPC, "No space left on device", "run/config.json.tmp")
    Traceback (most recent call last):
    ...
    OSError: [Errno 28] the disk is full: 'run/config.json'
    """
    try:
        yield
    except OSError as error:
        reason = REASONS.get(error.errno) or error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, os.fspath(path)) from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file at once: a reader finds the old content or the new one, and an error leaves the old one.

    Raises OSError, with the reason and `path`.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        try:
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def sync_folder(folder: str | os.PathLike) -> None:
    """Wait until the names in a folder would survive a loss of power, where the file system can tell."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(number)
    finally:
        os.close(number)
