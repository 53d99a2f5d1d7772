"""Matrix products of float32 arrays on Hopper GPUs, each computed as six products of bfloat16 arrays.

A float32 number has 24 significant bits, a bfloat16 number has 8. So x is the sum of three bfloat16 numbers, called
terms: x = x_0 + x_1 + x_2. Each term is at most about 2^-8 of the previous term. The factor w is split in the same way.
The product x w is then the sum of nine products of terms. The six largest of them are summed:

    x w = x_0 w_0 + (x_0 w_1 + x_1 w_0) + (x_0 w_2 + x_1 w_1 + x_2 w_0)   (approximately)

The other three products are left out, since they are at most about 2^-24 of x w.

The kernels do not use tf32, the type to which tensor cores can round float32 numbers. Rounding to tf32 has a relative
error of 2^-11. Also, tf32 operands must be contiguous in memory along the summed axis. In the gradient of a weight,
neither operand is.
"""

import jax.numpy as jnp
from jax import lax

from .. import partition
from . import mosaic_product, mosaic_weights
from .mosaic_product import Plan
from .tasks import Tasks

# (term of x, term of w) for each of the six products. The smallest products are summed first. If they were added to a
# large sum, their last bits would be lost.
PRODUCTS = (1, 1), (0, 2), (2, 0), (0, 1), (1, 0), (0, 0)


def split(x):
    """Return three bfloat16 arrays whose sum is the float32 array x, up to rounding. The largest array comes first.

    Where x is infinite or NaN, the second and third arrays are zero. `lax.reduce_precision` rounds x to bfloat16. A
    conversion to bfloat16 and back to float32 would not work, because XLA removes it.
    """
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        x = jnp.where(jnp.isfinite(part), x - part, 0)
        parts.append(part.astype(jnp.bfloat16))
    return parts


def product(plan: Plan, x, source, weight, tasks: Tasks, target, rows: int, bias=None):
    """Multiply rows of x by the weights of their experts. Return `out` [rows, columns].

    The arrays are bfloat16, float16 or float32. For row i of the tiles in `tasks`, whose expert is e,

      out[target[i]] = (row source[i] of x) @ weight[e] + bias[e].

    `mosaic_product.product` runs the kernel. Its docstring explains the arguments. x is [parts, rows of x, width]; a
    row of x is the concatenation of its parts. In float32, x must have one part, and the result is the sum of six
    products of bfloat16 arrays.

    Raises:
      NotImplementedError: the arrays are float32, and x.shape[0] is not 1.
    """
    if plan.dtype == jnp.float32:
        if plan.x_parts != 1:
            raise NotImplementedError(
                f"in float32, x must have the shape [1, rows, width], got x.shape={x.shape}; use bfloat16 or float16"
            )
        x, w = split(x[0]), split(weight)
        # Now a row of x has six parts, one for each product. So the accumulators of the kernel sum the six products.
        x = jnp.stack([x[i] for i, _ in PRODUCTS])
        weight = jnp.concatenate([w[j] for _, j in PRODUCTS], axis=2 if plan.transposed else 1)
        plan = plan._replace(x_parts=len(PRODUCTS), dtype=jnp.dtype(jnp.bfloat16), out_dtype=plan.dtype)
    return mosaic_product.product(plan, x, source, weight, tasks, target, rows, bias)


def d_weights(left, left_numbers, right, right_numbers, tasks: Tasks):
    """Return the gradients of the weights of all experts, [E, D, parts, F], in the dtype of `left`.

    `mosaic_weights.d_weights` runs the kernel. Its docstring explains the arguments. `right` is [parts, rows, F], where
    `parts` is 2 if `right` has the two halves of a gated hidden layer, else 1. For float32, the result is the sum of
    six products of bfloat16 arrays.
    """
    if left.dtype != jnp.float32:
        return mosaic_weights.d_weights(left, left_numbers, right, right_numbers, tasks)
    lefts, rights = split(left), split(right)

    def add(total, parts):
        left, right = parts
        return total + mosaic_weights.d_weights(left, left_numbers, right, right_numbers, tasks, jnp.float32), None

    parts = jnp.stack([lefts[i] for i, _ in PRODUCTS]), jnp.stack([rights[j] for _, j in PRODUCTS])
    E, D, (P, _, F) = tasks.rows.shape[0], left.shape[1], right.shape
    zeros, *_ = partition.alike(jnp.zeros((E, D, P, F), jnp.float32), left, right, tasks.rows)
    return lax.scan(add, zeros, parts)[0]
