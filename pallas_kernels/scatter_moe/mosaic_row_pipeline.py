"""The pipeline of the Mosaic expert kernels: one warpgroup copies rows and weights, the other warpgroups multiply them.

A step is a part of a matrix product: the products and sums over 64 elements of the axis that is summed. Shared memory
has a ring of STAGES stages. A stage has room for the operands of one step, and step s uses stage s % STAGES. The
copying warpgroup starts to copy the rows of a step (`row_copies.gather`) and goes on to the next step. AHEAD steps
later, it waits until the rows have arrived, and then it arrives at the barrier `full` of the stage: it hands the step
over to the multiplying warpgroups. The copy engine copies the weights, and it arrives at `full` itself.
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
    """Declare the barriers of the ring of stages: one barrier `full` and one barrier `used` for every stage.

    `full` completes when the operands of a step are in the stage, and `used` when they have been multiplied.
    `warpgroups` is the number of warpgroups that read every stage. `copies` is how many times the copy engine copies
    something into a stage, in addition to the rows that the copying warpgroup copies.
    """
    return mosaic_pipeline.ring(STAGES, arrivals=1 + copies, readers=warpgroups)


class Sent(NamedTuple):
    """The progress of the copying warpgroup, as two numbers of steps since the start of the kernel.

    `started`: the number of steps whose copies to shared memory the warpgroup has started.
    `handed_over`: the number of steps whose copies have arrived, and which the multiplying warpgroups may therefore
      read.
    """

    started: jax.Array
    handed_over: jax.Array


def nothing_sent() -> Sent:
    """Return the progress of the copying warpgroup at the start of a kernel: no copies started, none arrived."""
    return Sent(jnp.int32(0), jnp.int32(0))


def send(ring: Ring, steps, copy: Callable, sent: Sent) -> Sent:
    """Copy the rows and weights of the next `steps` steps to shared memory. The copying warpgroup calls this.

    For each s from 0 to `steps` - 1, wait until the next stage of the ring is free, and call `copy(s, stage)`, which
    starts the copies. Then let the multiplying warpgroups read all started steps, except the newest AHEAD steps, after
    their rows have arrived. `sent` is the progress before, and the returned `Sent` is the progress after these steps.
    """

    def one(s, sent):
        copy(s, mosaic_pipeline.free_stage(ring, sent.started, STAGES))
        row_copies.gather_commit()
        return hand_over(ring, sent._replace(started=sent.started + 1), leave=AHEAD)

    return lax.fori_loop(0, steps, one, sent)


def hand_over(ring: Ring, sent: Sent, *, leave: int = 0, before=None) -> Sent:
    """Let the multiplying warpgroups read the steps that are being copied, except the newest `leave` of them.

    For each of these steps, the oldest first, wait until its rows are in shared memory, and then arrive at the barrier
    `full` of its stage. If `before` is given, do this only for steps with a number below `before`. `sent` is the
    progress of the copying warpgroup, and the returned `Sent` is its progress after this.
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

    For each step, wait until its stage can be read, and call `multiply(stage)`, which starts `products` products on the
    tensor cores. One step later these products are done, and the copying warpgroup may overwrite the stage. Return the
    number of the next step.
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
    """Multiply the operands of `steps` steps, from step number `step` on, and sum the products.

    A multiplying warpgroup calls this. For each step, `multiply(stage, accumulators)` starts one product on the tensor
    cores for each accumulator. Return (the number of the next step, sums): the sums are `count` arrays of the shape
    `shape`, in fp32, in registers.
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

    The `blocks` blocks take `total` tiles in turn: block b takes the tiles b, b + blocks, and so on. `number` is the
    index of the tile among all tiles, and i is its index among the tiles of this block.
    """
    block = lax.axis_index("block")
    count = (total - block + blocks - 1) // blocks
    return lax.fori_loop(0, count, lambda i, state: body(i, block + i * blocks, state), state)


def memory(shape, dtype):
    """Declare shared memory of shape `shape`, [.., rows, columns], for tiles [rows, columns].

    The elements of a tile are in the order in which `row_copies.gather` writes them and tensor cores read them.
    """
    return plgpu.SMEM(shape, dtype, transforms=row_copies.atoms(dtype))
