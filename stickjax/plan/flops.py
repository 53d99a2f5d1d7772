"""Count the floating-point operations and the memory traffic of a program, given as a jaxpr.

The body of a loop counts as often as it runs. Operations that rematerialisation repeats count again. The body of a
shard_map counts once for each device. XLA's cost analysis is not used: it counts the body of a loop only once, and it
does not exist for an absent GPU.
"""

import math
from typing import NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from pallas_kernels import cost
from stickjax.system.memory import itemsize


class Work(NamedTuple):
    """The work of a program: its operations and its memory traffic. Elementwise operations are not included.

    `flops`: the number of floating-point operations of matrix products and kernels; a multiply-add counts as two.
    `bytes`: the size of the operands and results of matrix products and kernels, in bytes.
    `unknown`: how many `while` loops have an unknown number of passes. One pass is counted for each of these loops. The
      number of passes is known if `pallas_kernels.cost.loop` states it.
    """

    flops: float = 0.0
    bytes: float = 0.0
    unknown: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, n: float) -> "Work":
        return Work(self.flops * n, self.bytes * n, self.unknown)


def count(jaxpr: Jaxpr | ClosedJaxpr) -> Work:
    """Return the `Work` of a program for all devices together. The program is given as a jaxpr.

    >>> import jax.numpy as jnp
    >>> def f(x, w):
    ...     return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    >>> count(jax.make_jaxpr(f)(jnp.ones((2, 8)), jnp.ones((5, 8, 8)))).flops == 5 * 2 * 2 * 8 * 8
    True
    """
    return _count(jaxpr, None)


def _count(jaxpr, trips: float | None) -> Work:
    """Return the `Work` of a jaxpr.

    `trips`: the expected number of passes of each `while` loop in the jaxpr; None: not known. A jaxpr does not contain
    this number, so `pallas_kernels.cost.loop` puts it into the name of the function that encloses the loop.
    """
    total = Work()
    for equation in jaxpr.jaxpr.eqns if isinstance(jaxpr, ClosedJaxpr) else jaxpr.eqns:
        total += _equation(equation, trips)
    return total


def _equation(equation: JaxprEqn, trips: float | None) -> Work:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return Work(2 * depth * equation.outvars[0].aval.size, _bytes(equation))
    if name == "while":
        known = trips if trips is not None else 1
        return (_count(params["body_jaxpr"], trips) + Work(unknown=trips is None)).times(known)
    if name == "cond":
        return max((_count(branch, trips) for branch in params["branches"]), key=lambda work: work.flops)
    if name == "scan":
        return _count(params["jaxpr"], trips).times(params["length"])
    if name == "shard_map":
        copies = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        return _count(params["jaxpr"], trips).times(copies)
    if stated := cost.stated(params.get("name") or ""):
        if stated.flops is not None:
            return Work(stated.flops, _bytes(equation))
        if stated.share is not None:
            whole = _count(params["jaxpr"], trips)
            return whole._replace(flops=whole.flops * stated.share)
        trips = stated.trips
    return sum((_count(inner, trips) for inner in _inner(params)), Work())


def _inner(params: dict) -> list:
    """Return all jaxprs in `params`, the parameters of an equation, such as the body of a call or of a remat."""
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
    return [leaf for leaf in leaves if isinstance(leaf, Jaxpr | ClosedJaxpr)]


def _bytes(equation: JaxprEqn) -> int:
    arrays = [v.aval for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape")]
    return sum(math.prod(a.shape) * itemsize(a.dtype) for a in arrays)
