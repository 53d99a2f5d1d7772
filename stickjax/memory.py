"""How much memory is left where arrays go."""

from pathlib import Path

import jax


def free_bytes() -> int | None:
    """The bytes that are free on the first device, of a CPU those of the machine; None where nothing tells.

    >>> free = free_bytes()
    >>> free is None or free > 0
    True
    """
    device = jax.local_devices()[0]
    if stats := device.memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
