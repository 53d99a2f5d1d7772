"""Code that all Mosaic kernels share: the launch, and the two barriers of every pipeline stage.

A block of a kernel has several warpgroups. One of them copies tiles into shared memory, and the others compute with the
tiles. (There is one exception: in the attention kernel `d_key_value`, if the head dimension of the keys or of the
values is above 128, the first warpgroup both copies and computes.)

A kernel is a loop. One pass of this loop is called a step. A pipeline stage is a part of shared memory that has room
for the tiles of one step. The stages form a ring: with n stages, the tiles of step s are in stage s % n.
docs/design/attention_kernels.md and docs/design/expert_kernels.md explain the barriers of every kernel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from . import cost


class Ring(NamedTuple):
    """The barriers of a ring of pipeline stages in shared memory: two arrays with one barrier for every stage.

    `full`: a barrier completes when the tiles of its stage are in shared memory. The warpgroups that compute wait for
      it.
    `used`: a barrier completes when the warpgroups that compute have read these tiles. The warpgroup that copies waits
      for it.
    """

    full: Any
    used: Any


def ring(stages: int, *, arrivals: int, readers: int) -> Ring:
    """Declare the barriers of a ring of pipeline stages. The caller puts them into the argument `scratch` of `run`.

    Args:
      stages: the number of stages.
      arrivals: how many arrivals complete the barrier `full` of a stage. A copy of the copy engine counts as one
        arrival, and a warpgroup that arrives counts as one.
      readers: the number of warpgroups that read a stage. The barrier `used` completes when all of them have arrived.
    """
    return Ring(
        full=plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        used=plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
    )


def free_stage(ring: Ring, step, stages: int, *, when=None):
    """Wait until the pipeline stage of step `step` can be overwritten. Return the index of the stage, step % stages.

    The warpgroup that copies calls this function before it copies the tiles of the step into shared memory. `stages` is
    the number of stages in the ring. So the stage still has the tiles of step `step - stages`, and the wait ends when
    all warpgroups that compute have read these tiles. In the first `stages` steps there is no wait, because the stages
    are still empty. If the traced condition `when` is given and is false, there is no wait either.
    """
    stage = step % stages
    is_occupied = step >= stages if when is None else when & (step >= stages)

    @pl.when(is_occupied)
    def _():
        plgpu.barrier_wait(ring.used.at[stage])

    return stage


def full_stage(ring: Ring, step, stages: int):
    """Wait until the tiles of step `step` are in shared memory. Return the index of their stage, step % stages.

    A warpgroup that computes calls this function before it reads the tiles. `stages` is the number of stages. A stage
    is a part of shared memory that has room for the tiles of one step.
    """
    stage = step % stages
    plgpu.barrier_wait(ring.full.at[stage])
    return stage


def run(kernel: Callable, *, name: str, flops: float, blocks: int, warpgroups: int, out_type, scratch) -> Callable:
    """Return a function of arrays that launches a Mosaic GPU kernel and returns its results.

    The arguments of the kernel are pytrees of references: one pytree for every argument of the returned function, one
    for the results, and one for every entry of `scratch`. In the kernel, `lax.axis_index("block")` is the index of the
    block, and `lax.axis_index("wg")` is the index of the warpgroup in its block.

    Args:
      kernel: the body of the kernel.
      name: the name of the kernel.
      flops: the number of floating-point operations of one launch. The launch runs in a jitted function whose name
        contains this number (`cost.kernel`).
      blocks: the number of blocks.
      warpgroups: the number of warpgroups of a block.
      out_type: a pytree of jax.ShapeDtypeStruct: the shapes and dtypes of the results.
      scratch: a tuple of pytrees that declare the shared memory and the barriers of a block.
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
