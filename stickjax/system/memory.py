"""Memory: the bytes that arrays need on a device, the bytes that are free, and an error if the arrays do not fit.

On a CPU, a process without enough memory hangs, or is killed without a message. So memory is checked before it is
allocated. The first check uses the shapes of the training state: a run needs at least this memory. The second check
uses the compiled program.
"""

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_WHAT_TO_DO = "use a smaller model, a smaller batch, more devices or more memory"


class Free(NamedTuple):
    """The number of free bytes, and the origin of this number for messages, such as "available on this machine"."""

    bytes: int
    source: str


def gib(size: float) -> str:
    """Return a number of bytes as text with a unit.

    >>> gib(3 * 2**30), gib(5 * 2**20)
    ('3.0 GiB', '5.0 MiB')
    """
    for power, name in enumerate(("EiB", "PiB", "TiB", "GiB", "MiB", "KiB")):
        if size >= (unit := 2 ** (60 - 10 * power)):
            return f"{size / unit:,.1f} {name}"
    return f"{size:.0f} B"


def local_bytes(tree) -> int:
    """Return the bytes that a pytree of arrays, or of ShapeDtypeStructs, takes on each device.

    A sharded array counts with the part of one device. An array without a sharding counts in full.
    """
    return sum(math.prod(_local_shape(x)) * itemsize(x.dtype) for x in jax.tree.leaves(tree))


def _local_shape(x) -> tuple[int, ...]:
    sharding = getattr(x, "sharding", None)
    return x.shape if sharding is None else sharding.shard_shape(x.shape)


def itemsize(dtype) -> int:
    """Return the bytes of one element of an array of this type; for a typed PRNG key, the bytes of its key data.

    >>> itemsize(jnp.bfloat16), itemsize(jax.eval_shape(lambda: jax.random.key(0)).dtype)
    (2, 8)
    """
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype))
        return words.size * words.dtype.itemsize
    return jnp.dtype(dtype).itemsize


def state_parts(state) -> dict[str, int]:
    """Return the bytes that a training state takes on each device: {"parameters" or another purpose: bytes}.

    `state` has the pytrees `params` and `opt_state`, whose leaves are arrays or ShapeDtypeStructs.
    """
    masters = local_bytes(optax.tree.get(state.opt_state, "masters"))
    moments = local_bytes(state.opt_state) - masters
    parts = {"parameters": local_bytes(state.params), "float32 masters": masters, "moments": moments}
    return {name: size for name, size in parts.items() if size}


def check_fits(parts: dict[str, int], mesh: Mesh | None = None) -> None:
    """Raise ValueError if the arrays of `parts` together need more bytes than a device has free.

    Args:
      parts: {purpose of some arrays: the bytes that they need on each device}; the message lists them.
      mesh: the devices; None: the first device.
    """
    needed, free = sum(parts.values()), free_memory(mesh)
    if free is not None and needed > free.bytes:
        words = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
        raise ValueError(
            f"this does NOT fit: {words}, together {gib(needed)} of {gib(free.bytes)} ({free.source}); {_WHAT_TO_DO}"
        )


def check_program(compiled: jax.stages.Compiled, what: str, mesh: Mesh | None = None) -> None:
    """Raise ValueError if a compiled program needs more memory than the devices of the mesh have free.

    The program needs memory for its results and temporaries; its arguments are in memory already. `what` is the name of
    the program in the message. Without a mesh, the program runs on the first device.
    """
    memory = compiled.memory_analysis()
    if memory is None:  # not every backend provides it
        return
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results, free = memory.output_size_in_bytes - memory.alias_size_in_bytes, free_memory(mesh)
    if free is not None and results + temporaries > free.bytes:
        raise ValueError(
            f"{what} does NOT fit: {gib(arguments)} arguments + {gib(temporaries)} temporaries, "
            f"peak {gib(arguments + results + temporaries)}; beside the arguments {gib(free.bytes)} are free "
            f"({free.source}); {_WHAT_TO_DO}"
        )


def free_memory(mesh: Mesh | None = None) -> Free | None:
    """Return the free bytes of one device of the mesh, or of the first device without a mesh; None if unknown.

    If the devices are CPUs, the free memory of the machine is divided by their number.
    """
    devices = [jax.local_devices()[0]] if mesh is None else mesh.local_devices
    if devices[0].platform == "cpu":
        host = host_memory()
        return host and host._replace(bytes=host.bytes // len(devices))
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return Free(stats["bytes_limit"] - stats.get("bytes_in_use", 0), f"free on {devices[0].device_kind}")


def host_memory() -> Free | None:
    """Return the bytes that this process can still allocate; None if nothing limits them.

    This is the least of what the machine, the control groups of the process and ulimit -v leave.
    """
    limits = []
    swap = _meminfo("SwapFree") or 0
    if (available := _meminfo("MemAvailable")) is not None:
        limits.append(Free(available + swap, "available on this machine"))
    limits += [Free(max(0, size + swap), "left by the limit of the control group") for size in _left_by_cgroups()]
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY:
        limits.append(Free(max(0, allowed - _address_space()), "left by the limit of the address space, ulimit -v"))
    return min(limits, default=None)


def _meminfo(name: str) -> int | None:
    for line in _read(PROC / "meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _address_space() -> int:
    pages = _read(PROC / "self" / "statm").split()
    return int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def _left_by_cgroups() -> Iterator[int]:
    """Yield the bytes that each control group of this process still allows, from the innermost group to the root.

    Memory that caches files counts as free. Groups without a limit are left out.
    """
    for line in _read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, stat = CGROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, limit, used, stat = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            allowed, taken = (_read(place / name).strip() for name in (limit, used))
            if allowed.isdecimal() and taken.isdecimal():
                rows = (row.split() for row in _read(place / "memory.stat").splitlines())
                sizes = {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}
                files = sum(sizes.get(f"{stat}{kind}_file", 0) for kind in ("active", "inactive"))
                yield int(allowed) - int(taken) + files
            if place == root:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
