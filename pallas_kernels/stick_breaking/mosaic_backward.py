"""Code that the two backward kernels for Hopper GPUs share: the weights A and the gradients dz of the logits of a tile.

For a query q and a key k, z = scale * <q, k> is the logit, beta = sigmoid(z) is the share that the key breaks off, and
the weight A is beta times the product of 1 - beta over the nearer keys. dO is the cotangent of the output, d_log_rem is
the cotangent of log_rem, and log_rem is the sum of log(1 - beta) over all keys. Then, with dA = dO V^T, a = A * dA
(element by element), and P = d_log_rem + the sum of a over the keys further left:
    dz = (1 - beta) a - beta P,  dq = scale dz K,  dk = scale dz^T Q,  dv = A^T dO.
In the kernel `d_query`, a warpgroup computes 64 query rows and visits the key tiles from left to right, so P is a
running sum. For every query row and half of a key tile, it stores two snapshots: P, and the cumulative log-decay, which
is minus the sum of log2(1 - beta) over the nearer keys. In the kernel `d_key_value`, a block computes 64 keys and reads
the snapshots, so it can take the query tiles in any order. Both kernels compute the weights of a tile again, first for
one half of its keys and then for the other half. Together they have seven matrix products and no atomics.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import mosaic_shims as shims
from .mosaic_tile import KEYS, ROWS, sticks

HALF = KEYS // 2  # the scores of all keys of a tile would not fit the registers next to the sums of the gradients
SWIZZLE = 64  # bytes: the width of half a tile of 16-bit numbers, because a product takes one half


def weights_of(z, seen, entering):
    """Compute the attention weights A of 64 query rows for half of a key tile. Return (A, (log2 beta, log2(1 - beta))).

    The results are [64, keys], in registers. A is beta times the product of 1 - beta over all nearer keys. `z`
    [64, keys] are the logits times log2(e). `seen` is bool [64, keys], True if the query sees the key, or None if every
    query sees every key. `entering` [64] is the cumulative log-decay of each query row before this half: the sum of
    -log2(1 - beta) over all keys on its right. `entering` may also be a function that returns this array. The argument
    of the function is the sum of -log2(1 - beta) over the keys of the half, [64].
    """
    log_beta, softplus = sticks(z, seen)
    start = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), shims.ROW) if callable(entering) else entering
    log_weights, total = shims.minus_sum_right(log_beta, None, softplus, start)
    if callable(entering):
        log_weights -= lax.broadcast_in_dim(entering(total), z.shape, [0])
    return jnp.exp2(log_weights), (log_beta, -softplus)


def d_logits(a, logs, prefix):
    """Return (dz [64, keys], total_a [64]), where dz = (1 - beta) a - beta P are the gradients of the logits.

    All arrays are in registers. `a` [64, keys] is the attention weight times the cotangent of the weight, and total_a
    is the sum of a over the keys. P of a key is the cotangent of log_rem plus the sum of a over all keys further left,
    and `prefix` [64] is P of the leftmost key. `logs` are (log2 of beta, log2 of 1 - beta), each [64, keys]. Both beta
    and 1 - beta are computed from a logarithm, because a difference from 1 would lose precision.
    """
    beta, rest = (jnp.exp2(x) for x in logs)
    return shims.minus_sum_left(rest * a, beta, a, prefix)
