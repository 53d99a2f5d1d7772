"""Compare the memory that arrays need on a device with its free memory, and raise an error if they do not fit.

On a CPU, a process that needs too much memory hangs, or is killed without a message. So memory is checked before it is
allocated, by two functions. `check_fits` checks arrays, such as the training state. `check_program` checks the results
and the temporary arrays of a compiled program, such as the training step.
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

from stickjax.system.allocator import return_freed_memory

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_WHAT_TO_DO = "use a smaller model, a smaller batch, more devices or more memory"


class Free(NamedTuple):
    """The size of free memory, `bytes`. `source` says what limits it, such as "available on this machine"."""

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
    """Return the number of bytes that the arrays in a pytree need on each device.

    The leaves of the pytree are arrays or ShapeDtypeStructs. For a sharded array, only the part on one device is
    counted. An array without a sharding is counted in full.
    """
    return sum(math.prod(_local_shape(x)) * itemsize(x.dtype) for x in jax.tree.leaves(tree))


def _local_shape(x) -> tuple[int, ...]:
    sharding = getattr(x, "sharding", None)
    return x.shape if sharding is None else sharding.shard_shape(x.shape)


def itemsize(dtype) -> int:
    """Return the number of bytes of one element of the type `dtype`. An element may also be a typed PRNG key of JAX.

    >>> itemsize(jnp.bfloat16), itemsize(jax.eval_shape(lambda: jax.random.key(0)).dtype)
    (2, 8)
    """
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype))
        return words.size * words.dtype.itemsize
    return jnp.dtype(dtype).itemsize


def state_parts(state) -> dict[str, int]:
    """Return the number of bytes that a training state needs on each device, as {purpose: bytes}.

    The purposes are "parameters", "float32 masters" (float32 copies of parameters in the optimizer state) and "moments"
    (the rest of the optimizer state). A purpose that needs no memory is left out. `state` has the attributes `params`
    and `opt_state`: two pytrees of arrays or ShapeDtypeStructs.
    """
    masters = local_bytes(optax.tree.get(state.opt_state, "masters"))
    moments = local_bytes(state.opt_state) - masters
    parts = {"parameters": local_bytes(state.params), "float32 masters": masters, "moments": moments}
    return {name: size for name, size in parts.items() if size}


def check_fits(parts: dict[str, int], mesh: Mesh | None = None) -> None:
    """Raise ValueError if a device has less free memory than new arrays need. Call this before they are allocated.

    Args:
      parts: the memory that the arrays need on each device, as {purpose: bytes}, such as {"parameters": 4096}. The
        message lists all purposes.
      mesh: the mesh of devices on which the arrays will be; None: the first device.
    """
    needed, free = sum(parts.values()), free_memory(mesh)
    if free is not None and needed > free.bytes:
        words = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
        raise ValueError(
            f"the model does NOT fit into memory: {words}, together {gib(needed)}, but only {gib(free.bytes)} are free "
            f"({free.source}); {_WHAT_TO_DO}"
        )


def check_program(compiled: jax.stages.Compiled, what: str, mesh: Mesh | None = None) -> None:
    """Raise ValueError if a device has less free memory than a compiled program needs. Call this before it runs.

    The program needs memory for its results and its temporary arrays. Its arguments must be in memory already.

    Args:
      compiled: the program.
      what: the name of the program in the message, such as "the step".
      mesh: the mesh of devices on which the program runs; None: the first device.
    """
    memory = compiled.memory_analysis()
    if memory is None:  # not every backend provides it
        return
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results, free = memory.output_size_in_bytes - memory.alias_size_in_bytes, free_memory(mesh)
    if free is not None and results + temporaries > free.bytes:
        raise ValueError(
            f"{what} does NOT fit into memory: its results and temporaries need {gib(results + temporaries)} in "
            f"addition to {gib(arguments)} of arguments, but only {gib(free.bytes)} are free ({free.source}); "
            f"{_WHAT_TO_DO}"
        )


def free_memory(mesh: Mesh | None = None) -> Free | None:
    """Return the free memory of one device of the mesh; None if it is unknown. Without a mesh, use the first device.

    For CPU devices, it is the free memory of this process (see `host_memory`), divided by the number of mesh devices in
    this process.
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
    """Return the memory that this process can still allocate; None if no limit is known.

    This is the smallest of three numbers: the memory that the machine has free, the memory that the control groups of
    the process still allow, and the address space that `ulimit -v` still allows. Memory that the process has freed is
    returned to the kernel first, so that it counts as free.
    """
    return_freed_memory()
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
    """Yield the number of bytes that each Linux control group (cgroup) of this process still allows.

    The innermost group comes first. Groups without a limit are left out. Memory that is a cache of files counts as
    free, because the kernel can drop it.
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
