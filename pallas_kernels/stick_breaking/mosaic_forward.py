"""The forward pass on Hopper GPUs (Pallas Mosaic GPU).

A block owns 64 query rows of one head per compute warpgroup and walks the key tiles from the diagonal to the left; a
third warpgroup copies the tiles ahead of it.

Registers stay where they are: everything fits the 168 per thread that three warpgroups leave, and JAX's linker ignores
the instruction that moves them.
"""

from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import cost, seam
from .logarithm import LOG2E
from .mosaic_tile import (
    FINISHED,
    KEYS,
    ROWS,
    Plan,
    block,
    finished_padding,
    sticks,
    tile_memory,
    two_sum,
    visible,
    visited,
)


def forward(plan: Plan, query, key, value, scale, spans, offset, query_segments=None, key_segments=None):
    """(out [B,T,N,Hv], spent [2,B,N,rows padded], first visited tile [B,N,tiles * warpgroups]); B times splits."""
    W, stages, dtype = plan.warpgroups, plan.stages, plan.dtype
    skip = plan.skip_below is not None
    padded, entries, out_dtype = plan.tiles * W * ROWS, plan.B * plan.splits, plan.out_dtype or dtype
    shared = plan.H == plan.Hv and out_dtype == dtype  # the output takes the place of the query

    def stick_breaking_forward(q_ref, k_ref, v_ref, scale_ref, spans_ref, offset_ref, *refs):
        segments, refs = (refs[:2], refs[2:]) if plan.segments else (None, refs)
        out_ref, spent_ref, reached_ref, *refs = refs
        q_mem, out_mem, row_mem, k_mem, v_mem, needs, stopped, loaded, full, used = refs
        out_mem = q_mem if out_mem is None else out_mem
        entry, n, i = block(plan)
        b = entry % plan.B
        head = n // (plan.N // plan.K)
        wg = lax.axis_index("wg")

        def bound(w, which):
            return spans_ref[entry, i * W + w, which]

        stop, start = visited(bound, W)

        @pl.when(wg == W)
        def copy():
            def load(state):
                j, _ = state
                step = stop - 1 - j
                slot = step % stages

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(used.at[slot])

                go = jnp.bool_(True)
                if skip:
                    needed = needs[0, slot] if W == 1 else jnp.maximum(needs[0, slot], needs[1, slot])
                    go = (step < stages) | (needed > 0)
                    stopped[slot] = jnp.where(go, 0, 1)

                @pl.when(go)
                def _():
                    for ref, mem in ((k_ref, k_mem), (v_ref, v_mem)):
                        plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(j * KEYS, KEYS), head], mem.at[slot], full.at[slot])

                if skip:

                    @pl.when(~go)
                    def _():
                        plgpu.barrier_arrive(full.at[slot])
                        plgpu.barrier_arrive(full.at[slot])

                return j - 1, go

            lax.while_loop(lambda s: (s[0] >= start) & s[1], load, (stop - 1, jnp.bool_(True)))

        @pl.when(wg < W)
        def compute():
            row = (i * W + wg) * ROWS
            plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(row, ROWS), n], q_mem.at[wg], loaded.at[wg])
            plgpu.barrier_wait(loaded.at[wg])
            multiplier, position = scale_ref[0] * LOG2E, offset_ref[b]

            def visit(masked, state):
                j, _, high, low, acc = state
                slot = (stop - 1 - j) % stages
                plgpu.barrier_wait(full.at[slot])
                z = seam.product(q_mem.at[wg], k_mem.at[slot].transpose((1, 0))) * multiplier
                seen = None
                if masked:
                    seen = visible(plan, segments, b, row, j * KEYS, KEYS, position)
                log_beta, softplus = sticks(z, seen)
                log_weights, total = seam.minus_sum_right(log_beta, None, softplus, high)
                weights = jnp.exp2(log_weights)
                high, low = two_sum(high, low, total)
                acc = seam.add_product(acc, weights.astype(dtype), v_mem.at[slot])
                alive = jnp.bool_(True)
                if skip:
                    alive = seam.any_at_most(high, -plan.skip_below)
                    needs[wg, slot] = jnp.where(alive & (j > own_start), 1, 0)
                plgpu.barrier_arrive(used.at[slot])
                return j - 1, alive, high, low, acc

            own_stop, whole_stop, whole_start, own_start = (bound(wg, which) for which in range(4))

            def wait_for_others(state):
                j, going = state
                slot = (stop - 1 - j) % stages
                plgpu.barrier_wait(full.at[slot])
                if skip:
                    going = stopped[slot] == 0
                    needs[wg, slot] = jnp.where((j >= own_stop) & (own_stop > own_start), 1, 0)
                plgpu.barrier_arrive(used.at[slot])
                return j - 1, going

            def idle(j, until):
                return lax.while_loop(lambda s: (s[0] >= until) & s[1], wait_for_others, (j, jnp.bool_(True)))[0]

            first = idle(stop - 1, own_stop)
            zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), seam.ROW)
            acc = plgpu.layout_cast(jnp.zeros((ROWS, plan.Hv), jnp.float32), seam.TILE)
            state = (first, jnp.bool_(True), finished_padding(plan, segments, b, row) if skip else zero, zero, acc)
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
            idle(j, start)

            reached_ref[entry, n, i * W + wg] = j + 1
            out_mem[wg] = acc.astype(out_dtype)
            for part, x in enumerate((high, low)):
                row_mem[wg, part] = x
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_mem.at[wg], out_ref.at[entry, pl.ds(row, ROWS), n])
            for part in range(2):
                plgpu.copy_smem_to_gmem(row_mem.at[wg, part], spent_ref.at[part, entry, n, pl.ds(row, ROWS)])
            plgpu.wait_smem_to_gmem(0)

    out_type = (
        jax.ShapeDtypeStruct((entries, query.shape[1], plan.N, plan.Hv), out_dtype),
        jax.ShapeDtypeStruct((2, entries, plan.N, padded), jnp.float32),
        jax.ShapeDtypeStruct((entries, plan.N, plan.tiles * W), jnp.int32),
    )
    scratch = (
        tile_memory((W, ROWS, plan.H), dtype),
        None if shared else tile_memory((W, ROWS, plan.Hv), out_dtype),
        plgpu.SMEM((W, 2, ROWS), jnp.float32),
        tile_memory((stages, KEYS, plan.H), dtype),
        tile_memory((stages, KEYS, plan.Hv), dtype),
        plgpu.SMEM((W, stages), jnp.int32),
        plgpu.SMEM((stages,), jnp.int32),
        plgpu.Barrier(num_barriers=W),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=W, num_barriers=stages),
    )
    run = plgpu.kernel(
        stick_breaking_forward,
        out_type=out_type,
        scratch_types=scratch,
        grid=(entries * plan.N * plan.tiles,),
        grid_names=("block",),
        num_threads=W + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    run = cost.kernel("stick_breaking_forward", 2 * plan.scores * (plan.H + plan.Hv), run)
    segments = (query_segments, key_segments) if plan.segments else ()
    return run(query, key, value, scale.reshape(1).astype(jnp.float32), spans, offset, *segments)
