"""Copying ahead of the products: a ring of stages between one warpgroup that copies and those that multiply.

A step is what one stage holds. The copying warpgroup starts its rows (`seam_rows.gather`) and goes on to the next step;
some steps later, when the rows have come, it hands the step over. Weights come by the copy engine, which reports them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import cost, seam, seam_rows

STAGES = 4
AHEAD = 2  # steps whose rows are on their way; of the other two stages one is multiplied and one waits for its products


class Ring(NamedTuple):
    """Barriers of every stage: `full` when it can be multiplied, `used` when it can be overwritten."""

    full: object
    used: object


class Sent(NamedTuple):
    """Steps so far, of all tiles."""

    started: jax.Array
    handed_over: jax.Array


def nothing_sent() -> Sent:
    return Sent(jnp.int32(0), jnp.int32(0))


def send(ring: Ring, steps, copy: Callable, sent: Sent) -> Sent:
    """`copy(s, slot)` for every step s < steps, when its slot is free."""

    def one(s, sent):
        slot = sent.started % STAGES

        @pl.when(sent.started >= STAGES)
        def _():
            plgpu.barrier_wait(ring.used.at[slot])

        copy(s, slot)
        seam_rows.gather_commit()
        return hand_over(ring, sent._replace(started=sent.started + 1), leave=AHEAD)

    return lax.fori_loop(0, steps, one, sent)


def hand_over(ring: Ring, sent: Sent, *, leave: int = 0, before=None) -> Sent:
    """Until `leave` steps are on their way; of those before step `before`, if given."""
    for others in range(AHEAD, leave - 1, -1):
        go = sent.started - sent.handed_over > others
        if before is not None:
            go &= sent.handed_over < before

        @pl.when(go)
        def _(sent=sent, others=others):
            seam_rows.gather_wait(others)
            plgpu.barrier_arrive(ring.full.at[sent.handed_over % STAGES])

        sent = sent._replace(handed_over=sent.handed_over + jnp.where(go, 1, 0))
    return sent


def receive(ring: Ring, steps, multiply: Callable, products: int, step):
    """`multiply(slot)`, that starts so many products, for every step; the number of the next step."""

    def one(s, step):
        slot = step % STAGES
        plgpu.barrier_wait(ring.full.at[slot])
        multiply(slot)
        plgpu.wgmma_wait(products)  # those of the step before are done

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


def blocks(most: int) -> int:
    """As many as run at once, if there is work for all."""
    return min(seam.multiprocessors(), most)


def every(blocks: int, total, body: Callable, state):
    """`body(i, number, state)` for this block's share of `total` pieces of work, its i-th one."""
    block = lax.axis_index("block")
    count = (total - block + blocks - 1) // blocks
    return lax.fori_loop(0, count, lambda i, state: body(i, block + i * blocks, state), state)


def run(kernel: Callable, *, name: str, flops: float, blocks: int, warpgroups: int, out_type, scratch):
    """The kernel as a function of arrays; `warpgroups` multiply and one more copies."""
    kernel.__name__ = name
    launch = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return cost.kernel(name, flops, launch)


def memory(shape, dtype):
    """Shared memory of tiles [.., rows, columns] as rows are copied to and tensor cores read."""
    return plgpu.SMEM(shape, dtype, transforms=seam_rows.atoms(dtype))
