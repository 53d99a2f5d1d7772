"""The gradients of keys and values on Hopper GPUs: see mosaic_backward.py."""

from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import cost, seam
from .logarithm import LOG2E
from .mosaic_backward import HALF, SWIZZLE, d_logits, weights_of, zeros
from .mosaic_tile import KEYS, ROWS, Plan, tile_memory, visible

NOWHERE = -(2**30)  # a position left of all keys


def d_key_value(
    plan: Plan, query, key, value, d_out, snapshots, reached, scale, spans, offset,
    query_segments=None, key_segments=None,
):  # fmt: skip
    """(dk [B,S,K,H], dv [B,S,K,Hv]).

    Two warpgroups share 64 keys and take one of two neighbouring query tiles each. They exchange A and dz through
    shared memory; then the first adds both tiles to dv and the second to dk, so that neither holds both sums. Tiles
    that need no mask come first, the others behind them; the copying warpgroup decides and ends both loops.
    """
    stages, dtype, G = plan.stages, plan.dtype, plan.N // plan.K
    query_tiles = spans.shape[1]
    pairs = -(-query_tiles // 2)
    key_tiles = -(-plan.S // KEYS)
    memory = partial(tile_memory, dtype=dtype, swizzle=SWIZZLE)
    ahead = plan.H + plan.Hv < 512  # whether there is room to copy snapshots ahead, by the copy engine
    arrivals = 6 if ahead else 4

    def stick_breaking_d_key_value(
        q_ref, k_ref, v_ref, do_ref, snap_ref, reached_ref, scale_ref, spans_ref, offset_ref, *refs
    ):
        segments, refs = (refs[:2], refs[2:]) if plan.segments else (None, refs)
        (dk_ref, dv_ref), refs = refs[:2], refs[2:]
        k_mem, v_mem, q_mem, do_mem, snap_mem, tiles_mem, w_mem, dz_mem, *barriers = refs
        resident, full, used, exchanged, drained = barriers
        item = lax.axis_index("block")
        j, head, b = item // (plan.B * plan.K), item % plan.K, item // plan.K % plan.B
        wg = lax.axis_index("wg")

        @pl.when(wg == 2)
        def copy():
            def kind(n, i):
                """0: not visited, 1: with a mask, 2: whole."""
                inside = i < query_tiles
                i = jnp.minimum(i, query_tiles - 1)
                visits = (j < spans_ref[b, i, 0]) & (j >= spans_ref[b, i, 3]) & (j >= reached_ref[b, n, i])
                whole = (j < spans_ref[b, i, 1]) & (j >= spans_ref[b, i, 2])
                return jnp.where(inside & visits, jnp.where(whole, 2, 1), 0)

            def send(step, go, n, pair, both):
                slot = step % stages

                @pl.when(go & (step >= stages))
                def _():
                    plgpu.barrier_wait(used.at[slot])

                @pl.when(go)
                def _():
                    for w in range(2):
                        # In the place of a tile that is not visited stands the other one, and no key is seen from it.
                        is_visited = both[w] > 0
                        row = (pair * 2 + jnp.where(is_visited, w, 1 - w)) * ROWS
                        for what, x in enumerate((both[w], row, n)):
                            tiles_mem[slot, w, what] = x
                        rows = pl.ds(row, ROWS)
                        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q_mem[w].at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(do_ref.at[b, rows, n], do_mem[w].at[slot], full.at[slot])
                        if ahead:
                            entered = snap_ref.at[b, n, j, :, :, rows]
                            plgpu.copy_gmem_to_smem(entered, snap_mem.at[slot, w], full.at[slot])

                return step + jnp.where(go, 1, 0)

            def end(step):
                slot = step % stages

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(used.at[slot])

                for w in range(2):
                    tiles_mem[slot, w, 0] = -1
                for _ in range(arrivals):
                    plgpu.barrier_arrive(full.at[slot])
                return step + 1

            step = jnp.int32(0)
            for whole in (True, False):

                def visit(t, step, whole=whole):
                    n, pair = head * G + t // pairs, t % pairs
                    both = kind(n, pair * 2), kind(n, pair * 2 + 1)
                    all_whole = jnp.minimum(both[0], both[1]) == 2
                    go = all_whole if whole else ~all_whole & (jnp.maximum(both[0], both[1]) > 0)
                    return send(step, go, n, pair, both)

                step = end(lax.fori_loop(0, G * pairs, visit, step))

        def compute(own, mine, other, own_ref, width, factor):
            """Warpgroup `own` (0 for dv, 1 for dk): the sum of mine^T @ other over all tiles, times the factor.

            It leaves through the first stage of other[own], which the other warpgroup does not read.
            """
            if own == 0:
                for half in range(2):
                    for ref, mem in ((k_ref, k_mem), (v_ref, v_mem)):
                        part = ref.at[b, pl.ds(j * KEYS + half * HALF, HALF), head]
                        plgpu.copy_gmem_to_smem(part, mem.at[half], resident)
            plgpu.barrier_wait(resident)
            multiplier, position = scale_ref[0] * LOG2E, offset_ref[b]

            def visit(masked, state):
                step, _, acc = state
                slot = step % stages
                plgpu.barrier_wait(full.at[slot])
                kind, row, n = (tiles_mem[slot, own, what] for what in range(3))
                opaque = zeros(step, plan.H + plan.Hv > 64)

                def tile(acc):
                    for half, zero in enumerate(opaque):
                        at = slot + zero
                        z = seam.product(q_mem[own].at[at], k_mem.at[half + zero].transpose((1, 0))) * multiplier
                        d_weights = seam.product(do_mem[own].at[at], v_mem.at[half + zero].transpose((1, 0)))
                        if ahead:
                            entered = snap_mem.at[slot, own, half]
                        else:
                            entered = snap_ref.at[b, n, j, half, :, pl.ds(row, ROWS)]
                        entering, prefix = (plgpu.load(entered.at[part], layout=seam.ROW) for part in range(2))
                        seen = None
                        if masked:
                            column = j * KEYS + half * HALF
                            stands = jnp.where(kind > 0, position, NOWHERE)
                            seen = visible(plan, segments, b, row, column, HALF, stands)
                        weights, logs = weights_of(z, seen, entering)
                        dz, _ = d_logits(weights * d_weights, logs, prefix)
                        if half == 0:
                            plgpu.barrier_wait(drained)
                        w_mem[own, :, half * HALF : (half + 1) * HALF] = weights.astype(dtype)
                        dz_mem[own, :, half * HALF : (half + 1) * HALF] = dz.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(exchanged)
                    plgpu.barrier_wait(exchanged)
                    for w, zero in enumerate(opaque):
                        acc = seam.add_product(acc, mine.at[w + zero].transpose((1, 0)), other[w].at[slot + zero])
                    plgpu.barrier_arrive(drained)
                    return acc

                going = kind >= 0
                acc = lax.cond(going, tile, lambda acc: acc, acc)
                plgpu.barrier_arrive(used.at[slot])
                return step + 1, going, acc

            acc = plgpu.layout_cast(jnp.zeros((KEYS, width), jnp.float32), seam.TILE)
            plgpu.barrier_arrive(drained)
            step = jnp.int32(0)
            for masked in (False, True):
                state = step, jnp.bool_(True), acc
                step, _, acc = lax.while_loop(lambda s: s[1], partial(visit, masked), state)
            plgpu.barrier_wait(drained)  # the other one may still read this step's query tiles
            out_mem = other[own].at[0]
            out_mem[...] = (acc * factor).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_mem, own_ref.at[b, pl.ds(j * KEYS, KEYS), head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 0)
        def _():
            compute(0, w_mem, do_mem, dv_ref, plan.Hv, 1.0)

        @pl.when(wg == 1)
        def _():
            compute(1, dz_mem, q_mem, dk_ref, plan.H, scale_ref[0])

    run = plgpu.kernel(
        stick_breaking_d_key_value,
        out_type=(
            jax.ShapeDtypeStruct(key.shape, dtype),
            jax.ShapeDtypeStruct(value.shape, dtype),
        ),
        scratch_types=(
            memory((2, HALF, plan.H)),
            memory((2, HALF, plan.Hv)),
            (memory((stages, ROWS, plan.H)),) * 2,
            (memory((stages, ROWS, plan.Hv)),) * 2,
            plgpu.SMEM((stages, 2, 2, 2, ROWS), jnp.float32) if ahead else None,
            plgpu.SMEM((stages, 2, 3), jnp.int32),  # of every tile: its kind, its first row, its head
            memory((2, ROWS, KEYS)),
            memory((2, ROWS, KEYS)),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ),
        grid=(plan.B * plan.K * key_tiles,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    run = cost.kernel("stick_breaking_d_key_value", 2 * plan.scores * (2 * plan.H + 2 * plan.Hv), run)
    segments = (query_segments, key_segments) if plan.segments else ()
    scale = scale.reshape(1).astype(jnp.float32)
    return run(query, key, value, d_out, snapshots, reached, scale, spans, offset, *segments)
