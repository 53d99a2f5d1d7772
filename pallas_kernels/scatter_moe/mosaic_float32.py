"""Products of float32 on Hopper GPUs, as six products of bfloat16.

A float32 number is the sum of three bfloat16 numbers, x = x_0 + x_1 + x_2, each about 2^-8 of the one before:

    x w = x_0 w_0 + (x_0 w_1 + x_1 w_0) + (x_0 w_2 + x_1 w_1 + x_2 w_0) + 2^-24 of x w, which are left out

The tensor cores' own format for float32 is tf32. Its error is 2^-11, and it needs both operands stored along the
dimension that is summed; the operands of a weight's gradient are not stored so.
"""

import jax.numpy as jnp
from jax import lax

from .. import partition
from . import mosaic_product, mosaic_weights
from .mosaic_product import Plan
from .tasks import Tasks

# The parts of x and w in each product; the smallest first, so that the large ones do not round them away.
PAIRS = (1, 1), (0, 2), (2, 0), (0, 1), (1, 0), (0, 0)


def split(x):
    """The three bfloat16 parts of float32 numbers. Of a number that is not finite, the others are 0.

    A part is rounded by reduce_precision, because XLA removes a conversion to bfloat16 and back.
    """
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        x = jnp.where(jnp.isfinite(part), x - part, 0)
        parts.append(part.astype(jnp.bfloat16))
    return parts


def product(plan: Plan, x, source, weight, tasks: Tasks, target, rows: int, bias=None):
    """`mosaic_product.product`, which also takes float32."""
    if plan.dtype == jnp.float32:
        if plan.x_parts != 1:
            raise NotImplementedError(f"float32 products take rows of one part, not of {plan.x_parts}")
        x, w = split(x[0]), split(weight)
        # One product of rows that are six times as long: the accumulators sum the six.
        x = jnp.stack([x[i] for i, _ in PAIRS])
        weight = jnp.concatenate([w[j] for _, j in PAIRS], axis=2 if plan.transposed else 1)
        plan = plan._replace(x_parts=len(PAIRS), dtype=jnp.dtype(jnp.bfloat16), out_dtype=plan.dtype)
    return mosaic_product.product(plan, x, source, weight, tasks, target, rows, bias)


def d_weights(left, left_numbers, right, right_numbers, tasks: Tasks):
    """`mosaic_weights.d_weights`, which also takes float32."""
    if left.dtype != jnp.float32:
        return mosaic_weights.d_weights(left, left_numbers, right, right_numbers, tasks)
    lefts, rights = split(left), split(right)

    def add(total, pair):
        left, right = pair
        return total + mosaic_weights.d_weights(left, left_numbers, right, right_numbers, tasks, jnp.float32), None

    pairs = jnp.stack([lefts[i] for i, _ in PAIRS]), jnp.stack([rights[j] for _, j in PAIRS])
    E, D, (P, _, F) = tasks.rows.shape[0], left.shape[1], right.shape
    zeros, *_ = partition.alike(jnp.zeros((E, D, P, F), jnp.float32), left, right, tasks.rows)
    return lax.scan(add, zeros, pairs)[0]
