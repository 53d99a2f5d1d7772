"""Make paths safe for Orbax and TensorStore, which read some characters of a path as a pattern or as an address."""

import hashlib
import os
import re
import tempfile
import threading
from pathlib import Path

# A path may have letters of any alphabet, and signs that have no meaning in a pattern or an address. It must not begin
# with /gs/, /s3/, /az/ or /hf/: TensorStore would read such a path as the address of a remote store.
_PLAIN = re.compile(r"(?!/(gs|s3|az|hf)/)[\w/.,+=@~ -]*")
MOST_BYTES = 3800  # the longest path of a folder; Linux allows 4096, and the names of files in the folder need the rest


def plain_path(folder: Path) -> Path:
    r"""Return a path of `folder` that Orbax and TensorStore read correctly: its real path, or a symbolic link to it.

    Orbax finds files by `glob`, for which `[0.1]`, `*` and `?` are patterns. TensorStore reads a backslash as a slash,
    and cannot open a path that is not UTF-8. Letters, digits, spaces and the characters /.,+=@~_- are safe. If the real
    path has other characters, or begins like the address of a remote store (such as /gs/), this function makes a
    symbolic link to `folder` in the system's folder for temporary files, and returns the path of the link. The link has
    the same name in all processes.

    Raise ValueError if the link cannot be made, or if the path is too long.

    >>> plain_path(Path("/data/run 1/checkpoints"))
    PosixPath('/data/run 1/checkpoints')
    >>> plain_path(Path("/data/lr[0.1]/checkpoints")).name[:9]
    'stickjax-'
    """
    real = os.path.realpath(folder)
    if len(os.fsencode(real)) > MOST_BYTES:
        raise ValueError(f"the path of {folder} has more than {MOST_BYTES} bytes; choose a shorter one")
    if _PLAIN.fullmatch(real):
        return Path(real)
    link = Path(tempfile.gettempdir()) / f"stickjax-{os.getuid()}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}"
    if not _PLAIN.fullmatch(os.fspath(link)):
        both = f"the path {folder} and TMPDIR={link.parent} both have special characters"
        raise ValueError(f"{both}; choose another run folder or another TMPDIR")
    fresh = link.with_name(f"{link.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        fresh.symlink_to(real)
        fresh.replace(link)  # made again at every call, because some systems delete old temporary files
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise ValueError(
            f"the path {folder} has special characters, so it needs a symbolic link, but {link} cannot be made: "
            f"{error.strerror}"
        ) from error
    return link
