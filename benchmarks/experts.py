"""Measure the time of expert networks on the CPU, compared with the time of a dense network.

The dense network has the size of one expert, and computes as many rows as all experts together.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import expert_mlp, route
from pallas_kernels.scatter_moe.call import ACTIVATIONS

from . import cost
from .report import PASSES, compared
from .timing import forward_backward, interleave

PART = "experts"
SHAPE = dict(D=512, F=1024, k=2)
EXPERTS = (8, 32)
# {mean number of rows per expert: bound}. In the forward pass, the time of the experts divided by the time of the dense
# network must not be above the bound.
BOUNDS = {512: 1.3, 128: 1.8, 32: 2.6}
BACKWARD = 1.3  # the bound for forward+backward is this number times the bound for forward


def inputs(key, T: int, k: int, D: int, F: int, E: int, dtype=jnp.float32):
    """Return random inputs of expert networks: ((cotangent of the output, x, w_in, w_out, gates), expert indices).

    Shapes: the cotangent and x are [T,D], w_in is [E,D,2F], w_out is [E,F,D], the gates and the expert indices are
    [T,k]. The gates are fp32. Each token has k different experts, and all experts are equally likely.
    """
    keys = jax.random.split(key, 6)
    x, d_out = (jax.random.normal(kk, (T, D), jnp.float32).astype(dtype) for kk in keys[:2])
    w_in = (jax.random.normal(keys[2], (E, D, 2 * F), jnp.float32) * D**-0.5).astype(dtype)
    w_out = (jax.random.normal(keys[3], (E, F, D), jnp.float32) * F**-0.5).astype(dtype)
    gates = jax.nn.softmax(jax.random.normal(keys[4], (T, k), jnp.float32), axis=-1)
    _, chosen = jax.lax.top_k(jax.random.uniform(keys[5], (T, E)), k)
    return (d_out, x, w_in, w_out, gates), chosen


def experts(chosen, E: int, **settings):
    """Return a function `(x, w_in, w_out, gates) -> out` that computes E expert networks.

    `chosen` [T,k]: the expert indices of each token. The function also sorts the (token, choice) pairs by expert, so
    the sort is a part of the measured time. `settings`: keyword arguments of `expert_mlp`.
    """
    return lambda x, w_in, w_out, gates: expert_mlp(x, w_in, w_out, route(chosen, E), gates, **settings)


def dense(x, w_in, w_out):
    hidden = ACTIVATIONS["swiglu"](jnp.matmul(x, w_in, precision="highest"))
    return jnp.matmul(hidden, w_out, precision="highest")


def rows(ceilings: cost.Ceilings, *, quick: bool = False):
    shape = dict(D=16, F=32, k=2) if quick else SHAPE
    for E in (4,) if quick else EXPERTS:
        for per_expert, bound in {16: 10.0}.items() if quick else BOUNDS.items():
            yield from _case(per_expert, E, bound, shape, ceilings, seconds=0.1 if quick else 4.0)


def _case(per_expert, E, bound, shape, ceilings, *, seconds):
    T = per_expert * E // shape["k"]
    (d_out, *arguments), chosen = inputs(jax.random.key(0), T, E=E, **shape)
    x, w_in, w_out, _ = arguments
    wide, d_wide = jnp.repeat(x, shape["k"], 0), jnp.repeat(d_out, shape["k"], 0)
    ours, theirs = experts(chosen, E, implementation="xla"), (wide, w_in[0], w_out[0])
    for backward, passes in enumerate(PASSES):
        if backward:
            f, g = forward_backward(ours), forward_backward(dense)
            race = {"dense": lambda g=g: g(d_wide, *theirs), "xla": lambda f=f: f(d_out, *arguments)}
        else:
            f, g = jax.jit(ours), jax.jit(dense)
            race = {"dense": lambda g=g: g(*theirs), "xla": lambda f=f: f(*arguments)}
        case = f"E={E} {per_expert} rows/expert {passes}"
        limits = cost.experts(T, E=E, **shape, backward=backward).limits(ceilings)
        allowed = {"xla": bound * BACKWARD if backward else bound}
        yield from compared(PART, case, interleave(race, seconds=seconds), "dense", allowed, limits)
