"""Write files completely or not at all. If a file cannot be written, an OSError with one clear reason is raised."""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "the file exceeds the size limit, such as ulimit -f",
}
_TEXTS = {os.strerror(code): code for code in REASONS}


def system_error(error: BaseException) -> int | None:
    """Return the errno of an exception, such as errno.ENOSPC; None if the exception has no errno.

    An OSError has its errno as an attribute. TensorStore and XLA raise other exceptions, whose errno is found in the
    text of the message.

    >>> system_error(RuntimeError("RESOURCE_EXHAUSTED: trace.pb; No space left on device")) == errno.ENOSPC
    True
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if found := re.search(r"os_error_code='(\d+)'", str(error)):  # the format of TensorStore
        return int(found[1])
    return next((code for text, code in _TEXTS.items() if text in str(error)), None)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """A context for a block that writes the file `path`: an error in the block becomes an OSError with a clear reason.

    The message of the OSError has the reason, such as "the disk is full", and `path`, even if the block writes a
    temporary file. An OSError, and a RuntimeError that has an errno (see `system_error`), are converted. All other
    exceptions are raised unchanged.

    >>> with writing("run/config.json"):
    ...     raise OSError(errno.ENOSPC, "No space left on device", "run/config.json.tmp")
    Traceback (most recent call last):
    ...
    OSError: [Errno 28] the disk is full: 'run/config.json'
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (code := system_error(error)) is None and not isinstance(error, OSError):
            raise
        reason = REASONS.get(code) or getattr(error, "strerror", None) or (os.strerror(code) if code else str(error))
        raise OSError(code or errno.EIO, reason, os.fspath(path)) from error


def write_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Write `content` to the file `path` atomically: a reader finds the old or the new content, never a mixture.

    If several processes write the same file, the file has the content of the last process. If the file cannot be
    written, it keeps its old content, and an OSError with the reason and `path` is raised.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # a name that no other process has
    with writing(path):
        try:
            with temporary.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def sync_folder(folder: str | os.PathLike) -> None:
    """Call fsync on a folder, so that a renamed file in the folder keeps its new name after a power loss.

    Errors of fsync are ignored, because some file systems do not support it for folders.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(number)
    finally:
        os.close(number)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with everything in it. Parts of a folder that cannot be deleted remain."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
