"""What kernels and loops say of their work, for those who count operations on a jaxpr (`stickjax.plan.flops`).

A kernel is opaque there, a loop that looks at its data has no length, and rows may be padding. Each stands in a
`jax.jit` whose name carries the number: it survives derivatives, rematerialisation and scans, is dropped with what it
names, and costs nothing.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from . import partition

_NAME = re.compile(r"_(flops|trips|share)_(\d+(?:\.\d+)?(?:e[+-]?\d+)?)$")


class Stated(NamedTuple):
    """One of the three: operations of a kernel, passes through each loop, the share of all operations that is done."""

    flops: float | None = None
    trips: float | None = None
    share: float | None = None


def kernel(name: str, flops: float | int, run: Callable) -> Callable:
    """`run`, which takes so many floating-point operations whatever a jaxpr shows of it.

    Its results vary over the axes of a shard_map that its arguments vary over, which a kernel does not say by itself.
    """

    def varying(*arguments):
        results, tree = jax.tree.flatten(run(*arguments))
        return tree.unflatten(partition.alike(*jax.tree.leaves(arguments), *results)[-len(results) :])

    return _named(f"{name}_flops_{flops:.12g}", varying)


def loop(trips: float | int, run: Callable) -> Callable:
    """`run`, whose `while` loops are expected to make so many passes each."""
    return _named(f"loop_trips_{trips:.12g}", run)


def share(part: float, run: Callable) -> Callable:
    """`run`, which is expected to do a part of the operations that its shapes speak of: the other rows are empty."""
    return run if part == 1 else _named(f"part_share_{part:.12g}", run)


def _named(name: str, run: Callable) -> Callable:
    def named(*arguments):
        return run(*arguments)

    named.__name__ = named.__qualname__ = name
    return jax.jit(named)


def stated(name: str) -> Stated | None:
    """What the name of a jit says, if it is one of these.

    >>> stated("product_flops_1.5e+09"), stated("product")
    (Stated(flops=1500000000.0, trips=None, share=None), None)
    """
    found = _NAME.search(name)
    return Stated(**{found[1]: float(found[2])}) if found else None


def visible_scores(T: int, S: int, *, attend_current: bool = False, window: int | None = None) -> int:
    """(query, key) pairs of a causal mask whose last query stands at the last key.

    >>> visible_scores(4, 4), visible_scores(4, 4, window=1), visible_scores(1, 8, attend_current=True)
    (6, 3, 8)
    """
    left = np.arange(S - T, S)  # keys left of each query
    left = left if window is None else np.minimum(left, window)
    return int(np.maximum(left + attend_current, 0).sum())
