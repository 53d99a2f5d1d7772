"""Code that the two backward kernels for Hopper GPUs share: the weights A and the gradients dz of the logits of a tile.

For a query q and a key k, z = scale * <q, k> is the logit, and beta = sigmoid(z) is the share of the remaining stick
that the key breaks off. The weight A of a key is its beta, times the product of 1 - beta over all keys on the right of
this key. dO is the cotangent of the output, and d_log_rem is the cotangent of log_rem, the sum of log(1 - beta) over
all keys. The gradients are
    dA = dO @ V^T,  a = A * dA (element by element),  P = d_log_rem + the sum of `a` over the keys further left,
    dz = (1 - beta) * a - beta * P,  dq = scale * dz @ K,  dk = scale * dz^T @ Q,  dv = A^T @ dO.

In the kernel `d_query`, a warpgroup computes 64 query rows and visits the key tiles from left to right, so P is a
running sum. For every query row and half of a key tile, the warpgroup stores two numbers, the snapshots:
- the sum of -log2(1 - beta) over all keys on the right of the half;
- P of the leftmost key of the half.
In the kernel `d_key_value`, a block computes the gradients of 64 keys. The block reads the snapshots, so it can visit
the query tiles in any order. In both kernels, a warpgroup computes the weights of a tile again, for half of its keys at
a time. Together, the two kernels have seven matrix products and no atomics.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import mosaic_shims as shims
from .mosaic_tile import KEYS, ROWS, sticks

HALF = KEYS // 2  # keys of half a tile: the scores of a whole tile and a sum of gradients do not fit into registers
SWIZZLE = 64  # bytes of 32 numbers of 16 bits: the kernels work on half of the keys of a tile at a time


def weights_of(z, seen, entering):
    """Compute the attention weights A of 64 query rows for half of a key tile. Return (A, (log2 beta, log2(1 - beta))).

    The results are [64, keys], in registers. The weight of a key is its beta, times the product of 1 - beta over all
    keys on the right of this key. `z` [64, keys] are the logits times log2(e). `seen` is bool [64, keys], True if the
    query sees the key, or None if every query sees every key.

    `entering` [64] is the sum of -log2(1 - beta) over all keys on the right of this half, for each query row. The
    kernel `d_query` visits the keys from left to right, so it knows this sum only when it knows the sum over the keys
    of the half. Therefore it passes a function, which takes the sum over the half [64] and returns the sum over the
    keys on the right [64].
    """
    log_beta, softplus = sticks(z, seen)
    start = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), shims.ROW) if callable(entering) else entering
    log_weights, total = shims.minus_sum_right(log_beta, None, softplus, start)
    if callable(entering):
        log_weights -= lax.broadcast_in_dim(entering(total), z.shape, [0])
    return jnp.exp2(log_weights), (log_beta, -softplus)


def d_logits(a, logs, prefix):
    """Return (dz [64, keys], total_a [64]), where dz = (1 - beta) * a - beta * P are the gradients of the logits.

    All arrays are in registers. `a` [64, keys] is the attention weight times the cotangent of the weight, and total_a
    is the sum of each row of `a`. P of a key is the cotangent of log_rem plus the sum of `a` over all keys further
    left. `prefix` [64] is P of the leftmost of these keys. `logs` are (log2(beta), log2(1 - beta)), each [64, keys].
    Both beta and 1 - beta are computed from their logarithms, because the subtraction 1 - beta would lose precision.
    """
    beta, rest = (jnp.exp2(x) for x in logs)
    return shims.minus_sum_left(rest * a, beta, a, prefix)
