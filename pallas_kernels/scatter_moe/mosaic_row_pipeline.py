"""The pipeline of the Mosaic expert kernels: one warpgroup copies rows and weights, the other warpgroups multiply them.

A matrix product runs in steps. One step multiplies and adds 64 elements along the summed axis. The steps of a block are
numbered from the start of the kernel, over all tiles that the block computes. Shared memory has a ring of STAGES
stages. A stage has room for the operands of one step, and step s uses stage s % STAGES.

The copying warpgroup starts to copy the rows of a step (`row_copies.gather`) and goes on to the next step. AHEAD steps
later, it hands the step over to the multiplying warpgroups: it waits until the rows are in shared memory, and then it
arrives at the barrier `full` of the stage. If a step needs weights, the copy engine copies them and arrives at `full`
itself. The multiplying warpgroups arrive at the barrier `used` of the stage when the products of the step are done.
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
# The number of steps whose rows are being copied at the same time. They use two of the four stages. The operands in the
# third stage are being multiplied. The fourth stage becomes free when the products of its step are done.
AHEAD = 2


def ring(*, warpgroups: int, copies: int = 0) -> Ring:
    """Declare the barriers of the ring of stages: one barrier `full` and one barrier `used` for every stage.

    `full` completes when the operands of a step are in the stage, and `used` completes when they have been multiplied.
    `warpgroups` is the number of multiplying warpgroups, which all read every stage. `copies` is the number of weight
    tiles that the copy engine copies into the stage in each step.
    """
    return mosaic_pipeline.ring(STAGES, arrivals=1 + copies, readers=warpgroups)


class Sent(NamedTuple):
    """The progress of the copying warpgroup: two numbers of steps, counted from the start of the kernel.

    `started`: the number of steps for which the warpgroup has started the copies to shared memory.
    `handed_over`: the number of steps for which it has also arrived at the barrier `full`, so that the multiplying
      warpgroups may read the rows.
    """

    started: jax.Array
    handed_over: jax.Array


def nothing_sent() -> Sent:
    """Return the progress of the copying warpgroup at the start of a kernel: no step started, none handed over."""
    return Sent(jnp.int32(0), jnp.int32(0))


def send(ring: Ring, steps, copy: Callable, sent: Sent) -> Sent:
    """Copy the operands of the next `steps` steps to shared memory. The copying warpgroup calls this.

    For each s from 0 to `steps` - 1, wait until the stage of the step is free, and call `copy(s, stage)`, which starts
    the copies. After each call of `copy`, hand over all started steps to the multiplying warpgroups, except the newest
    AHEAD steps. Later calls of `send` or `hand_over` hand over the steps that are left.

    `sent` is the progress of the copying warpgroup at the call. Return its progress at the end.
    """

    def one(s, sent):
        copy(s, mosaic_pipeline.free_stage(ring, sent.started, STAGES))
        row_copies.gather_commit()
        return hand_over(ring, sent._replace(started=sent.started + 1), leave=AHEAD)

    return lax.fori_loop(0, steps, one, sent)


def hand_over(ring: Ring, sent: Sent, *, leave: int = 0, before=None) -> Sent:
    """Hand over to the multiplying warpgroups all started steps, except the newest `leave` steps.

    To hand over a step, the copying warpgroup waits until the rows of the step are in shared memory. Then it arrives at
    the barrier `full` of the stage, so that the multiplying warpgroups may read the stage. The oldest step comes first.
    If `before` is given, only steps with a number below `before` are handed over. When this function is called, there
    may be at most AHEAD + 1 steps that are started and not handed over.

    `sent` is the progress of the copying warpgroup at the call. Return its progress at the end.
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
    """Multiply the operands of `steps` steps, from step number `step` on. A multiplying warpgroup calls this.

    For each step, wait until its stage can be read, and call `multiply(stage)`, which starts `products` matrix products
    on the tensor cores. After the products of the next step have been started, wait until the products of this step
    are done, and arrive at the barrier `used` of its stage. Then the copying warpgroup may overwrite the stage. All
    products are done when this function returns. Return the number of the next step, `step` + `steps`.
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
    """Multiply the operands of `steps` steps, from step number `step` on, and sum the products over the steps.

    A multiplying warpgroup calls this. It has `count` accumulators of shape `shape`. For each step, it waits until the
    operands are in shared memory, and calls `multiply(stage, accumulators)`. `multiply` starts one matrix product for
    each accumulator on the tensor cores, and the tensor cores add the product to the accumulator.

    Return (number of the next step, sums). `sums` is a list of the `count` accumulators, fp32 arrays in registers.
    """

    def run(*accumulators):
        next_step = receive(ring, steps, lambda stage: multiply(stage, accumulators), count, step)
        return next_step, *(acc[...] for acc in accumulators)

    next_step, *sums = pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32),) * count)
    return next_step, sums


def blocks(most: int) -> int:
    """Return the number of blocks of a kernel: one for each multiprocessor of the GPU, but at most `most`.

    `most` is the number of tiles that the blocks compute.
    """
    return min(platform.multiprocessors(), most)


def every(blocks: int, total, body: Callable, state):
    """Call `state = body(i, number, state)` for every tile that this block computes, and return the last state.

    The kernel has `blocks` blocks, which share `total` tiles of the result: block b computes the tiles b, b + blocks,
    b + 2 * blocks, and so on. `number` is the index of the tile among all tiles. `i` is its index among the tiles of
    this block: 0, 1, 2, and so on.
    """
    block = lax.axis_index("block")
    count = (total - block + blocks - 1) // blocks
    return lax.fori_loop(0, count, lambda i, state: body(i, block + i * blocks, state), state)


def memory(shape, dtype):
    """Declare an array of shape `shape` in shared memory. Its last two axes are the axes of a tile, [rows, columns].

    The elements of a tile have the order in which `row_copies.gather` writes them and tensor cores read them.
    """
    return plgpu.SMEM(shape, dtype, transforms=row_copies.atoms(dtype))
