"""The kernel for the forward pass on Hopper GPUs. docs/design/attention_kernels.md explains its barriers.

A block has one or two warpgroups that compute, each with 64 query rows of one head. They visit the key tiles from right
to left, the nearest one first. One more warpgroup copies the tiles of keys and values to shared memory in advance.

All warpgroups have the same number of registers. The kernel does not move registers from the copying warpgroup to the
others, because the linker of the CUDA libraries ignores setmaxnreg, the instruction that moves them. With three
warpgroups, each thread has 168 registers, which are enough.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import mosaic_pipeline as pipeline
from .. import mosaic_shims as shims
from .logarithm import LOG2E
from .mosaic_tile import (
    FINISHED,
    KEYS,
    ROWS,
    Assignment,
    Plan,
    block,
    finished_padding,
    sticks,
    tile_memory,
    two_sum,
    visible,
    visited,
    zeros,
)


class Inputs(NamedTuple):
    """References to the arrays in global memory that the kernel for the forward pass reads.

    In the shapes of the fields, W is the number of computing warpgroups of a block, and `tiles` is the number of blocks
    of a head. So a head has tiles * W query tiles. `splits` is the number of parts into which the keys are split.
    """

    query: Any  # [B, T, N, H]
    key: Any  # [B, S, K, H]
    value: Any  # [B, S, K, Hv]
    scale: Any  # [1]
    key_ranges: Any  # [B * splits, tiles * W, 4]: (stop, whole_stop, whole_start, start)
    offset: Any  # [B], the position of the first query among the keys
    segments: Any  # (segment ids of the queries, segment ids of the keys), or None


class Outputs(NamedTuple):
    """References to the arrays in global memory that the kernel for the forward pass writes.

    In the shapes of the fields, W is the number of computing warpgroups of a block, and `tiles` is the number of blocks
    of a head. So a head has tiles * W query tiles. `splits` is the number of parts into which the keys are split.
    """

    out: Any  # [B * splits, T, N, Hv]
    log_decay: Any  # [2, B * splits, N, padded rows]: the cumulative log-decay in two floats
    reached: Any  # [B * splits, N, tiles * W]: the index of the leftmost key tile that each query tile visited


class Scratch(NamedTuple):
    """The shared memory of a block, and the barriers that protect it.

    In the shapes of the fields, W is the number of computing warpgroups of the block, and `stages` is the number of key
    tiles that are in shared memory at the same time.
    """

    query: Any  # [W, ROWS, H]
    out: Any  # [W, ROWS, Hv], or None if the output overwrites the query
    rows: Any  # [W, 2, ROWS]: the cumulative log-decay of the rows, before it is copied to global memory
    key: Any  # [stages, KEYS, H]
    value: Any  # [stages, KEYS, Hv]
    needs: Any  # [W, stages], for skip_below: 1 if the warpgroup needs more tiles after the tile of this stage
    stopped: Any  # [stages], for skip_below: 1 if the warpgroup that copies has stopped, so the stage has no tile
    loaded: Any  # a barrier for each computing warpgroup: its query rows have arrived
    ring: pipeline.Ring  # barriers of the stages. `full`: the tile has arrived, or `stopped` says that there is none


def forward(plan: Plan, query, key, value, scale, key_ranges, offset, query_segments=None, key_segments=None):
    """Run the kernel for the forward pass. Return (out [entries,T,N,Hv], log_decay [2,entries,N,padded rows], reached).

    `entries` is B times the number of parts into which the keys are split. `log_decay` is the cumulative log-decay of
    each query row, -log2 of the part of the stick that remains, as the sum of two float32 numbers. `reached`
    [entries, N, query tiles] is the index of the leftmost key tile that was computed for each query tile of 64 rows.
    The last arguments describe the mask (see `Kernels.forward`).
    """
    W, stages, dtype = plan.warpgroups, plan.stages, plan.dtype
    entries, out_dtype = plan.entries, plan.out_dtype or dtype
    shared = plan.H == plan.Hv and out_dtype == dtype  # whether the output overwrites the query in shared memory

    def kernel(inputs: Inputs, outputs: Outputs, scratch: Scratch):
        entry, n, i = block(plan)
        b, head, wg = entry % plan.B, n // (plan.N // plan.K), lax.axis_index("wg")
        stop, start = visited(lambda w, which: inputs.key_ranges[entry, i * W + w, which], W)
        assigned = Assignment(entry, b, n, head, i, wg, stop, start)
        pl.when(wg == W)(partial(_copy, plan, assigned, inputs, scratch))
        pl.when(wg < W)(partial(_compute, plan, assigned, inputs, outputs, scratch))

    run = pipeline.run(
        kernel,
        name="stick_breaking_forward",
        flops=2 * plan.scores * (plan.H + plan.Hv),
        blocks=entries * plan.N * plan.tiles,
        warpgroups=W + 1,
        out_type=Outputs(
            out=jax.ShapeDtypeStruct((entries, query.shape[1], plan.N, plan.Hv), out_dtype),
            log_decay=jax.ShapeDtypeStruct((2, entries, plan.N, plan.padded), jnp.float32),
            reached=jax.ShapeDtypeStruct((entries, plan.N, plan.tiles * W), jnp.int32),
        ),
        scratch=(
            Scratch(
                query=tile_memory((W, ROWS, plan.H), dtype),
                out=None if shared else tile_memory((W, ROWS, plan.Hv), out_dtype),
                rows=plgpu.SMEM((W, 2, ROWS), jnp.float32),
                key=tile_memory((stages, KEYS, plan.H), dtype),
                value=tile_memory((stages, KEYS, plan.Hv), dtype),
                needs=plgpu.SMEM((W, stages), jnp.int32),
                stopped=plgpu.SMEM((stages,), jnp.int32),
                loaded=plgpu.Barrier(num_barriers=W),
                ring=pipeline.ring(stages, arrivals=2, readers=W),
            ),
        ),
    )
    segments = (query_segments, key_segments) if plan.segments else None
    return run(Inputs(query, key, value, scale.reshape(1).astype(jnp.float32), key_ranges, offset, segments))


def _copy(plan: Plan, assigned: Assignment, inputs: Inputs, scratch: Scratch) -> None:
    """Copy the keys and values of the block to shared memory, tile by tile from right to left.

    The copying warpgroup runs this function. With `skip_below`, it stops when no computing warpgroup needs more tiles.
    """
    stages, skip, start = plan.stages, plan.skip_below is not None, assigned.start
    ring, needs = scratch.ring, scratch.needs

    def copy(state):
        j, _ = state
        step = assigned.stop - 1 - j
        stage = pipeline.free_stage(ring, step, stages)
        go = jnp.bool_(True)
        if skip:
            needed = needs[0, stage] if plan.warpgroups == 1 else jnp.maximum(needs[0, stage], needs[1, stage])
            go = (step < stages) | (needed > 0)
            scratch.stopped[stage] = jnp.where(go, 0, 1)

        @pl.when(go)
        def _():
            for ref, mem in ((inputs.key, scratch.key), (inputs.value, scratch.value)):
                tile = ref.at[assigned.b, pl.ds(j * KEYS, KEYS), assigned.head]
                plgpu.copy_gmem_to_smem(tile, mem.at[stage], ring.full.at[stage])

        if skip:

            @pl.when(~go)
            def _():  # arrive twice, because the barrier expects two copies
                plgpu.barrier_arrive(ring.full.at[stage])
                plgpu.barrier_arrive(ring.full.at[stage])

        return j - 1, go

    lax.while_loop(lambda s: (s[0] >= start) & s[1], copy, (assigned.stop - 1, jnp.bool_(True)))


def _compute(plan: Plan, assigned: Assignment, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
    """Compute the output and the cumulative log-decay of 64 query rows. Each computing warpgroup runs this function.

    The warpgroup computes the key tiles in the key-tile range of its rows, from right to left. If the block has two
    computing warpgroups, their ranges may differ. At a key tile that only the other warpgroup needs, this warpgroup
    only waits for the barrier `full` and arrives at the barrier `used`.
    """
    stages, dtype, skip = plan.stages, plan.dtype, plan.skip_below is not None
    ring, needs, wg = scratch.ring, scratch.needs, assigned.wg
    tile = assigned.i * plan.warpgroups + wg
    row = tile * ROWS
    query_rows = inputs.query.at[assigned.b, pl.ds(row, ROWS), assigned.n]
    plgpu.copy_gmem_to_smem(query_rows, scratch.query.at[wg], scratch.loaded.at[wg])
    plgpu.barrier_wait(scratch.loaded.at[wg])
    multiplier, position = inputs.scale[0] * LOG2E, inputs.offset[assigned.b]

    def visit(masked, state):
        j, _, high, low, acc = state
        stage = pipeline.full_stage(ring, assigned.stop - 1 - j, stages)
        # With segments and skip_below, no registers remain for the descriptors of the query, see `zeros`.
        (zero, _) = zeros(assigned.stop - 1 - j, masked and plan.segments and skip)
        z = shims.product(scratch.query.at[wg + zero], scratch.key.at[stage].transpose((1, 0))) * multiplier
        seen = None
        if masked:
            seen = visible(plan, inputs.segments, assigned.b, row, j * KEYS, KEYS, position)
        log_beta, softplus = sticks(z, seen)
        log_weights, total = shims.minus_sum_right(log_beta, None, softplus, high)
        weights = jnp.exp2(log_weights)
        high, low = two_sum(high, low, total)
        acc = shims.add_product(acc, weights.astype(dtype), scratch.value.at[stage])
        alive = jnp.bool_(True)
        if skip:
            alive = shims.any_at_most(high, -plan.skip_below)
            needs[wg, stage] = jnp.where(alive & (j > own_start), 1, 0)
        plgpu.barrier_arrive(ring.used.at[stage])
        return j - 1, alive, high, low, acc

    # An empty range is four zeros, but the copied tiles may begin further right, at `start`. So all four numbers of the
    # range are raised to `start`.
    own_stop, whole_stop, whole_start, own_start = (
        jnp.maximum(inputs.key_ranges[assigned.entry, tile, which], assigned.start) for which in range(4)
    )

    def wait_for_others(state):
        j, goes_on = state
        stage = pipeline.full_stage(ring, assigned.stop - 1 - j, stages)
        if skip:
            goes_on = scratch.stopped[stage] == 0
            needs[wg, stage] = jnp.where((j >= own_stop) & (own_stop > own_start), 1, 0)
        plgpu.barrier_arrive(ring.used.at[stage])
        return j - 1, goes_on

    def idle(j, until):
        lax.while_loop(lambda s: (s[0] >= until) & s[1], wait_for_others, (j, jnp.bool_(True)))

    idle(assigned.stop - 1, own_stop)
    zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), shims.ROW)
    acc = plgpu.layout_cast(jnp.zeros((ROWS, plan.Hv), jnp.float32), shims.TILE)
    high = finished_padding(plan, inputs.segments, assigned.b, row) if skip else zero
    # For a warpgroup without key tiles, `idle` may have stopped early. Then the loops below visit no tile.
    state = (own_stop - 1, jnp.bool_(True), high, zero, acc)
    for masked, until in ((True, whole_stop), (False, whole_start), (True, own_start)):
        if skip:
            state = lax.while_loop(lambda s, until=until: (s[0] >= until) & s[1], partial(visit, masked), state)
        else:
            state = lax.fori_loop(
                0, jnp.maximum(state[0] - until + 1, 0), lambda _, s, masked=masked: visit(masked, s), state
            )
    j, _, high, low, acc = state
    if skip:
        high = jnp.where(high >= FINISHED, 0.0, high)
    idle(j, assigned.start)
    outputs.reached[assigned.entry, assigned.n, tile] = j + 1
    _write(plan, assigned, row, acc, (high, low), outputs, scratch)


def _write(plan: Plan, assigned: Assignment, row, acc, log_decay, outputs: Outputs, scratch: Scratch) -> None:
    """Write the output and the cumulative log-decay of 64 query rows to global memory, through shared memory.

    In registers: `acc` [64, Hv] is the output, and `log_decay` is a pair of arrays [64] whose sum is the cumulative
    log-decay. `row` is the index of the first of the 64 rows.
    """
    wg, out_mem = assigned.wg, scratch.query if scratch.out is None else scratch.out
    out_mem[wg] = acc.astype(plan.out_dtype or plan.dtype)
    for part, x in enumerate(log_decay):
        scratch.rows[wg, part] = x
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_mem.at[wg], outputs.out.at[assigned.entry, pl.ds(row, ROWS), assigned.n])
    for part in range(2):
        target = outputs.log_decay.at[part, assigned.entry, assigned.n, pl.ds(row, ROWS)]
        plgpu.copy_smem_to_gmem(scratch.rows.at[wg, part], target)
    plgpu.wait_smem_to_gmem(0)
