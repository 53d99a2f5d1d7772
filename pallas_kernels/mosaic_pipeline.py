"""Code that all Mosaic kernels share: the launch, and the two barriers of every pipeline stage.

A block has several warpgroups. One warpgroup copies tiles into shared memory, which has room for `stages` steps at the
same time: a ring of stages. The other warpgroups compute with these tiles. Step s uses stage s % stages. (In the
attention kernel `d_key_value` with H or Hv above 128, the first warpgroup both copies and computes.) docs/design
explains the barriers of every kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from . import cost


class Ring(NamedTuple):
    """The barriers of a ring: for every stage one barrier `full` and one barrier `used`."""

    full: Any  # the stage can be read
    used: Any  # the stage can be overwritten


def ring(stages: int, *, arrivals: int, readers: int) -> Ring:
    """Return the barriers of a ring of stages, in the form in which a kernel declares its scratch memory.

    Args:
      stages: the number of stages.
      arrivals: how many copies and warpgroups arrive at the barrier `full` of a stage before the stage can be read.
      readers: the number of warpgroups that read a stage.
    """
    return Ring(
        full=plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        used=plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
    )


def free_stage(ring: Ring, step, stages: int, *, when=None):
    """Wait until the stage of step `step` can be overwritten. Return the number of the stage, step % stages.

    If the traced condition `when` is false, do not wait.
    """
    stage = step % stages
    is_occupied = step >= stages if when is None else when & (step >= stages)

    @pl.when(is_occupied)
    def _():
        plgpu.barrier_wait(ring.used.at[stage])

    return stage


def full_stage(ring: Ring, step, stages: int):
    """Wait until the stage of step `step` can be read. Return the number of the stage, step % stages."""
    stage = step % stages
    plgpu.barrier_wait(ring.full.at[stage])
    return stage


def run(kernel: Callable, *, name: str, flops: float, blocks: int, warpgroups: int, out_type, scratch) -> Callable:
    """Return a function of arrays that launches a Mosaic GPU kernel and returns its results.

    The kernel receives pytrees of references: one for every argument, one for the results, and one for every entry of
    `scratch`. In the kernel, `lax.axis_index("block")` and `lax.axis_index("wg")` are the numbers of the block and of
    the warpgroup.

    Args:
      kernel: the body of the kernel.
      name: the name of the kernel.
      flops: the number of floating-point operations, which the name of the jitted function states (`cost.kernel`).
      blocks: the number of blocks.
      warpgroups: the number of warpgroups of a block.
      out_type: a pytree of jax.ShapeDtypeStruct, the results.
      scratch: a tuple of pytrees of shared memory and barriers of a block.
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
