"""The Triton kernel for dk and dv, the gradients of the keys and values.

A block computes dk and dv of one key tile. It sums over the query tiles whose queries see keys of this tile:
    dk = scale * dz^T @ Q,  dv = A^T @ dO,
with the attention weights A, the gradients dz of the logits, and the cotangent dO of the output. It computes A and dz
again, with the snapshots of `d_query`. These are two numbers for every query row and key tile:
- the sum of -log2(1 - beta) over all keys on the right of the tile;
- P: d_log_rem plus the sum of weight * <dO, value> over all keys on the left of the tile.
beta is the sigmoid of a logit, and d_log_rem is the cotangent of log_rem, the natural logarithm of the part of the
stick that remains. triton_d_query.py has all formulas.

R is the number of rows of a query tile, and C is the number of keys of a key tile. H is the width of queries and keys,
and Hv is the width of values. Hp and Hvp are H and Hv, padded to powers of two.
"""

import triton
import triton.language as tl

from . import triton_tile as tile


@triton.jit
def visit(
    i, b, column, k, v, multiplier, position, dk, dv, q_head, d_out_head, snapshots, query_segments_ref,
    key_segments_ref, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, Hv: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, Hp: tl.constexpr, Hvp: tl.constexpr, padded: tl.constexpr,
    attend_current: tl.constexpr, window: tl.constexpr, segments: tl.constexpr, precision: tl.constexpr,
    masked: tl.constexpr,
):  # fmt: skip
    """Add query tile i to the sums `dk` [C,Hp] and `dv` [C,Hvp] of the key tile of this block, and return the sums.

    The two sums are in registers. The sum `dk` is multiplied by the scale later, after the last query tile. The keys
    k [C,Hp] and the values v [C,Hvp] of the key tile are in registers too. `column` is the index of the first key of
    the tile, b is the index of the batch entry, `multiplier` is the scale times log2(e), and `position` is the position
    of the first query among the keys.

    The other arrays are in global memory. `q_head` points to the queries of one query head, and `d_out_head` points to
    the cotangent of their output. `snapshots` points to the snapshots of this query head and key tile: two arrays of
    `padded` numbers. `padded` is the number of query rows of a head, rounded up to whole tiles. The first array has
    the sums of -log2(1 - beta) over all keys on the right of the key tile, and the second array has P (see the module
    docstring).

    If `masked`, causality, the window and the segment ids may hide keys from queries. `query_segments_ref` points to
    the ids of all queries [B, padded], and `key_segments_ref` points to the ids of the keys of batch entry b. If not
    `masked`, every query sees every key.
    """
    row = i * R
    rows = row + tl.arange(0, R)
    q = tile.load(q_head, row, T, N * H, H, R, Hp)
    d_out = tile.load(d_out_head, row, T, N * Hv, Hv, R, Hvp)
    entering, prefix = tl.load(snapshots + rows), tl.load(snapshots + padded + rows)
    z = tile.product(q, tl.trans(k), precision) * multiplier
    if masked:
        last, first = tile.reach(position + rows, attend_current, window, S)
        query_segments = rows
        if segments:
            query_segments = tl.load(query_segments_ref + b * padded + rows)
        columns = column + tl.arange(0, C)
        seen = tile.visible(columns, last, first, query_segments, key_segments_ref, window, segments)
        z = tl.where(seen, z, tile.NOTHING)
    log_beta, softplus = tile.sticks(z)
    softplus = tl.minimum(softplus, tile.ENOUGH)
    weights = tile.weights_of(log_beta, softplus, entering)
    a = weights * tile.product(d_out, tl.trans(v), precision)  # before dv: otherwise more registers spill
    dv += tile.product(tl.trans(weights.to(d_out.dtype)), d_out, precision)
    dz = tile.d_logits(a, log_beta, softplus, prefix)
    dk += tile.product(tl.trans(dz.to(q.dtype)), q, precision)
    return dk, dv


@triton.jit
def d_key_value(
    q_ref, k_ref, v_ref, d_out_ref, snapshots_ref, reached_ref, query_ranges_ref, scale_ref, key_ranges_ref, offset_ref,
    query_segments_ref, key_segments_ref,
    dk_ref, dv_ref,
    B: tl.constexpr, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, Hv: tl.constexpr, R: tl.constexpr, C: tl.constexpr, Hp: tl.constexpr, Hvp: tl.constexpr,
    tiles: tl.constexpr, attend_current: tl.constexpr, window: tl.constexpr, segments: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one key tile of one key head, and write them to global memory.

    Each argument whose name ends in `_ref` points to an array in global memory. The array at `query_ranges_ref` is a
    result of `query_tile_ranges`. All other arrays are arguments and results of `Kernels.d_key_value`. `tiles` is the
    number of query tiles of a head.
    """
    program = tl.program_id(0)
    key_tiles: tl.constexpr = (S + C - 1) // C
    j, b, head = program // (B * K), program // K % B, program % K  # key tiles with the most queries come first
    column = j * C
    k_head, v_head = tile.head_of(k_ref, b, head, S, K, H), tile.head_of(v_ref, b, head, S, K, Hv)
    k, v = tile.load(k_head, column, S, K * H, H, C, Hp), tile.load(v_head, column, S, K * Hv, Hv, C, Hvp)
    scale, position = tl.load(scale_ref), tl.load(offset_ref + b)
    multiplier = scale * tile.LOG2E
    if segments:
        key_segments_ref += b * (key_tiles * C)
    dk = tl.zeros([C, Hp], tl.float32)
    dv = tl.zeros([C, Hvp], tl.float32)
    for member in range(0, N // K):
        n = head * (N // K) + member
        q_head, d_out_head = tile.head_of(q_ref, b, n, T, N, H), tile.head_of(d_out_ref, b, n, T, N, Hv)
        snapshots = snapshots_ref + ((b * N + n) * key_tiles + j).to(tl.int64) * (2 * tiles * R)
        query_ranges = query_ranges_ref + ((b * N + n) * key_tiles + j) * 4  # first, whole_first, whole_stop, stop
        for part in tl.static_range(3):
            begin, until = tl.load(query_ranges + part), tl.load(query_ranges + part + 1)
            for i in range(begin, until):
                if part == 1:
                    dk, dv = visit(
                        i, b, column, k, v, multiplier, position, dk, dv, q_head, d_out_head, snapshots,
                        query_segments_ref, key_segments_ref, T, S, N, H, Hv, R, C, Hp, Hvp, tiles * R, attend_current,
                        window, segments, precision, False,
                    )  # fmt: skip
                else:
                    key_range = key_ranges_ref + (b * tiles + i) * 4  # stop, whole_stop, whole_start, start
                    stop, start = tl.load(key_range), tl.load(key_range + 3)
                    start = tl.maximum(start, tl.load(reached_ref + (b * N + n) * tiles + i))
                    if (j >= start) & (j < stop):
                        dk, dv = visit(
                            i, b, column, k, v, multiplier, position, dk, dv, q_head, d_out_head, snapshots,
                            query_segments_ref, key_segments_ref, T, S, N, H, Hv, R, C, Hp, Hvp, tiles * R,
                            attend_current, window, segments, precision, True,
                        )  # fmt: skip

    dk_tile = tile.pointers(tile.head_of(dk_ref, b, head, S, K, H), column, K * H, C, Hp)
    tl.store(dk_tile, (dk * scale).to(dk_ref.dtype.element_ty), mask=tile.inside(column, S, H, C, Hp))
    dv_tile = tile.pointers(tile.head_of(dv_ref, b, head, S, K, Hv), column, K * Hv, C, Hvp)
    tl.store(dv_tile, dv.to(dv_ref.dtype.element_ty), mask=tile.inside(column, S, Hv, C, Hvp))
