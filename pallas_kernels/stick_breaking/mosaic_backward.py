"""The backward pass on Hopper GPUs (Pallas Mosaic GPU): two kernels, seven products, no atomics.

With dA = dO V^T, a = A dA and P = d_log_rem + the sum of a over the keys further left,
    dz = (1 - beta) a - beta P,  dq = scale dz K,  dk = scale dz^T Q,  dv = A^T dO.
`d_query` owns 64 rows per warpgroup and walks the key tiles from the left, which makes P a running sum; it leaves, for
every pair of tiles, the stick on entry and P (`snapshots`). `d_key_value` owns 64 keys and reads them in any order.
Here is what both share: they recompute the weights of a tile half by half.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import mosaic_shims as shims
from .mosaic_tile import KEYS, ROWS, sticks

HALF = KEYS // 2  # a whole tile would not fit the registers next to the sums
SWIZZLE = 64  # bytes: as wide as a half, along which tiles are multiplied


def weights_of(z, seen, entering):
    """(A, the logarithms of beta and 1 - beta) of logits z in units of log2.

    `entering`: the cumulative log-decay of the rows before the tile. It may be a function that takes the log-decay over
    this tile and returns the log-decay before it.
    """
    log_beta, softplus = sticks(z, seen)
    start = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), shims.ROW) if callable(entering) else entering
    log_weights, total = shims.minus_sum_right(log_beta, None, softplus, start)
    if callable(entering):
        log_weights -= lax.broadcast_in_dim(entering(total), z.shape, [0])
    return jnp.exp2(log_weights), (log_beta, -softplus)


def d_logits(a, logs, prefix):
    """(dz, the sum of a): neither beta nor 1 - beta is one minus the other."""
    beta, rest = (jnp.exp2(x) for x in logs)
    return shims.minus_sum_left(rest * a, beta, a, prefix)
