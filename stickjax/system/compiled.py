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

    Several processes may use the same folder at the same time. A program belongs to one version of JAX, one device
    type, and one set of XLA options. So an old program is never used in a wrong place.

    Args:
      folder: the folder. None: do not change JAX's settings. "auto": `default_folder()`. The value "auto" changes
        nothing in two cases: JAX already has a folder, for example by the environment variable
        JAX_COMPILATION_CACHE_DIR; or the folder cannot be written. It also changes nothing for a training with several
        processes. They would need a folder that all their machines share, so name such a folder.

    Raises:
      ValueError: `folder` is a path, and no file can be written into this folder.
    """
    if folder is None or (folder == AUTO and (jax.config.jax_compilation_cache_dir or jax.process_count() > 1)):
        return
    place = default_folder() if folder == AUTO else Path(folder).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)  # whoever writes programs into it can run code as the user
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(13, os.strerror(13))
    except OSError as error:
        if folder == AUTO:
            return
        raise ValueError(f"train.compilation_cache={folder!r} cannot be written: {error.strerror}") from error
    remove_old(place.iterdir(), LARGEST)
    if jax.config.jax_compilation_cache_dir not in (None, str(place)):
        compilation_cache.reset_cache()  # without this call, JAX continues to use the folder of the first program
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # keep also the many small programs


def default_folder() -> Path:
    """Return the folder in which programs are kept by default: stickjax/compiled/CPU in the cache folder of the user.

    The cache folder of the user is $XDG_CACHE_HOME, or ~/.cache if this variable is not set. CPU is a hash of the
    instructions that the CPU has, and of the number of cores that this process may use. JAX checks neither. A program
    from another CPU may need instructions that this one does not have. A program that was compiled for one core uses
    only one.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "stickjax" / "compiled" / _cpu()


def _cpu() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = f"{platform.machine()} {platform.processor()} {cores} cores\n"
    with contextlib.suppress(OSError):
        found = re.findall(r"^(?:flags|Features|cpu family|model|CPU part)\s*:.*$", _CPUINFO.read_text(), re.MULTILINE)
        features += "\n".join(sorted(set(found)))
    return hashlib.sha256(features.encode()).hexdigest()[:12]


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
