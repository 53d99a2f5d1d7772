"""The gradient of the queries on Hopper GPUs, and the snapshots for that of keys and values: see mosaic_backward.py."""

from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import cost, seam
from .logarithm import LOG2E
from .mosaic_backward import HALF, SWIZZLE, d_logits, weights_of, zeros
from .mosaic_tile import KEYS, ROWS, Plan, block, tile_memory, two_sum, visible, visited


def d_query(
    plan: Plan, query, key, value, d_out, d_log_rem, spent, reached, scale, spans, offset,
    query_segments=None, key_segments=None,
):  # fmt: skip
    """(dq [B,T,N,H], d_scale of every row [B,N,rows padded], snapshots [B,N,key tiles,2 halves,2,rows padded]).

    Snapshots hold what was spent on entry, and P; anything where not visited. `d_log_rem` [B,N,rows padded]; `spent`
    and `reached` as the forward pass left them.
    """
    W, stages, dtype = plan.warpgroups, plan.stages, plan.dtype
    padded = plan.tiles * W * ROWS
    memory = partial(tile_memory, dtype=dtype, swizzle=SWIZZLE)

    def stick_breaking_d_query(
        q_ref, k_ref, v_ref, do_ref, dr_ref, spent_ref, reached_ref, scale_ref, spans_ref, offset_ref, *refs
    ):
        segments, refs = (refs[:2], refs[2:]) if plan.segments else (None, refs)
        dq_ref, d_scale_ref, snap_ref, q_mem, do_mem, row_mem, k_mem, v_mem, snap_mem, loaded, full, used = refs
        b, n, i = block(plan)
        head = n // (plan.N // plan.K)
        wg = lax.axis_index("wg")

        def bound(w, which):
            x = spans_ref[b, i * W + w, which]
            return jnp.maximum(x, reached_ref[b, n, i * W + w]) if which else x

        stop, start = visited(bound, W)

        @pl.when(wg == W)
        def copy():
            def load(step, _):
                slot = step % stages

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(used.at[slot])

                for half in range(2):
                    keys = pl.ds((start + step) * KEYS + half * HALF, HALF)
                    for ref, mem in ((k_ref, k_mem), (v_ref, v_mem)):
                        plgpu.copy_gmem_to_smem(ref.at[b, keys, head], mem[half].at[slot], full.at[slot])

            lax.fori_loop(0, jnp.maximum(stop - start, 0), load, None)

        @pl.when(wg < W)
        def compute():
            row = (i * W + wg) * ROWS
            rows = pl.ds(row, ROWS)
            for source, mem in (
                (q_ref.at[b, rows, n], q_mem.at[wg]),
                (do_ref.at[b, rows, n], do_mem.at[wg]),
                (dr_ref.at[b, n, rows], row_mem.at[wg, 0]),
                (spent_ref.at[0, b, n, rows], row_mem.at[wg, 1]),
                (spent_ref.at[1, b, n, rows], row_mem.at[wg, 2]),
            ):
                plgpu.copy_gmem_to_smem(source, mem, loaded.at[wg])
            plgpu.barrier_wait(loaded.at[wg])
            prefix, high, low = (plgpu.load(row_mem.at[wg, part], layout=seam.ROW) for part in range(3))
            multiplier, position = scale_ref[0] * LOG2E, offset_ref[b]

            def visit(masked, j, state):
                slot = (j - start) % stages
                plgpu.barrier_wait(full.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for half, zero in enumerate(zeros(j, plan.H + plan.Hv > 128 or plan.segments)):
                    prefix, high, low, acc = state
                    own = wg + zero
                    keys = pl.ds(j * KEYS + half * HALF, HALF)
                    z = seam.product(q_mem.at[own], k_mem[half].at[slot].transpose((1, 0))) * multiplier
                    d_weights = seam.product(do_mem.at[own], v_mem[half].at[slot].transpose((1, 0)))
                    seen = None
                    if masked:
                        seen = visible(plan, segments, b, row, keys.start, HALF, position)
                    entered = []

                    def entering(total, entered=entered, high=high, low=low):
                        entered[:] = two_sum(high, low, -total)
                        return entered[0] + entered[1]

                    weights, logs = weights_of(z, seen, entering)
                    dz, total_a = d_logits(weights * d_weights, logs, prefix)
                    acc = seam.add_product(acc, dz.astype(dtype), k_mem[half].at[slot])
                    snap_mem[wg, half, 0], snap_mem[wg, half, 1] = entered[0] + entered[1], prefix
                    state = prefix + total_a, *entered, acc
                plgpu.barrier_arrive(used.at[slot])
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(snap_mem.at[wg], snap_ref.at[b, n, j, :, :, rows])
                return state

            def idle(j, _):
                slot = (j - start) % stages
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(used.at[slot])

            own_stop, whole_stop, whole_start, own_start = (bound(wg, which) for which in range(4))
            acc = plgpu.layout_cast(jnp.zeros((ROWS, plan.H), jnp.float32), seam.TILE)
            state = prefix, high, low, acc
            lax.fori_loop(start, jnp.minimum(own_start, stop), idle, None)
            state = lax.fori_loop(own_start, whole_start, partial(visit, True), state)
            state = lax.fori_loop(whole_start, whole_stop, partial(visit, False), state)
            state = lax.fori_loop(jnp.maximum(whole_stop, own_start), own_stop, partial(visit, True), state)
            lax.fori_loop(jnp.maximum(own_stop, start), stop, idle, None)

            acc = state[3]
            # The sum of dz * q.k over the keys, before anything is rounded; in pieces, for the sake of registers.
            d_scale = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), seam.ROW)
            for first in range(0, plan.H, HALF):
                q = plgpu.load(q_mem.at[wg, :, pl.ds(first, HALF)], layout=seam.TILE).astype(jnp.float32)
                d_scale += (acc[:, first : first + HALF] * q).sum(1)
            plgpu.commit_smem()  # all have read what is overwritten next
            d_scale_ref[b, n, rows] = d_scale
            q_mem[wg] = (acc * scale_ref[0]).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_mem.at[wg], dq_ref.at[b, rows, n])
            plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        stick_breaking_d_query,
        out_type=(
            jax.ShapeDtypeStruct(query.shape, dtype),
            jax.ShapeDtypeStruct((plan.B, plan.N, padded), jnp.float32),
            jax.ShapeDtypeStruct((plan.B, plan.N, -(-plan.S // KEYS), 2, 2, padded), jnp.float32),
        ),
        scratch_types=(
            memory((W, ROWS, plan.H)),
            memory((W, ROWS, plan.Hv)),
            plgpu.SMEM((W, 3, ROWS), jnp.float32),
            (memory((stages, HALF, plan.H)),) * 2,
            (memory((stages, HALF, plan.Hv)),) * 2,
            plgpu.SMEM((W, 2, 2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=5, num_barriers=W),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=W, num_barriers=stages),
        ),
        grid=(plan.B * plan.N * plan.tiles,),
        grid_names=("block",),
        num_threads=W + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    run = cost.kernel("stick_breaking_d_query", 2 * plan.scores * (2 * plan.H + plan.Hv), run)
    segments = (query_segments, key_segments) if plan.segments else ()
    scale = scale.reshape(1).astype(jnp.float32)
    return run(query, key, value, d_out, d_log_rem, spent, reached, scale, spans, offset, *segments)
