"""The pipeline of the Mosaic expert kernels: one warpgroup copies rows and weights, the other warpgroups multiply them.

Shared memory has a ring of STAGES stages. A step is the piece of the matrix product whose operands fit into one stage,
and it uses stage `step % STAGES`. The copying warpgroup starts to copy the rows of a step (`row_copies.gather`) and
goes on to the next step. AHEAD steps later, it waits until the rows have arrived, and hands the step over: it arrives
at the barrier `full` of the stage. The copy engine copies the weights, and it arrives at `full` itself.
docs/design/expert_kernels.md explains the barriers.
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
    """Return the declaration of the barriers of the ring: one barrier `full` and one barrier `used` for every stage.

    `warpgroups` is the number of warpgroups that read every stage. `copies` is how many times the copy engine copies
    something into a stage, in addition to the rows that the copying warpgroup copies.
    """
    return mosaic_pipeline.ring(STAGES, arrivals=1 + copies, readers=warpgroups)


class Sent(NamedTuple):
    """Two counts of steps since the start of the kernel, in the copying warpgroup.

    `started`: the number of steps whose copies the warpgroup has started.
    `handed_over`: the number of steps that the warpgroup has handed over to the multiplying warpgroups.
    """

    started: jax.Array
    handed_over: jax.Array


def nothing_sent() -> Sent:
    """Return the counts of steps at the start of a kernel: zero started, zero handed over."""
    return Sent(jnp.int32(0), jnp.int32(0))


def send(ring: Ring, steps, copy: Callable, sent: Sent) -> Sent:
    """Copy the rows and weights of `steps` steps to shared memory, in the copying warpgroup.

    Return the new counts of steps. For each step s, wait until its stage is free, and call `copy(s, stage)`, which
    starts the copies. Then hand over all started steps except the newest AHEAD steps. Each one is handed over after its
    rows have arrived.
    """

    def one(s, sent):
        copy(s, mosaic_pipeline.free_stage(ring, sent.started, STAGES))
        row_copies.gather_commit()
        return hand_over(ring, sent._replace(started=sent.started + 1), leave=AHEAD)

    return lax.fori_loop(0, steps, one, sent)


def hand_over(ring: Ring, sent: Sent, *, leave: int = 0, before=None) -> Sent:
    """Hand steps over to the multiplying warpgroups, the oldest first, until at most `leave` are left to hand over.

    Before a step is handed over, wait until its rows have arrived. If `before` is given, hand over only the steps
    before step number `before`. Return the new counts of steps.
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
    """Multiply `steps` steps, from step number `step` on, in a multiplying warpgroup. Return the next step number.

    For each step, wait until its stage can be read, and call `multiply(stage)`, which starts `products` products on the
    tensor cores. One step later these products are done, and the copying warpgroup may overwrite the stage.
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
    """Multiply `steps` steps, from step number `step` on, in a multiplying warpgroup, and sum the products.

    Return (the next step number, the sums): `count` arrays of this `shape`, in fp32, in registers. For each step,
    `multiply(stage, accumulators)` starts one product on the tensor cores for each accumulator.
    """

    def run(*accumulators):
        next_step = receive(ring, steps, lambda stage: multiply(stage, accumulators), count, step)
        return next_step, *(acc[...] for acc in accumulators)

    next_step, *sums = pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32),) * count)
    return next_step, sums


def blocks(most: int) -> int:
    """Return the number of blocks of a kernel: one for each multiprocessor, but at most one for each piece of work.

    `most` is the number of pieces of work.
    """
    return min(platform.multiprocessors(), most)


def every(blocks: int, total, body: Callable, state):
    """Call `state = body(i, number, state)` for every piece of work of this block, and return the last state.

    The `blocks` blocks take the `total` pieces of work in turn: block b takes the pieces b, b + blocks, and so on.
    `number` is the index of the piece among all pieces, and i is its index among the pieces of this block.
    """
    block = lax.axis_index("block")
    count = (total - block + blocks - 1) // blocks
    return lax.fori_loop(0, count, lambda i, state: body(i, block + i * blocks, state), state)


def memory(shape, dtype):
    """Return the declaration of shared memory of shape `shape`, [.., rows, columns], for tiles [rows, columns].

    The elements of a tile are in the order that `row_copies.gather` writes and tensor cores read.
    """
    return plgpu.SMEM(shape, dtype, transforms=row_copies.atoms(dtype))
