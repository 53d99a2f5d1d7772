"""What all Mosaic kernels share: how they are launched, and the two barriers of every pipeline stage.

A block has several warpgroups: one copies tiles into the stages of a ring in shared memory, the others compute with
them. Step s uses stage s % stages. docs/kernels explains the barriers of every kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from . import cost


class Ring(NamedTuple):
    """Two barriers of every stage."""

    full: Any  # the stage can be read
    used: Any  # the stage can be overwritten


def ring(stages: int, *, arrivals: int, readers: int) -> Ring:
    """The barriers to declare.

    Args:
      arrivals: the copies and the arrivals of warpgroups that fill a stage.
      readers: the warpgroups that read a stage.
    """
    return Ring(
        full=plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        used=plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
    )


def free_stage(ring: Ring, step, stages: int, *, when=None):
    """The stage of a step, after a wait until it can be overwritten. Where the condition `when` is false: no wait."""
    stage = step % stages
    is_occupied = step >= stages if when is None else when & (step >= stages)

    @pl.when(is_occupied)
    def _():
        plgpu.barrier_wait(ring.used.at[stage])

    return stage


def full_stage(ring: Ring, step, stages: int):
    """The stage of a step, after a wait until it can be read."""
    stage = step % stages
    plgpu.barrier_wait(ring.full.at[stage])
    return stage


def run(kernel: Callable, *, name: str, flops: float, blocks: int, warpgroups: int, out_type, scratch) -> Callable:
    """The kernel as a function of arrays, with `blocks` blocks of `warpgroups` warpgroups.

    The kernel gets one pytree of references for every argument, one for the results, and one for every entry of
    `scratch`. `out_type` and each of these entries is a pytree. The axes are named "block" and "wg".
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
