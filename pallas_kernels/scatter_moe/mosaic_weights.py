"""The kernel for the gradients of expert weights on Hopper GPUs (Pallas Mosaic GPU).

The gradient of the weight of expert e is the sum of left[r]^T @ right[r] over the rows r of the expert: `left` has the
inputs of the matrix product, and `right` has the cotangents of its results. The kernel copies the rows of `left` and
`right` by their row numbers, so neither array is transposed or padded in memory. Empty rows are copied as zeros. The
gradient of an expert without rows is zero.

The gradients are cut into pieces of 128 x 256 elements. A block computes one piece after the other. Each of the two
multiplying warpgroups computes 64 x 256 elements of a piece. One step of a piece multiplies 64 rows of `left` and
`right`. The operands of a step are in one of STAGES pipeline stages in shared memory (`mosaic_row_pipeline`). A third
warpgroup copies them. The pieces of the experts with the most rows are computed first, which balances the work of the
blocks. docs/design/expert_kernels.md explains the barriers.

`right` is [parts, rows, F], and the result is [E, D, parts, F]. There are two parts if `right` has the two halves of a
gated hidden layer, else one part.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import mosaic_pipeline
from .. import mosaic_row_copies as row_copies
from ..mosaic_pipeline import Ring
from . import mosaic_row_pipeline as pipeline
from .mosaic_row_pipeline import STAGES, memory
from .tasks import Tasks

ROWS = 64  # rows of `left` and `right` in one step
WARPGROUPS = 2  # multiplying warpgroups of a block
LEFT = 64  # columns of `left` that one warpgroup multiplies
RIGHT = 128  # columns of `right` for one accumulator
ACCUMULATORS = 2  # accumulators of a multiplying warpgroup


class Scratch(NamedTuple):
    """The shared memory and the barriers of a block.

    `left` and `right` have the operands of STAGES steps. Each multiplying warpgroup writes columns of the gradient to
    `out`, and the copy engine copies them from there to global memory.
    """

    left: Any  # [STAGES, WARPGROUPS, ROWS, LEFT]
    right: Any  # [STAGES, ACCUMULATORS, ROWS, RIGHT]
    out: Any  # [WARPGROUPS, LEFT, columns of the gradient that are copied at the same time: 128, or 64 in fp32]
    ring: Ring


class Operands(NamedTuple):
    """References to the arrays in global memory that the kernel reads.

    The rows of every expert are cut into tiles of M rows. Row i of the tiles is row `left_numbers[i]` of `left` and row
    `right_numbers[i]` of `right`. If row i of the tiles is empty, both numbers are -1.
    """

    left: Any  # [rows of left, D]
    left_numbers: Any  # [tiles * M]
    right: Any  # [parts, rows of right, F]
    right_numbers: Any  # [tiles * M]
    heavy_first: Any  # [E]: the experts, sorted by their number of rows, the largest first
    first: Any  # [E]: the first tile of every expert
    rows: Any  # [E]: the number of rows of every expert


class Piece(NamedTuple):
    """128 x 256 elements of the gradient of one expert's weight. A block computes one such piece after the other."""

    expert: jax.Array
    row: jax.Array  # the first row of the piece, counted over the D rows of the gradient
    part: jax.Array  # the part of `right`
    column: jax.Array  # the first column of the piece, counted over the F columns of the part
    steps: jax.Array  # the number of steps; each step multiplies 64 rows of the expert


def d_weights(left, left_numbers, right, right_numbers, tasks: Tasks, out_dtype=None):
    """Compute the gradients of the weights of all experts. Return an array [E, D, parts, F].

    `left` is [rows of left, D], and `right` is [parts, rows of right, F]. There are two parts if `right` has the halves
    of a gated hidden layer, else one part. For expert e and part p, the gradient [D, F] is

      sum_i left[left_numbers[i]]^T @ right[p, right_numbers[i]].

    The tiles in `tasks` have M rows each, and every tile belongs to one expert. The sum is over the rows i of all tiles
    of expert e. An empty row has the row index -1 in `left_numbers` and `right_numbers`, and adds nothing. The dtype of
    the result is `out_dtype`, or the dtype of `left` if `out_dtype` is None.
    """
    (_, D), (P, _, F), E = left.shape, right.shape, tasks.rows.shape[0]
    dtype, out_dtype = left.dtype, jnp.dtype(out_dtype or left.dtype)
    down, across = -(-D // (LEFT * WARPGROUPS)), -(-F // (RIGHT * ACCUMULATORS))
    heavy_first = jnp.argsort(-tasks.rows, stable=True).astype(jnp.int32)
    per_expert = down * P * across
    blocks = pipeline.blocks(E * per_expert)

    def kernel(operands: Operands, out_ref, scratch: Scratch):
        wg = lax.axis_index("wg")

        def for_each_piece(body, state):
            def one(_, number, state):
                e, rest = operands.heavy_first[number // per_expert], number % per_expert
                row, part, column = rest // (P * across), rest // across % P, rest % across
                row, column = row * LEFT * WARPGROUPS, column * RIGHT * ACCUMULATORS
                return body(Piece(e, row, part, column, -(-operands.rows[e] // ROWS)), state)

            return pipeline.every(blocks, E * per_expert, one, state)

        pl.when(wg == WARPGROUPS)(partial(_copy, tasks.rows_of_tile, operands, scratch, for_each_piece))
        pl.when(wg < WARPGROUPS)(partial(_multiply, wg, out_ref, scratch, for_each_piece))

    run = mosaic_pipeline.run(
        kernel,
        name="expert_d_weights",
        flops=2 * tasks.num_pairs * D * P * F,
        blocks=blocks,
        warpgroups=WARPGROUPS + 1,
        out_type=jax.ShapeDtypeStruct((E, D, P, F), out_dtype),
        scratch=(
            Scratch(
                left=memory((STAGES, WARPGROUPS, ROWS, LEFT), dtype),
                right=memory((STAGES, ACCUMULATORS, ROWS, RIGHT), dtype),
                out=memory((WARPGROUPS, LEFT, RIGHT * 2 // out_dtype.itemsize), out_dtype),
                ring=pipeline.ring(warpgroups=WARPGROUPS),
            ),
        ),
    )
    return run(Operands(left, left_numbers, right, right_numbers, heavy_first, tasks.first, tasks.rows))


def _copy(rows_of_tile: int, operands: Operands, scratch: Scratch, for_each_piece: Callable) -> None:
    """Copy rows of `left` and `right` from global to shared memory. The copying warpgroup runs this.

    Each step copies 64 rows of an expert to a stage of `scratch`. `rows_of_tile` is M, the number of rows of a tile in
    `tasks`. `for_each_piece(body, state)` calls `state = body(piece, state)` for each `Piece` that this block computes.
    """

    def copy_piece(piece: Piece, sent):
        def load(s, stage):
            numbers = pl.ds(operands.first[piece.expert] * rows_of_tile + s * ROWS, ROWS)
            for w in range(WARPGROUPS):
                rows = operands.left_numbers.at[numbers]
                row_copies.gather(operands.left, rows, piece.row + w * LEFT, scratch.left.at[stage, w])
            for p in range(ACCUMULATORS):
                rows, right = operands.right_numbers.at[numbers], operands.right.at[piece.part]
                row_copies.gather(right, rows, piece.column + p * RIGHT, scratch.right.at[stage, p])

        return pipeline.send(scratch.ring, piece.steps, load, sent)

    pipeline.hand_over(scratch.ring, for_each_piece(copy_piece, pipeline.nothing_sent()))


def _multiply(wg, out_ref, scratch: Scratch, for_each_piece: Callable) -> None:
    """Compute 64 of the 128 rows of every piece of the gradients. The multiplying warpgroup `wg` runs this.

    The 64 rows of a piece belong to 64 columns of `left`. The warpgroup writes these rows to `out_ref`, the result
    [E, D, parts, F] in global memory. `for_each_piece(body, state)` calls `state = body(piece, state)` for each `Piece`
    that this block computes.
    """
    at_once = scratch.out.shape[2]  # columns that are copied to global memory at the same time

    def multiply_piece(piece: Piece, step):
        def multiply(stage, accumulators):
            for p, acc in enumerate(accumulators):
                left_tile = scratch.left.at[stage, wg].transpose((1, 0))
                plgpu.wgmma(acc, left_tile, scratch.right.at[stage, p])

        next_step, sums = pipeline.accumulate(scratch.ring, piece.steps, multiply, (LEFT, RIGHT), ACCUMULATORS, step)
        for first in range(0, ACCUMULATORS * RIGHT, at_once):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy engine has read the previous columns
            x, inner = sums[first // RIGHT], first % RIGHT
            scratch.out[wg] = x[:, inner : inner + at_once].astype(scratch.out.dtype)
            plgpu.commit_smem()
            at = pl.ds(piece.row + wg * LEFT, LEFT), piece.part, pl.ds(piece.column + first, at_once)
            plgpu.copy_smem_to_gmem(scratch.out.at[wg], out_ref.at[piece.expert, *at])
        return next_step

    for_each_piece(multiply_piece, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
