"""Products of float32 on Hopper GPUs, as three of bfloat16: x w = hi(x) hi(w) + hi(x) lo(w) + lo(x) hi(w).

hi(x) is x rounded to bfloat16, and lo(x) is the rest. What is left out, lo(x) lo(w), is 2^-17 of a product. The format
of tensor cores for float32 is tf32: its error is 2^-11, and it needs both operands stored along the dimension that is
summed, which no operand of a weight's gradient is. The three products are computed as one product of rows that are
three times as long, so that the accumulators add them up.
"""

import jax.numpy as jnp
from jax import lax

from . import mosaic_product, mosaic_weights
from .mosaic_product import Plan
from .tasks import Tasks


def split(x):
    """hi(x) and lo(x).

    hi(x) is made by reduce_precision, because XLA removes a conversion to bfloat16 and back: lo(x) would be zero.
    """
    hi = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    lo = jnp.where(jnp.isfinite(hi), x - hi, 0)
    return hi.astype(jnp.bfloat16), lo.astype(jnp.bfloat16)


def product(plan: Plan, x, source, weight, tasks: Tasks, target, rows: int, bias=None):
    """`mosaic_product.product`, which also takes float32."""
    if plan.dtype == jnp.float32:
        if plan.x_parts != 1:
            raise NotImplementedError(f"float32 products take rows of one part, not of {plan.x_parts}")
        (x_hi, x_lo), (w_hi, w_lo) = split(x[0]), split(weight)
        x = jnp.stack([x_hi, x_hi, x_lo])
        weight = jnp.concatenate([w_hi, w_lo, w_hi], axis=2 if plan.transposed else 1)
        plan = plan._replace(x_parts=3, dtype=jnp.dtype(jnp.bfloat16), out_dtype=plan.dtype)
    return mosaic_product.product(plan, x, source, weight, tasks, target, rows, bias)


def d_weights(left, left_numbers, right, right_numbers, tasks: Tasks):
    """`mosaic_weights.d_weights`, which also takes float32."""
    if left.dtype != jnp.float32:
        return mosaic_weights.d_weights(left, left_numbers, right, right_numbers, tasks)
    left, right = jnp.concatenate(split(left), axis=1), jnp.concatenate(split(right))
    every = mosaic_weights.d_weights(left, left_numbers, right, right_numbers, tasks, jnp.float32)
    E, D, P, F = every.shape
    every = every.reshape(E, 2, D // 2, 2, P // 2, F)
    return every[:, 0, :, 0] + every[:, 0, :, 1] + every[:, 1, :, 0]
