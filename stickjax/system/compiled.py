"""Keep compiled programs in a folder, so that the next start of a command does not compile them again."""

import contextlib
import hashlib
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

AUTO = "auto"
LARGEST = 4 * 2**30  # bytes of all programs; when a command starts, the programs that were used last are kept
_CPUINFO = Path("/proc/cpuinfo")


def keep_compiled(folder: str | None) -> None:
    """Make JAX keep compiled programs in `folder`, and take them from there at the next start.

    Each CPU type and each number of cores has its own subfolder. JAX checks neither: a program from another CPU may
    need instructions that this one does not have, and a program that was compiled for one core uses only one. JAX
    checks its version, the type of the devices and the options of XLA.

    Several processes may use the same folder at the same time. If a process reads a program that another process is
    just writing, JAX prints a warning and compiles the program.

    Args:
      folder: the folder. Whoever can write into it can run code as the user. None: do not change JAX's settings.
        "auto": the folder of `default_folder`. In three cases, "auto" changes nothing. First, JAX may already have a
        folder, for example from the environment variable JAX_COMPILATION_CACHE_DIR. Second, the folder may not be
        writable, or other users may be able to write into it. Third, a training may have several processes: they need
        a folder that all their machines share, so name such a folder.

    Raises:
      ValueError: `folder` is a path, and no file can be written into this folder.
    """
    if folder is None or (folder == AUTO and (jax.config.jax_compilation_cache_dir or jax.process_count() > 1)):
        return
    try:
        root = default_folder() if folder == AUTO else Path(folder).expanduser().absolute()
        place = root / _cpu()
        for path in (root, place):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(place, os.R_OK | os.W_OK | os.X_OK) or (folder == AUTO and not _private(root, place)):
            raise PermissionError(13, os.strerror(13))
        remove_old((root if folder == AUTO else place).rglob("*-cache"), LARGEST)
    except (OSError, RuntimeError) as error:  # Path.expanduser raises RuntimeError if there is no home folder
        if folder == AUTO:
            return
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"train.compilation_cache={folder!r} cannot be used: {reason}; name another folder, or use auto"
        ) from error
    if jax.config.jax_compilation_cache_dir not in (None, str(place)):
        compilation_cache.reset_cache()  # without this call, JAX continues to use the folder of the first program
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # keep also the many small programs


def default_folder() -> Path:
    """Return the folder in which programs are kept by default: stickjax/compiled in the cache folder of the user.

    The cache folder of the user is $XDG_CACHE_HOME, or ~/.cache if this variable is not set to an absolute path.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "stickjax" / "compiled"


def _cpu() -> str:
    """Return a hash of the instructions of this CPU and of the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = f"{platform.machine()} {platform.processor()} {cores} cores\n"
    with contextlib.suppress(OSError):
        found = re.findall(r"^(?:flags|Features|cpu family|model|CPU part)\s*:.*$", _CPUINFO.read_text(), re.MULTILINE)
        features += "\n".join(sorted(set(found)))
    return hashlib.sha256(features.encode()).hexdigest()[:12]


def _private(*folders: Path) -> bool:
    """Return whether the user owns these folders, and no other user can write into them."""
    stats = [folder.stat() for folder in folders]
    return not hasattr(os, "getuid") or all(s.st_uid == os.getuid() and not s.st_mode & 0o022 for s in stats)


def remove_old(files: Iterable[Path], largest: int) -> None:
    """Remove the files that were not used for the longest time, until all together have at most `largest` bytes."""
    used = []
    for file in files:
        with contextlib.suppress(OSError):  # another process removed it
            stat = file.stat()
            used.append((max(stat.st_atime, stat.st_mtime), stat.st_size, file))
    total = sum(size for _, size, _ in used)
    for _, size, file in sorted(used):
        if total <= largest:
            break
        with contextlib.suppress(OSError):
            file.unlink()
        total -= size
