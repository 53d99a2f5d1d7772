"""A ring of stages, in which one warpgroup copies rows and weights ahead of the warpgroups that multiply them.

A step is the content of one stage. The copying warpgroup starts to copy the rows of a step (`row_copies.gather`) and
goes on to the next step. Some steps later the rows have arrived, and it hands the step over. The copy engine copies the
weights, and it reports their arrival itself. docs/design/expert_kernels.md explains the barriers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import mosaic_pipeline, platform
from .. import mosaic_row_copies as row_copies
from ..mosaic_pipeline import Ring

STAGES = 4
# The number of steps whose rows are being copied. Of the other two stages, one is being multiplied. The other one is
# free as soon as the products of its step are done.
AHEAD = 2


def ring(*, warpgroups: int, copies: int = 0) -> Ring:
    """Return the barriers of the ring, in the form in which a kernel declares them.

    `warpgroups` warpgroups read every stage. The copy engine makes `copies` copies into a stage, in addition to the
    rows that the copying warpgroup copies.
    """
    return mosaic_pipeline.ring(STAGES, arrivals=1 + copies, readers=warpgroups)


class Sent(NamedTuple):
    """How many steps the copying warpgroup has started to copy, and how many it has handed over, since its start."""

    started: jax.Array
    handed_over: jax.Array


def nothing_sent() -> Sent:
    """Return the counts at the start of a kernel: zero steps."""
    return Sent(jnp.int32(0), jnp.int32(0))


def send(ring: Ring, steps, copy: Callable, sent: Sent) -> Sent:
    """Copy `steps` steps, in the copying warpgroup. Return the new counts.

    `copy(s, stage)` starts the copies of step s. It is called as soon as the stage of the step is free. Steps whose
    rows have arrived are handed over.
    """

    def one(s, sent):
        copy(s, mosaic_pipeline.free_stage(ring, sent.started, STAGES))
        row_copies.gather_commit()
        return hand_over(ring, sent._replace(started=sent.started + 1), leave=AHEAD)

    return lax.fori_loop(0, steps, one, sent)


def hand_over(ring: Ring, sent: Sent, *, leave: int = 0, before=None) -> Sent:
    """Hand steps over to the multiplying warpgroups, the oldest first, until only `leave` steps are not handed over.

    A step is handed over when its rows have arrived. If `before` is given, hand over only the steps before step
    `before`. Return the new counts.
    """
    for others in range(AHEAD, leave - 1, -1):
        go = sent.started - sent.handed_over > others
        if before is not None:
            go &= sent.handed_over < before

        @pl.when(go)
        def _(sent=sent, others=others):
            row_copies.gather_wait(others)
            plgpu.barrier_arrive(ring.full.at[sent.handed_over % STAGES])

        sent = sent._replace(handed_over=sent.handed_over + jnp.where(go, 1, 0))
    return sent


def receive(ring: Ring, steps, multiply: Callable, products: int, step):
    """Multiply `steps` steps, from number `step` on, in a multiplying warpgroup. Return the number of the next step.

    For each step, wait until its stage can be read, and call `multiply(stage)`, which starts `products` products. The
    stage is given back for new copies one step later, when its products are done.
    """

    def one(s, step):
        multiply(mosaic_pipeline.full_stage(ring, step, STAGES))
        plgpu.wgmma_wait(products)  # the products of the previous step are done

        @pl.when(s > 0)
        def _():
            plgpu.barrier_arrive(ring.used.at[(step - 1) % STAGES])

        return step + 1

    step = lax.fori_loop(0, steps, one, step)
    plgpu.wgmma_wait(0)

    @pl.when(steps > 0)
    def _():
        plgpu.barrier_arrive(ring.used.at[(step - 1) % STAGES])

    return step


def accumulate(ring: Ring, steps, multiply: Callable, shape: tuple[int, int], count: int, step):
    """Multiply `steps` steps, from number `step` on. Return (the number of the next step, `count` sums of products).

    Each sum is an array of this `shape`, in fp32. `multiply(stage, accumulators)` starts one product for each
    accumulator.
    """

    def run(*accumulators):
        next_step = receive(ring, steps, lambda stage: multiply(stage, accumulators), count, step)
        return next_step, *(acc[...] for acc in accumulators)

    next_step, *sums = pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32),) * count)
    return next_step, sums


def blocks(most: int) -> int:
    """Return the number of blocks: one for each multiprocessor, but at most `most`, the number of pieces of work."""
    return min(platform.multiprocessors(), most)


def every(blocks: int, total, body: Callable, state):
    """Call `state = body(i, number, state)` for every piece of work of this block, and return the last state.

    `number` is the number of the piece among all `total` pieces, and i is its number among the pieces of this block.
    The `blocks` blocks take the pieces in turn.
    """
    block = lax.axis_index("block")
    count = (total - block + blocks - 1) // blocks
    return lax.fori_loop(0, count, lambda i, state: body(i, block + i * blocks, state), state)


def memory(shape, dtype):
    """Return the declaration of shared memory of this shape, for tiles [.., rows, columns].

    The tiles have the layout that `row_copies.gather` writes and tensor cores read.
    """
    return plgpu.SMEM(shape, dtype, transforms=row_copies.atoms(dtype))
