"""The backward pass on Hopper GPUs (Pallas Mosaic GPU): two kernels, seven products, no atomics.

With dA = dO V^T, a = A dA and P = d_log_rem + the sum of a over the keys further left,
    dz = (1 - beta) a - beta P,  dq = scale dz K,  dk = scale dz^T Q,  dv = A^T dO.
`d_query` owns 64 rows per warpgroup and walks the key tiles from the left, which makes P a running sum; it leaves, for
every pair of tiles, the stick on entry and P (`snapshots`). `d_key_value` owns 64 keys and reads them in any order.
"""

from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .. import seam
from .mosaic_forward import LOG2E, ROWS, Plan, block, sticks, tile_memory, two_sum, visible, visited

KEYS = 64  # of a tile, taken in two halves: a whole one would not fit the registers next to the sums
HALF = KEYS // 2
SWIZZLE = 64  # bytes: as wide as a half, along which tiles are multiplied
NOWHERE = -(2**30)  # a query row left of all keys


def _row(x):
    return plgpu.layout_cast(x, seam.ROW)


def _zeros(step, opaque: bool):
    """Two zeros, of which no compiler knows that they are zero or the same where they are opaque; step below 2^24.

    What a product reads from the same place in every iteration has the same descriptors, one for every 16 columns, and
    the compiler would keep them all in registers, from half to half and from iteration to iteration. An opaque zero in
    the place makes it add them up again, in uniform registers.
    """
    return [lax.shift_right_logical(step, 24 + half) if opaque else jnp.int32(0) for half in range(2)]


def _weights(z, seen, entering):
    """(A, beta and 1 - beta as logarithms, what the tile spends) of logits z in units of log2.

    `entering`: what rows have spent before the tile, or a function of what the tile spends that returns it.
    """
    log_beta, softplus = sticks(z, seen)
    start = _row(jnp.zeros((ROWS,), jnp.float32)) if callable(entering) else entering
    log_weights, total = seam.minus_sum_right(log_beta, None, softplus, start)
    if callable(entering):
        log_weights -= lax.broadcast_in_dim(entering(total), z.shape, [0])
    return jnp.exp2(log_weights), (log_beta, -softplus)


def _d_logits(a, logs, prefix):
    """(dz, the sum of a): neither beta nor 1 - beta is one minus the other."""
    beta, rest = (jnp.exp2(x) for x in logs)
    return seam.minus_sum_left(rest * a, beta, a, prefix)


def d_query(
    plan: Plan, query, key, value, d_out, d_log_rem, spent, reached, scale, spans, offset,
    query_segments=None, key_segments=None,
):  # fmt: skip
    """(dq [B,T,N,H], snapshots [B,N,key tiles,2 halves,2,rows padded]: spent on entry, P; anything where not visited).

    `d_log_rem` [B,N,rows padded]; `spent` and `reached` as the forward pass left them.
    """
    W, stages, dtype = plan.warpgroups, plan.stages, plan.dtype
    padded = plan.tiles * W * ROWS
    memory = partial(tile_memory, dtype=dtype, swizzle=SWIZZLE)

    def stick_breaking_d_query(
        q_ref, k_ref, v_ref, do_ref, dr_ref, spent_ref, reached_ref, scale_ref, spans_ref, offset_ref, *refs
    ):
        if plan.segments:
            (q_segments_ref, k_segments_ref), refs = refs[:2], refs[2:]
        dq_ref, snap_ref, q_mem, do_mem, row_mem, k_mem, v_mem, snap_mem, loaded, full, used = refs
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
                for half, zero in enumerate(_zeros(j, plan.H + plan.Hv > 128)):
                    prefix, high, low, acc = state
                    own = wg + zero
                    keys = pl.ds(j * KEYS + half * HALF, HALF)
                    z = seam.product(q_mem.at[own], k_mem[half].at[slot].transpose((1, 0))) * multiplier
                    d_weights = seam.product(do_mem.at[own], v_mem[half].at[slot].transpose((1, 0)))
                    seen = None
                    if masked:
                        q_segments = k_segments = None
                        if plan.segments:
                            q_segments = plgpu.load(q_segments_ref.at[b, rows], layout=seam.ROW)
                            k_segments = plgpu.load(k_segments_ref.at[b, keys], layout=seam.COLUMN)
                        seen = visible(plan, HALF, row, keys.start, position, q_segments, k_segments)
                    entered = []

                    def entering(total, entered=entered, high=high, low=low):
                        entered[:] = two_sum(high, low, -total)
                        return entered[0] + entered[1]

                    weights, logs = _weights(z, seen, entering)
                    dz, total_a = _d_logits(weights * d_weights, logs, prefix)
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

            q_mem[wg] = (state[3] * scale_ref[0]).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_mem.at[wg], dq_ref.at[b, rows, n])
            plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        stick_breaking_d_query,
        out_type=(
            jax.ShapeDtypeStruct((plan.B, plan.rows, plan.N, plan.H), dtype),
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
    segments = (query_segments, key_segments) if plan.segments else ()
    scale = scale.reshape(1).astype(jnp.float32)
    return run(query, key, value, d_out, d_log_rem, spent, reached, scale, spans, offset, *segments)


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

    def stick_breaking_d_key_value(
        q_ref, k_ref, v_ref, do_ref, snap_ref, reached_ref, scale_ref, spans_ref, offset_ref, *refs
    ):
        if plan.segments:
            (q_segments_ref, k_segments_ref), refs = refs[:2], refs[2:]
        (
            dk_ref,
            dv_ref,
            k_mem,
            v_mem,
            dk_mem,
            dv_mem,
            q_mem,
            do_mem,
            snap_mem,
            kinds,
            places,
            w_mem,
            dz_mem,
            *barriers,
        ) = refs
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
                        kinds[slot, w] = both[w]
                        places[slot, w] = jnp.where(is_visited, row, NOWHERE)
                        rows = pl.ds(row, ROWS)
                        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q_mem[w].at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(do_ref.at[b, rows, n], do_mem[w].at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(snap_ref.at[b, n, j, :, :, rows], snap_mem.at[slot, w], full.at[slot])

                return step + jnp.where(go, 1, 0)

            def end(step):
                slot = step % stages

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(used.at[slot])

                for w in range(2):
                    kinds[slot, w] = -1
                for _ in range(6):
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

        def compute(own, mine, other, own_mem, own_ref, width, factor):
            """Warpgroup `own` (0 for dv, 1 for dk): the sum of mine^T @ other over all tiles, times the factor."""
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
                kind = kinds[slot, own]
                zeros = _zeros(step, plan.H + plan.Hv > 64)

                def tile(acc):
                    for half, zero in enumerate(zeros):
                        at = slot + zero
                        z = seam.product(q_mem[own].at[at], k_mem.at[half + zero].transpose((1, 0))) * multiplier
                        d_weights = seam.product(do_mem[own].at[at], v_mem.at[half + zero].transpose((1, 0)))
                        entering, prefix = (
                            plgpu.load(snap_mem.at[slot, own, half, part], layout=seam.ROW) for part in range(2)
                        )
                        seen = None
                        if masked:
                            q_segments = k_segments = None
                            row, column = places[slot, own], j * KEYS + half * HALF
                            if plan.segments:
                                rows = pl.ds(jnp.maximum(row, 0), ROWS)
                                q_segments = plgpu.load(q_segments_ref.at[b, rows], layout=seam.ROW)
                                k_segments = plgpu.load(k_segments_ref.at[b, pl.ds(column, HALF)], layout=seam.COLUMN)
                            seen = visible(plan, HALF, row, column, position, q_segments, k_segments)
                        weights, logs = _weights(z, seen, entering)
                        dz, _ = _d_logits(weights * d_weights, logs, prefix)
                        if half == 0:
                            plgpu.barrier_wait(drained)
                        w_mem[own, :, half * HALF : (half + 1) * HALF] = weights.astype(dtype)
                        dz_mem[own, :, half * HALF : (half + 1) * HALF] = dz.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(exchanged)
                    plgpu.barrier_wait(exchanged)
                    for w, zero in enumerate(zeros):
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
            own_mem[...] = (acc * factor).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_mem, own_ref.at[b, pl.ds(j * KEYS, KEYS), head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 0)
        def _():
            compute(0, w_mem, do_mem, dv_mem, dv_ref, plan.Hv, 1.0)

        @pl.when(wg == 1)
        def _():
            compute(1, dz_mem, q_mem, dk_mem, dk_ref, plan.H, scale_ref[0])

    run = plgpu.kernel(
        stick_breaking_d_key_value,
        out_type=(
            jax.ShapeDtypeStruct((plan.B, plan.S, plan.K, plan.H), dtype),
            jax.ShapeDtypeStruct((plan.B, plan.S, plan.K, plan.Hv), dtype),
        ),
        scratch_types=(
            memory((2, HALF, plan.H)),
            memory((2, HALF, plan.Hv)),
            memory((KEYS, plan.H)),
            memory((KEYS, plan.Hv)),
            (memory((stages, ROWS, plan.H)),) * 2,
            (memory((stages, ROWS, plan.Hv)),) * 2,
            plgpu.SMEM((stages, 2, 2, 2, ROWS), jnp.float32),
            plgpu.SMEM((stages, 2), jnp.int32),
            plgpu.SMEM((stages, 2), jnp.int32),
            memory((2, ROWS, KEYS)),
            memory((2, ROWS, KEYS)),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=6, num_barriers=stages),
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
    segments = (query_segments, key_segments) if plan.segments else ()
    scale = scale.reshape(1).astype(jnp.float32)
    return run(query, key, value, d_out, snapshots, reached, scale, spans, offset, *segments)
