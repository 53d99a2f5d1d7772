"""Gradients of expert weights on Hopper GPUs (Pallas Mosaic GPU).

d_weight[e] = sum over the rows r of expert e of left[r]^T right[r], both copied by their row numbers: no operand is
transposed or padded in memory, rows that do not exist are zeros, and an expert without rows gets zeros. A block holds
64 x 256 elements of a weight per multiplying warpgroup; experts with many rows come first.
docs/kernels/scatter_moe.md explains the barriers.
"""

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
WARPGROUPS = 2  # that multiply
LEFT = 64  # columns of the left rows that a warpgroup takes
RIGHT = 128  # columns of the right rows that an accumulator takes
ACCUMULATORS = 2  # of a warpgroup


class Scratch(NamedTuple):
    """Shared memory of a block, and its barriers."""

    left: Any  # [STAGES, WARPGROUPS, ROWS, LEFT]
    right: Any  # [STAGES, ACCUMULATORS, ROWS, RIGHT]
    out: Any  # [WARPGROUPS, LEFT, columns at once], on their way out
    ring: Ring


def d_weights(left, left_numbers, right, right_numbers, tasks: Tasks, out_dtype=None):
    """[E, D, parts, F] of left [Q, D] and right [parts, Q', F].

    Their row numbers [tiles * M] are those of `tasks.row_numbers`. `out_dtype`: None for that of `left`.
    """
    (_, D), (P, _, F), E = left.shape, right.shape, tasks.rows.shape[0]
    M = tasks.rows_of_tile
    dtype, out_dtype = left.dtype, jnp.dtype(out_dtype or left.dtype)
    at_once = RIGHT * 2 // out_dtype.itemsize  # columns on their way out
    down, across = -(-D // (LEFT * WARPGROUPS)), -(-F // (RIGHT * ACCUMULATORS))
    heavy_first = jnp.argsort(-tasks.rows, stable=True).astype(jnp.int32)
    per_expert = down * P * across
    blocks = pipeline.blocks(E * per_expert)

    def kernel(
        left_ref, left_numbers_ref, right_ref, right_numbers_ref, heavy_ref, first_ref, rows_ref, out_ref,
        scratch: Scratch,
    ):  # fmt: skip
        wg, ring = lax.axis_index("wg"), scratch.ring

        def pieces(body, state):
            def one(_, number, state):
                e, rest = heavy_ref[number // per_expert], number % per_expert
                row, part, column = rest // (P * across), rest // across % P, rest % across
                return body(
                    e, row * LEFT * WARPGROUPS, part, column * RIGHT * ACCUMULATORS, -(-rows_ref[e] // ROWS), state
                )

            return pipeline.every(blocks, E * per_expert, one, state)

        @pl.when(wg == WARPGROUPS)
        def copy():
            def body(e, row, part, column, steps, sent):
                def load(s, stage):
                    numbers = pl.ds(first_ref[e] * M + s * ROWS, ROWS)
                    for w in range(WARPGROUPS):
                        rows = left_numbers_ref.at[numbers]
                        row_copies.gather(left_ref, rows, row + w * LEFT, scratch.left.at[stage, w])
                    for p in range(ACCUMULATORS):
                        rows = right_numbers_ref.at[numbers]
                        row_copies.gather(right_ref.at[part], rows, column + p * RIGHT, scratch.right.at[stage, p])

                return pipeline.send(ring, steps, load, sent)

            pipeline.hand_over(ring, pieces(body, pipeline.nothing_sent()))

        @pl.when(wg < WARPGROUPS)
        def compute():
            def body(e, row, part, column, steps, step):
                def multiply(*accumulators):
                    def one(stage):
                        for p, acc in enumerate(accumulators):
                            left_tile = scratch.left.at[stage, wg].transpose((1, 0))
                            plgpu.wgmma(acc, left_tile, scratch.right.at[stage, p])

                    last = pipeline.receive(ring, steps, one, ACCUMULATORS, step)
                    return last, *(acc[...] for acc in accumulators)

                accumulator = plgpu.ACC((LEFT, RIGHT), jnp.float32)
                last, *sums = pl.run_scoped(multiply, *(accumulator,) * ACCUMULATORS)
                for first in range(0, ACCUMULATORS * RIGHT, at_once):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the columns before have left
                    x, inner = sums[first // RIGHT], first % RIGHT
                    scratch.out[wg] = x[:, inner : inner + at_once].astype(out_dtype)
                    plgpu.commit_smem()
                    at = pl.ds(row + wg * LEFT, LEFT), part, pl.ds(column + first, at_once)
                    plgpu.copy_smem_to_gmem(scratch.out.at[wg], out_ref.at[e, *at])
                return last

            pieces(body, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

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
                out=memory((WARPGROUPS, LEFT, at_once), out_dtype),
                ring=pipeline.ring(warpgroups=WARPGROUPS),
            ),
        ),
    )
    return run(left, left_numbers, right, right_numbers, heavy_first, tasks.first, tasks.rows)
