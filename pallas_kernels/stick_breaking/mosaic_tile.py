"""Code that the three kernels for Hopper GPUs share: sizes, masks, and the arithmetic of one tile in registers.

All logarithms are base 2. The cumulative log-decay of a query row is -log2 of the stick left, a positive number, kept
as the sum of two floats (`two_sum`). The backward pass subtracts the terms that the forward pass added, and it must not
lose small terms.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import mosaic_shims as shims
from . import kernels
from .logarithm import LOG2P1, NOTHING

ROWS = 64  # query rows of a warpgroup
KEYS = 64  # keys of a tile
FINISHED = 1e30  # the log-decay of a row that needs no key; all other rows have a smaller one


@dataclass(frozen=True, kw_only=True)
class Plan(kernels.Plan):
    """The static sizes of one call of an attention kernel for Hopper GPUs."""

    stages: int  # key tiles in shared memory
    warpgroups: int  # warpgroups of a block that compute; one more copies
    row_tile: int = ROWS
    key_tile: int = KEYS

    @property
    def block_rows(self) -> int:
        return self.row_tile * self.warpgroups


class Assignment(NamedTuple):
    """The rows that a warpgroup of `forward` or `d_query` computes, and the key tiles that its block visits."""

    entry: jax.Array  # batch entry and split, below B * splits
    b: jax.Array  # batch entry
    n: jax.Array  # query head
    head: jax.Array  # key head
    i: jax.Array  # query tile of the block
    wg: jax.Array  # warpgroup
    stop: jax.Array  # some warpgroup of the block visits the key tiles start..stop-1
    start: jax.Array


def tile_memory(shape, dtype, swizzle: int = 128):
    """Return the declaration of shared memory of this `shape`, [.., rows, width], whose tiles tensor cores read.

    `swizzle`: the width of the swizzle in bytes. It is limited to the width of a row. Both operands of a product need
    a swizzle of the same width.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = min(swizzle, shape[-1] * size)
    tiling = plgpu.TilingTransform((8, swizzle // size))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def sticks(z, seen=None):
    """Return (log2 of beta, -log2 of 1 - beta), each of the shape of z, where beta = 1 / (1 + 2^-z).

    z [64, keys] are the logits times log2(e). `seen` is bool [64, keys], or None if every query sees every key. beta is
    0 for a key that the query does not see.
    """
    if seen is not None:
        z = jnp.where(seen, z, NOTHING)
    y = shims.exp2_of_minus_abs(z)
    poly = jnp.full_like(z, LOG2P1[0])
    for c in LOG2P1[1:]:
        poly = poly * y + c
    softplus = jnp.maximum(z, 0) + y * poly
    return z - softplus, softplus


def two_sum(high, low, x):
    """Return two floats whose sum is high + low + x. The second one takes the rounding error of the first one."""
    total = high + x
    rest = total - high
    return total, low + ((high - (total - rest)) + (x - rest))


def zeros(step, opaque: bool):
    """Return two integers 0, one for each half of a key tile. If `opaque`, the compiler cannot know their values.

    They are computed from `step`, the number of an iteration, which must be below 2^24. A product that reads the same
    memory in every iteration needs the same descriptors, one for every 16 columns. The compiler would keep all
    descriptors in registers, from half to half and from iteration to iteration. An opaque zero that is added to the
    index makes the compiler compute them again, in uniform registers.
    """
    return [lax.shift_right_logical(step, 24 + half) if opaque else jnp.int32(0) for half in range(2)]


def visible(plan: Plan, segments, b, first_row, first_column, columns, offset):
    """Return which keys each of 64 query rows sees: bool [64, columns] in registers.

    The query rows begin at `first_row` of a head, and the keys begin at `first_column`. b is the batch entry.
    `segments`: references (ids of the queries, ids of the keys), or None if the plan has no segments. `offset`: the
    position of the first query among the keys.
    """
    shape = (ROWS, columns)
    # The row numbers stay in registers from one tile to the next, unless the document ids need these registers.
    rows = shims.row_numbers() if plan.segments else plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=shims.ROW)
    row = first_row + rows
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=shims.TILE)
    # The last and the first column that a row sees count from the start of the tile, so each costs one comparison.
    position = offset + (row // plan.per_position if plan.per_position > 1 else row)
    last = jnp.minimum(position if plan.attend_current else position - 1, plan.S - 1) - first_column
    if plan.segments:
        queries, keys = segments
        q = plgpu.load(queries.at[b, pl.ds(first_row, ROWS)], layout=shims.ROW, optimized=False)
        last = jnp.where(q >= 0, last, -1)
    seen = column <= lax.broadcast_in_dim(last, shape, [0])
    if plan.window is not None:
        seen &= column >= lax.broadcast_in_dim(position - plan.window - first_column, shape, [0])
    if plan.segments:
        k = plgpu.load(keys.at[b, pl.ds(first_column, columns)], layout=shims.COLUMN, optimized=False)
        seen &= lax.broadcast_in_dim(q, shape, [0]) == lax.broadcast_in_dim(k, shape, [1])
    return seen


def finished_padding(plan: Plan, segments, b, first_row):
    """Return the log-decay with which each of 64 query rows starts, fp32 [64] in registers: 0, or FINISHED for padding.

    A padding row is after the last query or has a negative segment id. It may see no key. Then a log-decay of 0 would
    stay 0, and a block with `skip_below` could not stop early, because it stops only when no row needs more keys.
    """
    is_query = first_row + shims.row_numbers() < plan.rows
    if plan.segments:
        queries, _ = segments
        is_query &= plgpu.load(queries.at[b, pl.ds(first_row, ROWS)], layout=shims.ROW, optimized=False) >= 0
    return jnp.where(is_query, 0.0, FINISHED)


def block(plan: Plan):
    """Return (batch entry and split, query head, query tile) that this block computes, from the number of the block.

    Query tiles with the most keys come first. Blocks that run at the same time compute few heads, whose keys and values
    fit into the cache.
    """
    together = plan.heads_together
    i = lax.axis_index("block")
    group, i = i // (together * plan.tiles), i % (together * plan.tiles)
    head = group * together + i % together
    return head // plan.N, head % plan.N, plan.tiles - 1 - i // together


def visited(bound, warpgroups: int):
    """Return (stop, start): at least one warpgroup of a block visits the key tiles start..stop-1.

    `bound(w, which)` returns entry `which` of the key-tile range of warpgroup w: 0 is its stop, 3 is its start.
    """
    if warpgroups == 1:
        return bound(0, 0), bound(0, 3)
    (stop, start), (other_stop, other_start) = ((bound(w, 0), bound(w, 3)) for w in range(2))
    both = jnp.minimum(start, other_start)
    # An empty range starts and stops at 0.
    start = jnp.where(stop == 0, other_start, jnp.where(other_stop == 0, start, both))
    return jnp.maximum(stop, other_stop), start
