"""Names that state the work of kernels and loops, so that `stickjax.plan.flops` can count the operations of a jaxpr.

A jaxpr does not show the work inside a kernel, the number of passes through a loop that depends on data, or the number
of padding rows. Such code runs in a `jax.jit` whose name contains this number. The name survives derivatives,
rematerialisation and scans. If JAX removes the code, it removes the name too. The name takes no time in the program.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from . import partition

_NAME = re.compile(r"_(flops|trips|share)_(\d+(?:\.\d+)?(?:e[+-]?\d+)?)$")


class Stated(NamedTuple):
    """The number that one name states. Exactly one of the three fields is set.

    `flops`: floating-point operations of a kernel. `trips`: passes through each loop. `share`: the share of the
    operations that is useful work.
    """

    flops: float | None = None
    trips: float | None = None
    share: float | None = None


def kernel(name: str, flops: float | int, run: Callable) -> Callable:
    """Return `run` under a name that states its number of floating-point operations, `flops`.

    JAX does not know over which axes of a shard_map the results of a kernel vary. So the results are marked as varying
    over every axis over which at least one argument varies.
    """

    def varying(*arguments):
        results, tree = jax.tree.flatten(run(*arguments))
        return tree.unflatten(partition.alike(*jax.tree.leaves(arguments), *results)[-len(results) :])

    return _named(f"{name}_flops_{flops:.12g}", varying)


def loop(trips: float | int, run: Callable) -> Callable:
    """Return `run` under a name that states the expected number of passes of each of its `while` loops, `trips`."""
    return _named(f"loop_trips_{trips:.12g}", run)


def share(part: float, run: Callable) -> Callable:
    """Return `run` under a name that states the share of its operations that is useful, `part`. The rest is padding."""
    return run if part == 1 else _named(f"part_share_{part:.12g}", run)


def _named(name: str, run: Callable) -> Callable:
    def named(*arguments):
        return run(*arguments)

    named.__name__ = named.__qualname__ = name
    return jax.jit(named)


def stated(name: str) -> Stated | None:
    """Return what the name of a jitted function states, or None if it states nothing.

    >>> stated("product_flops_1.5e+09"), stated("product")
    (Stated(flops=1500000000.0, trips=None, share=None), None)
    """
    found = _NAME.search(name)
    return Stated(**{found[1]: float(found[2])}) if found else None


def visible_scores(T: int, S: int, *, attend_current: bool = False, window: int | None = None) -> int:
    """Return the number of (query, key) pairs that a causal mask keeps.

    The last query is at the position of the last key.

    >>> visible_scores(4, 4), visible_scores(4, 4, window=1), visible_scores(1, 8, attend_current=True)
    (6, 3, 8)
    """
    left = np.arange(S - T, S)  # keys left of each query
    left = left if window is None else np.minimum(left, window)
    return int(np.maximum(left + attend_current, 0).sum())
