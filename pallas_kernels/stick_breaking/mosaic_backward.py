"""The backward pass on Hopper GPUs (Pallas Mosaic GPU): two kernels, seven products, no atomics.

With the weights A, the cotangent dO of the output, dA = dO V^T, a = A dA (element by element) and P = d_log_rem + the
sum of a over the keys further left,
    dz = (1 - beta) a - beta P,  dq = scale dz K,  dk = scale dz^T Q,  dv = A^T dO.
A warpgroup of `d_query` owns 64 query rows and visits the key tiles from the left, so P is a running sum. For every
pair of a query tile and a key tile, it stores the snapshots of the rows: P, and the cumulative log-decay with which the
forward pass entered the tile. A block of `d_key_value` owns 64 keys and reads the snapshots in any order. This file has
the code that both kernels share: they compute the weights of a tile again, one half of its keys after the other.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import mosaic_shims as shims
from .mosaic_tile import KEYS, ROWS, sticks

HALF = KEYS // 2  # a whole tile would not fit the registers next to the sums
SWIZZLE = 64  # bytes: the width of half a tile, because a product takes one half


def weights_of(z, seen, entering):
    """Return (A, (log2 of beta, log2 of 1 - beta)), each [64, keys], for logits z [64, keys] times log2(e).

    `seen` is bool [64, keys], or None if every query sees every key. `entering` [64] is the cumulative log-decay with
    which each row enters these keys from the right. It may also be a function that takes the log-decay over these keys
    [64] and returns the cumulative log-decay on entry.
    """
    log_beta, softplus = sticks(z, seen)
    start = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), shims.ROW) if callable(entering) else entering
    log_weights, total = shims.minus_sum_right(log_beta, None, softplus, start)
    if callable(entering):
        log_weights -= lax.broadcast_in_dim(entering(total), z.shape, [0])
    return jnp.exp2(log_weights), (log_beta, -softplus)


def d_logits(a, logs, prefix):
    """Return (dz [64, keys], the sum of a over these keys [64]), with the formula of the module.

    `a` is [64, keys]. `logs` are (log2 of beta, log2 of 1 - beta). `prefix` [64] is P of the rows at the leftmost of
    these keys. beta and 1 - beta each come from a logarithm. To compute one as 1 minus the other would lose precision.
    """
    beta, rest = (jnp.exp2(x) for x in logs)
    return shims.minus_sum_left(rest * a, beta, a, prefix)
