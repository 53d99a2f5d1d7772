"""The Triton kernel for the forward pass of stick-breaking attention.

A block computes one tile of R query rows. It visits key tiles of C keys each: first the nearest key tile, then the
next one on the left, and so on. H is the width of queries and keys, and Hv is the width of values. Hp and Hvp are H
and Hv, padded to powers of two.
"""

import triton
import triton.language as tl

from . import triton_tile as tile


@triton.jit
def visit(
    j, q, multiplier, high, low, acc, k_head, v_head, last, first, query_segments, key_segments_ref,
    S: tl.constexpr, K: tl.constexpr, H: tl.constexpr, Hv: tl.constexpr, C: tl.constexpr, Hp: tl.constexpr,
    Hvp: tl.constexpr, window: tl.constexpr, segments: tl.constexpr, precision: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Add key tile j to the running sums `high`, `low` and `acc` of a query tile, and return the new sums.

    The sums are in registers. high + low [R] is the cumulative log-decay of the query rows: -log2 of the part of the
    stick that remains. `acc` [R,Hvp] is the sum of weight * v over the keys visited so far. After the last key tile,
    `acc` is the output. q [R,Hp] are the queries. `k_head` and `v_head` point to the keys and values of one head in
    global memory. The other arguments are as in `triton_tile.key_tile`.
    """
    k, v, z = tile.key_tile(
        j, q, multiplier, k_head, v_head, last, first, query_segments, key_segments_ref, S, K, H, Hv, C, Hp, Hvp,
        window, segments, precision, masked,
    )  # fmt: skip
    log_beta, softplus = tile.sticks(z)
    weights = tile.weights_of(log_beta, tl.minimum(softplus, tile.ENOUGH), high)
    high, low = tile.two_sum(high, low, tl.sum(softplus, 1))
    acc += tile.product(weights.to(v.dtype), v, precision)
    return high, low, acc


@triton.jit
def forward(
    q_ref, k_ref, v_ref, scale_ref, key_ranges_ref, offset_ref, query_segments_ref, key_segments_ref,
    out_ref, log_decay_ref, reached_ref,
    B: tl.constexpr, entries: tl.constexpr, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, Hv: tl.constexpr, R: tl.constexpr, C: tl.constexpr, Hp: tl.constexpr, Hvp: tl.constexpr,
    tiles: tl.constexpr, together: tl.constexpr, per_position: tl.constexpr, attend_current: tl.constexpr,
    window: tl.constexpr, segments: tl.constexpr, skip: tl.constexpr, threshold: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """Compute the forward pass for one query tile of one head. Write three results to global memory.

    The results are the output, the cumulative log-decay (-log2 of the part of the stick that remains), and the index of
    the leftmost key tile that was visited. Each argument whose name ends in `_ref` points to an array in global memory:
    an argument or a result of `Kernels.forward`. R and C are the numbers of queries and keys of a tile. Hp and Hvp are
    H and Hv, padded to powers of two. `tiles` is the number of query tiles of a head. `together` is explained in
    `triton_tile.block`. `entries` and `per_position` are fields of `kernels.Plan`.

    If `skip`, the block stops as soon as every query of the tile, padding excluded, has a cumulative log-decay above
    `threshold`.
    """
    entry, n, i = tile.block(entries * N, N, tiles, together)
    b = entry % B
    head = n // (N // K)
    row = i * R
    rows = row + tl.arange(0, R)
    q = tile.load(tile.head_of(q_ref, b, n, T, N, H), row, T, N * H, H, R, Hp)
    k_head, v_head = tile.head_of(k_ref, b, head, S, K, H), tile.head_of(v_ref, b, head, S, K, Hv)
    multiplier = tl.load(scale_ref) * tile.LOG2E
    last, first = tile.reach(tl.load(offset_ref + b) + rows // per_position, attend_current, window, S)
    alive_rows = rows < T
    query_segments = rows
    if segments:
        query_segments = tl.load(query_segments_ref + b * (tiles * R) + rows)
        alive_rows &= query_segments >= 0
        key_segments_ref += b * ((S + C - 1) // C * C)

    key_range = key_ranges_ref + (entry * tiles + i) * 4  # four numbers: stop, whole_stop, whole_start, start
    # The key tiles start..stop-1 are visited. The key tiles whole_start..whole_stop-1 among them need no mask.
    high = tl.zeros([R], tl.float32)
    low = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, Hvp], tl.float32)
    stop, start = tl.load(key_range), tl.load(key_range + 3)
    if skip:
        j = stop - 1
        alive = stop > start
        for part in tl.static_range(3):
            until = tl.load(key_range + part + 1)
            while (j >= until) & alive:
                high, low, acc = visit(
                    j, q, multiplier, high, low, acc, k_head, v_head, last, first, query_segments, key_segments_ref,
                    S, K, H, Hv, C, Hp, Hvp, window, segments, precision, part != 1,
                )  # fmt: skip
                j -= 1
                alive = tl.min(tl.where(alive_rows, high, float("inf")), 0) <= threshold
        reached = j + 1
    else:
        for part in tl.static_range(3):
            above, until = tl.load(key_range + part), tl.load(key_range + part + 1)
            for step in range(0, above - until):
                high, low, acc = visit(
                    above - 1 - step, q, multiplier, high, low, acc, k_head, v_head, last, first, query_segments,
                    key_segments_ref, S, K, H, Hv, C, Hp, Hvp, window, segments, precision, part != 1,
                )  # fmt: skip
        reached = start

    tl.store(reached_ref + (entry * N + n) * tiles + i, reached)
    log_decay = log_decay_ref + ((entry * N + n) * tiles).to(tl.int64) * R + rows
    tl.store(log_decay, high)
    tl.store(log_decay + entries * N * tiles * R, low)
    out = tile.pointers(tile.head_of(out_ref, entry, n, T, N, Hv), row, N * Hv, R, Hvp)
    tl.store(out, acc.to(out_ref.dtype.element_ty), mask=tile.inside(row, T, Hv, R, Hvp))
