"""What the three kernels for Hopper GPUs share: sizes, masks, and the arithmetic of one tile in registers.

All logarithms are base 2. What a row has spent of its stick is carried as a positive number in two floats (`two_sum`),
so that the backward pass can walk back without losing the small ones.
"""

from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import seam
from ..cost import visible_scores
from .logarithm import LOG2P1, NOTHING

ROWS = 64  # query rows of a warpgroup
KEYS = 64  # of a tile
FINISHED = 1e30  # more than any row spends


class Plan(NamedTuple):
    """Static sizes of a call of the kernel."""

    B: int
    rows: int  # query rows of a head: T, or T * G where a group's heads are packed (decoding)
    S: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: jnp.dtype
    stages: int  # key tiles in shared memory
    warpgroups: int  # that compute
    attend_current: bool
    window: int | None
    skip_below: float | None
    segments: bool
    per_position: int = 1  # query rows at one position
    splits: int = 1  # of the keys, each a batch entry of the spans and of the results
    out_dtype: jnp.dtype | None = None

    @property
    def scores(self) -> int:
        """Products of a query and a key within the mask, for queries at the end of the keys."""
        rows, window = self.rows // self.per_position, self.window
        scores = visible_scores(rows, self.S, attend_current=self.attend_current, window=window)
        return self.B * self.N * self.per_position * scores

    @property
    def tiles(self) -> int:
        """Blocks along the query rows."""
        return -(-self.rows // (ROWS * self.warpgroups))

    @property
    def padded(self) -> int:
        """Query rows of all blocks."""
        return self.tiles * ROWS * self.warpgroups

    row_tile, key_tile = ROWS, KEYS


def tile_memory(shape, dtype, swizzle: int = 128):
    """Shared memory for tiles [.., rows, width], swizzled by so many bytes: alike in both operands of a product."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(swizzle, shape[-1] * size)
    tiling = plgpu.TilingTransform((8, swizzle // size))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def sticks(z, seen=None):
    """(log2 of beta, -log2 of 1 - beta) of logits in units of log2; a key that is not seen breaks nothing off."""
    if seen is not None:
        z = jnp.where(seen, z, NOTHING)
    y = seam.exp2_of_minus_abs(z)
    poly = jnp.full_like(z, LOG2P1[0])
    for c in LOG2P1[1:]:
        poly = poly * y + c
    softplus = jnp.maximum(z, 0) + y * poly
    return z - softplus, softplus


def two_sum(high, low, x):
    """high + low + x, with the rounding error of the sum kept in the low part."""
    total = high + x
    rest = total - high
    return total, low + ((high - (total - rest)) + (x - rest))


def visible(plan: Plan, segments, b, first_row, first_column, columns, offset):
    """bool [64, columns] in registers; `segments`: references to the ids of queries and of keys, if there are any."""
    shape = (ROWS, columns)
    row = first_row + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=seam.TILE)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=seam.TILE)
    # The last and the first column that a row sees, in columns of the tile: one comparison each for an element.
    position = offset + (row // plan.per_position if plan.per_position > 1 else row)
    last = jnp.minimum(position if plan.attend_current else position - 1, plan.S - 1) - first_column
    seen = column <= last
    if plan.window is not None:
        seen &= column >= position - plan.window - first_column
    if plan.segments:
        queries, keys = segments
        q = plgpu.load(queries.at[b, pl.ds(first_row, ROWS)], layout=seam.ROW)
        k = plgpu.load(keys.at[b, pl.ds(first_column, columns)], layout=seam.COLUMN)
        q = lax.broadcast_in_dim(q, shape, [0])
        seen &= (q == lax.broadcast_in_dim(k, shape, [1])) & (q >= 0)
    return seen


def finished_padding(plan: Plan, segments, b, first_row):
    """What each of 64 rows has spent of its stick at the start, in registers: 0, or FINISHED for a padding row.

    A padding row, after the last query or in a negative segment, may see no key. The early exit would wait for it.
    """
    real = first_row + seam.row_numbers() < plan.rows
    if plan.segments:
        real &= plgpu.load(segments[0].at[b, pl.ds(first_row, ROWS)], layout=seam.ROW) >= 0
    return jnp.where(real, 0.0, FINISHED)


def block(plan: Plan):
    """(entry, query head, query tile) of this block: heavy tiles first, few heads at a time to share the cache."""
    heads = plan.B * plan.splits * plan.N
    together = max(1, 16 * 2**20 // max(1, plan.S * (plan.H + plan.Hv) * jnp.dtype(plan.dtype).itemsize))
    together = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= together)
    i = lax.axis_index("block")
    group, i = i // (together * plan.tiles), i % (together * plan.tiles)
    head = group * together + i % together
    return head // plan.N, head % plan.N, plan.tiles - 1 - i // together


def visited(bound, warpgroups: int):
    """(stop, start) of the key tiles that some warpgroup of a block visits; `bound(w, which)` is from the table."""
    if warpgroups == 1:
        return bound(0, 0), bound(0, 3)
    (stop, start), (other_stop, other_start) = ((bound(w, 0), bound(w, 3)) for w in range(2))
    both = jnp.minimum(start, other_start)
    # An empty span starts and stops at 0.
    start = jnp.where(stop == 0, other_start, jnp.where(other_stop == 0, start, both))
    return jnp.maximum(stop, other_stop), start
