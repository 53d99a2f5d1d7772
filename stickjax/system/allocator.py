"""Keep freed memory in the process, so that a step on a CPU does not get the same memory from the kernel again.

JAX allocates the temporary arrays of a program when the program starts, and frees them when it ends. By default, the
allocator of glibc returns such large blocks to the kernel. Then the kernel fills every page of the next step with zeros
again, at its first use. A gradient of `configs/tiny.py` used 42,000 new pages. A gradient of `configs/om_listops.py`
at T=24 used 57,000 pages, and took a fourth less time without them (one CPU core, 2026-11-30).
"""

import ctypes
import os
from pathlib import Path

_ACCELERATORS = ("nvidiactl", "kfd", "accel", "vfio")  # files in /dev of NVIDIA and AMD GPUs, and of TPUs
_DEV = Path("/dev")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # numbers of the options in malloc.h


def keep_freed_memory() -> bool:
    """Make the allocator of glibc keep freed memory until the process ends. Return whether it will.

    The process then needs about as much memory as at its peak until it ends. Threads that already exist keep their own
    part of the memory, with the old rules, so call this function before JAX starts its threads. Three cases change
    nothing: the C library is not glibc, the environment already has settings for its allocator (MALLOC_* or
    GLIBC_TUNABLES), or the machine has an accelerator, which then has the temporary arrays.
    """
    libc = _glibc()
    if libc is None or _is_set_by_the_user() or _has_accelerator():
        return False
    # One arena: a block in an arena of a thread is returned to the kernel as soon as it is free. No block is mapped
    # separately, and the end of the arena is never trimmed.
    options = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    return all(libc.mallopt(option, value) for option, value in options)


def return_freed_memory() -> None:
    """Return freed memory to the kernel now, so that the kernel counts it as available. Nothing without glibc."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc():
    """Return the C library of this process as a `ctypes` object, or None if it is not glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim  # noqa: B018  (AttributeError in other libraries)
    except (AttributeError, OSError, TypeError):  # TypeError: on Windows
        return None
    return libc


def _is_set_by_the_user() -> bool:
    return "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(n.startswith("MALLOC_") for n in os.environ)


def _has_accelerator() -> bool:
    """Return whether JAX may use an accelerator of this machine: it has a device file, and JAX_PLATFORMS allows it."""
    return os.environ.get("JAX_PLATFORMS") != "cpu" and any((_DEV / name).exists() for name in _ACCELERATORS)
