"""Puts the cost of kernels and loops into names of jitted functions, so that `stickjax.plan.flops` finds it in a jaxpr.

A jaxpr does not show three numbers: the floating-point operations of a kernel, the number of passes through a loop
whose end depends on data, and the share of the operations that is useful work and not padding. So the kernel, the loop
or the operations run in a jitted function whose name contains the number, such as "product_flops_1500000000". The name
stays in the jaxpr under derivatives, rematerialisation and scans. If JAX removes the function, it removes the name too.
The name takes no time when the program runs.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from . import partition

_NAME = re.compile(r"_(flops|trips|share)_(\d+(?:\.\d+)?(?:e[+-]?\d+)?)$")


class Stated(NamedTuple):
    """The cost that is written in the name of a jitted function. Exactly one of the fields is set.

    `flops`: the number of floating-point operations of a kernel.
    `trips`: the expected number of passes through each `while` loop of the function.
    `share`: the share of the operations that is useful work, from 0 to 1; the rest is padding.
    """

    flops: float | None = None
    trips: float | None = None
    share: float | None = None


def kernel(name: str, flops: float | int, run: Callable) -> Callable:
    """Wrap `run`, a function that launches a kernel, in a jitted function whose name contains the number `flops`.

    `flops` is the number of floating-point operations of one launch. If `name` is "product" and `flops` is 1.5e9, the
    jitted function is called "product_flops_1500000000". It takes the arguments of `run` and returns its results.

    Inside `jax.shard_map`, an array varies over a mesh axis if it may differ between the devices along this axis. JAX
    does not know over which axes the results of a kernel vary. So if an argument varies over an axis, the jitted
    function marks all results as varying over this axis.
    """

    def varying(*arguments):
        results, tree = jax.tree.flatten(run(*arguments))
        return tree.unflatten(partition.alike(*jax.tree.leaves(arguments), *results)[-len(results) :])

    return _named(f"{name}_flops_{flops:.12g}", varying)


def loop(trips: float | int, run: Callable) -> Callable:
    """Wrap `run`, a function with `while` loops, in a jitted function whose name contains the number `trips`.

    `trips` is the expected number of passes through each `while` loop in `run`. It may be a fraction, such as a mean
    over the tiles of an array.
    """
    return _named(f"loop_trips_{trips:.12g}", run)


def share(part: float, run: Callable) -> Callable:
    """Wrap the function `run` in a jitted function whose name contains the number `part`.

    `part` is the share of the operations in `run` that is useful work, from 0 to 1. The other operations are spent on
    padding. If `part` is 1, return `run` itself.
    """
    return run if part == 1 else _named(f"part_share_{part:.12g}", run)


def _named(name: str, run: Callable) -> Callable:
    def named(*arguments):
        return run(*arguments)

    named.__name__ = named.__qualname__ = name
    return jax.jit(named)


def stated(name: str) -> Stated | None:
    """Return the cost that the name of a jitted function contains, or None if the name contains no cost.

    >>> stated("product_flops_1.5e+09"), stated("product")
    (Stated(flops=1500000000.0, trips=None, share=None), None)
    """
    found = _NAME.search(name)
    return Stated(**{found[1]: float(found[2])}) if found else None


def visible_scores(T: int, S: int, *, attend_current: bool = False, window: int | None = None) -> int:
    """Return the number of (query, key) pairs that a causal mask allows, for T queries and S keys.

    The last query is at the position of the last key. A query at position q attends to the keys k < q. With
    `attend_current` it also attends to the key k = q. With a `window` it attends only to keys with q - k <= window.

    >>> visible_scores(4, 4), visible_scores(4, 4, window=1), visible_scores(1, 8, attend_current=True)
    (6, 3, 8)
    """
    left = np.arange(S - T, S)  # for each query, the number of keys at smaller positions
    left = left if window is None else np.minimum(left, window)
    return int(np.maximum(left + attend_current, 0).sum())
