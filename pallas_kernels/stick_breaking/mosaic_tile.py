"""Code that the three attention kernels for Hopper GPUs share: sizes, masks, and the arithmetic of one tile.

A logit is scale * <q, k>, and beta = sigmoid(logit) is the share that a key breaks off the part of the stick that
remains. All logarithms are base 2. So the code uses z = logit * log2(e), and beta = 1 / (1 + 2^-z).

The cumulative log-decay of a query row is the sum of -log2(1 - beta) over the keys from the query to some key on its
left. It is a positive number: -log2 of the part of the stick that remains after these keys. It is stored as the sum of
two floats (`two_sum`), because the backward pass subtracts the terms that the forward pass added, and must not lose
small terms.
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

ROWS = 64  # query rows of a query tile; one warpgroup computes one query tile
KEYS = 64  # keys of a key tile
FINISHED = 1e30  # the cumulative log-decay of a query row that needs no keys; in all other rows it is smaller


@dataclass(frozen=True, kw_only=True)
class Plan(kernels.Plan):
    """The sizes of one call of an attention kernel for Hopper GPUs. They are constants in the compiled kernel.

    The kernels `forward` and `d_query` have `stages` key tiles in shared memory at the same time, and `warpgroups`
    warpgroups that compute. The kernel `d_key_value` has its own numbers of stages and warpgroups.
    """

    stages: int  # number of key tiles that are in shared memory at the same time
    warpgroups: int  # number of warpgroups of a block that compute; one more warpgroup copies
    row_tile: int = ROWS
    key_tile: int = KEYS

    @property
    def block_rows(self) -> int:
        return self.row_tile * self.warpgroups


class Assignment(NamedTuple):
    """What one warpgroup computes in the kernel `forward` or `d_query`, as indices.

    The warpgroup computes query tile i * W + wg of head n in batch entry b. W is the number of computing warpgroups of
    the block. The block reads the key tiles start..stop-1 of the key head `head`.

    In decoding, the keys of a batch entry may be split into parts. Then each part has its own blocks, and `entry` is
    one number for part p and batch entry b: p * B + b. B is the number of batch entries. If the keys are not split,
    `entry` equals b.
    """

    entry: jax.Array  # (index of the part of the keys) * B + b; equals b if the keys are not split
    b: jax.Array  # batch entry
    n: jax.Array  # query head; in decoding, key head
    head: jax.Array  # key head
    i: jax.Array  # index of the block among the blocks of head n
    wg: jax.Array  # index of the warpgroup in the block
    stop: jax.Array  # the block visits the key tiles start..stop-1
    start: jax.Array


def tile_memory(shape, dtype, swizzle: int = 128):
    """Declare an array of shape `shape`, [.., rows, width], in shared memory, in the layout that tensor cores read.

    The layout permutes the elements of the array in a repeating pattern. `swizzle` is the width of the pattern in
    bytes. In an array with narrower rows, the pattern is as wide as a row. The two operands of a matrix product need
    patterns of the same width.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = min(swizzle, shape[-1] * size)
    tiling = plgpu.TilingTransform((8, swizzle // size))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def sticks(z, seen=None):
    """Return (log2(beta), -log2(1 - beta)), each [64, keys] in registers, where beta = 1 / (1 + 2^-z).

    `z` [64, keys] are the logits times log2(e). beta is the share of the remaining stick that a key breaks off. `seen`
    is bool [64, keys], True if the query sees the key, or None if every query sees every key. If a query does not see a
    key, beta is 0.
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
    """Add x to a number that is stored as the sum of two floats, high + low. Return the new pair (high, low).

    The new `high` is high + x, rounded. The new `low` is low plus the error of this rounding.
    """
    total = high + x
    rest = total - high
    return total, low + ((high - (total - rest)) + (x - rest))


def zeros(step, opaque: bool):
    """Return two integers 0, one for each half of a key tile. If `opaque`, the compiler cannot know that they are 0.

    The kernel adds an opaque zero to the index of an operand, to save registers. A product needs descriptors of its
    operands in shared memory, one for every 16 columns. If an operand is the same in every iteration of a loop, the
    compiler keeps all its descriptors in registers. With an opaque zero, the compiler cannot know that the operand is
    the same. So the descriptors are computed again in each iteration, in uniform registers.

    `step` is the index of the iteration. The opaque zeros are `step` shifted right by 24 and by 25 bits, so `step` must
    be below 2^24.
    """
    return [lax.shift_right_logical(step, 24 + half) if opaque else jnp.int32(0) for half in range(2)]


def visible(plan: Plan, segments, b, first_row, first_column, columns, offset):
    """Return whether each of 64 query rows sees each of `columns` keys: bool [64, columns] in registers.

    `first_row` is the index of the first query row, `first_column` is the index of the first key, and b is the index of
    the batch entry. `segments` are references to two arrays in global memory, the segment ids of the queries and of the
    keys, or None if the call has no segments. `offset` is the position of the first query among the keys.
    """
    shape = (ROWS, columns)
    # `broadcasted_iota` keeps the row numbers in registers from one tile to the next. With segments, no registers are
    # free for them. `row_numbers` computes them again for every tile.
    rows = shims.row_numbers() if plan.segments else plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=shims.ROW)
    row = first_row + rows
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=shims.TILE)
    # All column numbers count from the first key of the tile: `column`, and the last and the first column that a row
    # sees. So each of these two limits takes one comparison.
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
    """Return the start values of the cumulative log-decay of 64 query rows, fp32 [64]: 1e30 for padding, else 0.

    The cumulative log-decay of a row is -log2 of the part of its stick that remains: 0 before the first key, and a
    positive number that grows with every key. With `skip_below`, a negative number, a warpgroup stops when the
    log-decay of all its rows is above -skip_below. A padding row is a row after the last query, or with a negative
    segment id. The mask can hide all keys from it, so its log-decay might never exceed -skip_below. Therefore it starts
    at 1e30 (FINISHED), and no warpgroup goes on because of a padding row.

    b is the index of the batch entry, and `first_row` is the index of the first of the 64 rows. `segments` is a pair of
    references to the segment ids of the queries and of the keys, in global memory, or None without segments.
    """
    is_query = first_row + shims.row_numbers() < plan.rows
    if plan.segments:
        queries, _ = segments
        is_query &= plgpu.load(queries.at[b, pl.ds(first_row, ROWS)], layout=shims.ROW, optimized=False) >= 0
    return jnp.where(is_query, 0.0, FINISHED)


def block(plan: Plan):
    """Return three indices (entry, head, i), which say what this thread block computes.

    The block computes the i-th query tile of the head or, with two computing warpgroups, the i-th pair of query tiles.
    A head is a query head or, in decoding, a key head. `entry` is the index of the batch entry. But if decoding splits
    the keys into parts, it is one number for part p and batch entry b: p * B + b.

    The GPU starts the blocks in the order of their indices on the axis "block". The first blocks compute all query
    tiles of the first `plan.heads_together` heads, the next blocks compute the next group of heads, and so on. The keys
    and values of a group fit into the cache. But if one head is too large for the cache, each head is a group. Within a
    group, the last query tiles of every head come first, because the last queries see the most keys.
    """
    together = plan.heads_together
    i = lax.axis_index("block")
    group, i = i // (together * plan.tiles), i % (together * plan.tiles)
    head = group * together + i % together
    return head // plan.N, head % plan.N, plan.tiles - 1 - i // together


def visited(bound, warpgroups: int):
    """Return (stop, start): the key tiles start..stop-1 include the key tiles of all warpgroups of a block.

    `warpgroups` is the number of computing warpgroups of the block, 1 or 2. Warpgroup w has a key-tile range. The
    function `bound(w, which)` returns the stop of this range if `which` is 0, and the start if `which` is 3.
    """
    if warpgroups == 1:
        return bound(0, 0), bound(0, 3)
    (stop, start), (other_stop, other_start) = ((bound(w, 0), bound(w, 3)) for w in range(2))
    both = jnp.minimum(start, other_start)
    # An empty range starts and stops at 0.
    start = jnp.where(stop == 0, other_start, jnp.where(other_stop == 0, start, both))
    return jnp.maximum(stop, other_stop), start
