"""Code that all Mosaic kernels share: the launch, and the two barriers of every pipeline stage.

A block has several warpgroups. One of them copies tiles into the stages of a ring in shared memory. The others compute
with these tiles. In d_key_value with H or Hv above 128, the first one does both. Step s uses stage s % stages.
docs/design explains the barriers of every kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from . import cost


class Ring(NamedTuple):
    """The two barriers of every stage."""

    full: Any  # the stage can be read
    used: Any  # the stage can be overwritten


def ring(stages: int, *, arrivals: int, readers: int) -> Ring:
    """Return the barriers to declare for a ring.

    Args:
      stages: the number of stages.
      arrivals: the number of copies and of arrivals of warpgroups that fill a stage.
      readers: the number of warpgroups that read a stage.
    """
    return Ring(
        full=plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        used=plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
    )


def free_stage(ring: Ring, step, stages: int, *, when=None):
    """Wait until the stage of a step can be overwritten, and return the stage.

    If the condition `when` is false, do not wait.
    """
    stage = step % stages
    is_occupied = step >= stages if when is None else when & (step >= stages)

    @pl.when(is_occupied)
    def _():
        plgpu.barrier_wait(ring.used.at[stage])

    return stage


def full_stage(ring: Ring, step, stages: int):
    """Wait until the stage of a step can be read, and return the stage."""
    stage = step % stages
    plgpu.barrier_wait(ring.full.at[stage])
    return stage


def run(kernel: Callable, *, name: str, flops: float, blocks: int, warpgroups: int, out_type, scratch) -> Callable:
    """Return the kernel as a function of arrays. It runs in `blocks` blocks of `warpgroups` warpgroups.

    The kernel receives pytrees of references: one for every argument, one for the results, and one for every entry of
    `scratch`. `out_type` is a pytree, and so is every entry of `scratch`. In the kernel, `lax.axis_index("block")` and
    `lax.axis_index("wg")` are the numbers of the block and of the warpgroup.
    """
    kernel.__name__ = name
    launch = plgpu.kernel(
        kernel,
        out_type=(out_type,),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    run_named = cost.kernel(name, flops, launch)
    return lambda *arrays: run_named(*arrays)[0]
