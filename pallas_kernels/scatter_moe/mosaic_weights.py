"""The kernel for the gradients of expert weights on Hopper GPUs (Pallas Mosaic GPU).

The gradient of the weight of expert e is the sum of left[r]^T right[r] over the rows r of the expert: `left` has the
inputs of the matrix product, and `right` has the cotangents of its results. The kernel copies the rows of `left` and
`right` by their row numbers, so neither array is transposed or padded in memory. Empty rows are copied as zeros. The
gradient of an expert without rows is zero. Each multiplying warpgroup computes 64 x 256 elements of a gradient at a
time. The experts with the most rows come first, which balances the work of the blocks. docs/design/expert_kernels.md
explains the barriers.
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

ROWS = 64  # rows of a step
WARPGROUPS = 2  # warpgroups of a block that multiply
LEFT = 64  # columns of `left` that a warpgroup multiplies
RIGHT = 128  # columns of `right` for one accumulator
ACCUMULATORS = 2  # accumulators of a warpgroup


class Scratch(NamedTuple):
    """Shared memory of a block, and its barriers.

    `left` and `right` have the operands of STAGES steps. Each multiplying warpgroup writes a part of the gradient to
    `out`, from where the copy engine copies it to global memory.
    """

    left: Any  # [STAGES, WARPGROUPS, ROWS, LEFT]
    right: Any  # [STAGES, ACCUMULATORS, ROWS, RIGHT]
    out: Any  # [WARPGROUPS, LEFT, columns at once], before they are copied to global memory
    ring: Ring


class Operands(NamedTuple):
    """References to the arrays in global memory that the kernel reads.

    The rows of every expert are cut into tiles of M rows. For every row of the tiles, `left_numbers` has the index of
    its row in `left`, and `right_numbers` has the index of its row in `right`, or -1 for an empty row.
    """

    left: Any  # [rows of left, D]
    left_numbers: Any  # [tiles * M]
    right: Any  # [parts, rows of right, F]
    right_numbers: Any  # [tiles * M]
    heavy_first: Any  # [E]: the experts, sorted by their number of rows, the largest first
    first: Any  # [E]: the first tile of every expert
    rows: Any  # [E]: the number of rows of every expert


class Piece(NamedTuple):
    """What a block computes at a time: 128 x 256 elements of the gradient of the weight of one expert."""

    expert: jax.Array
    row: jax.Array  # the first row of the gradient
    part: jax.Array  # the part of `right`
    column: jax.Array  # the first column of the gradient
    steps: jax.Array  # the number of steps, of 64 rows of the expert each


def d_weights(left, left_numbers, right, right_numbers, tasks: Tasks, out_dtype=None):
    """Compute the gradients of the weights of all experts, [E, D, parts, F], as sums of products of rows, left^T right.

    The gradient for expert e is the sum of left[left_numbers[i]]^T right[:, right_numbers[i]] over every row i of its
    tiles in `tasks`. `left` is [rows, D], and `right` is [parts, rows, F], with two parts for the halves of a gated
    hidden layer, else one. `left_numbers` and `right_numbers` have a row index for every row of the tiles, or -1 for an
    empty row. The dtype of the result is `out_dtype`, or the dtype of `left` if `out_dtype` is None.
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
    """In the copying warpgroup, copy the rows of `left` and `right` to shared memory, 64 rows of an expert per step.

    `rows_of_tile` is M, the number of rows of a tile in `tasks`. `for_each_piece(body, state)` calls
    `state = body(piece, state)` for each piece of the gradients that this block computes.
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
    """In multiplying warpgroup `wg`, compute 64 rows of every piece of the gradients, and write them to `out_ref`.

    These rows of the gradient belong to 64 columns of `left`. `out_ref` is the result [E, D, parts, F] in global
    memory. `for_each_piece(body, state)` calls `state = body(piece, state)` for each piece that this block computes.
    """
    at_once = scratch.out.shape[2]  # columns that are copied to global memory at the same time

    def multiply_piece(piece: Piece, step):
        def multiply(stage, accumulators):
            for p, acc in enumerate(accumulators):
                left_tile = scratch.left.at[stage, wg].transpose((1, 0))
                plgpu.wgmma(acc, left_tile, scratch.right.at[stage, p])

        next_step, sums = pipeline.accumulate(scratch.ring, piece.steps, multiply, (LEFT, RIGHT), ACCUMULATORS, step)
        for first in range(0, ACCUMULATORS * RIGHT, at_once):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous columns have been read
            x, inner = sums[first // RIGHT], first % RIGHT
            scratch.out[wg] = x[:, inner : inner + at_once].astype(scratch.out.dtype)
            plgpu.commit_smem()
            at = pl.ds(piece.row + wg * LEFT, LEFT), piece.part, pl.ds(piece.column + first, at_once)
            plgpu.copy_smem_to_gmem(scratch.out.at[wg], out_ref.at[piece.expert, *at])
        return next_step

    for_each_piece(multiply_piece, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
