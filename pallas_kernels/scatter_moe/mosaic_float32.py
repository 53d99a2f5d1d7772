"""Matrix products of float32 arrays on Hopper GPUs, each computed as six products of bfloat16 arrays.

A float32 number has 24 significant bits, a bfloat16 number has 8. So x is the sum of three bfloat16 parts,
x = x_0 + x_1 + x_2, where each part is at most about 2^-8 of the part before it. The same holds for w. Of the nine
products of parts, the six largest are summed. The other three are left out, since they are only about 2^-24 of x w:

    x w = x_0 w_0 + (x_0 w_1 + x_1 w_0) + (x_0 w_2 + x_1 w_1 + x_2 w_0)

Tensor cores can also round float32 numbers to tf32 and multiply them. But tf32 has a relative error of 2^-11, and needs
operands that are contiguous in memory along the axis that is summed. In the gradient of a weight, neither operand is
contiguous along that axis.
"""

import jax.numpy as jnp
from jax import lax

from .. import partition
from . import mosaic_product, mosaic_weights
from .mosaic_product import Plan
from .tasks import Tasks

# (part of x, part of w) of the six products. The smallest products come first: added to a large sum, they would lose
# their last bits.
PRODUCTS = (1, 1), (0, 2), (2, 0), (0, 1), (1, 0), (0, 0)


def split(x):
    """Split the float32 array x into three bfloat16 arrays, the largest first, whose sum is x up to rounding.

    For infinity and NaN, the second and third arrays are zero. `lax.reduce_precision` rounds x to bfloat16, because XLA
    removes a conversion to bfloat16 and back.
    """
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        x = jnp.where(jnp.isfinite(part), x - part, 0)
        parts.append(part.astype(jnp.bfloat16))
    return parts


def product(plan: Plan, x, source, weight, tasks: Tasks, target, rows: int, bias=None):
    """Multiply rows of x by the weights of their experts, in bfloat16, float16 or float32.

    Return `out` [rows, columns]: for row i of the tiles in `tasks`, whose expert is e,
    out[target[i]] = x[source[i]] @ weight[e] + bias[e]. `mosaic_product.product` has the same
    arguments, and runs the kernel. For float32, the result is the sum of six products of bfloat16 arrays.
    """
    if plan.dtype == jnp.float32:
        if plan.x_parts != 1:
            raise NotImplementedError(f"in float32, x must be [1, rows, width], got x [{plan.x_parts}, rows, width]")
        x, w = split(x[0]), split(weight)
        # The kernel computes one product of rows that are six times as long. So its accumulators sum the six products.
        x = jnp.stack([x[i] for i, _ in PRODUCTS])
        weight = jnp.concatenate([w[j] for _, j in PRODUCTS], axis=2 if plan.transposed else 1)
        plan = plan._replace(x_parts=len(PRODUCTS), dtype=jnp.dtype(jnp.bfloat16), out_dtype=plan.dtype)
    return mosaic_product.product(plan, x, source, weight, tasks, target, rows, bias)


def d_weights(left, left_numbers, right, right_numbers, tasks: Tasks):
    """Return the gradients of the weights of all experts, in bfloat16, float16 or float32.

    The arguments and the result are those of `mosaic_weights.d_weights`, which runs the kernel. For float32, the result
    is the sum of six products of bfloat16 arrays.
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
