"""The Triton kernel for dq, the gradient of the queries. It also writes the snapshots that `d_key_value` reads.

For a query q and a key k, z = scale * <q, k> is the logit, and beta = sigmoid(z) is the share of the remaining stick
that the key breaks off. The weight A is beta times the product of 1 - beta over the nearer keys: the keys between this
key and the query, which are further right. dO is the cotangent of the output, and d_log_rem is the cotangent of
log_rem, the sum of log(1 - beta) over all keys. The gradients are
    dA = dO @ V^T,  a = A * dA (element by element),  P = d_log_rem + the sum of `a` over the keys further left,
    dz = (1 - beta) * a - beta * P,  dq = scale * dz @ K,  dk = scale * dz^T @ Q,  dv = A^T @ dO.

A block computes dq of one query tile. It visits the key tiles from left to right, so P is a running sum. For every
query row and key tile, the block stores two numbers, the snapshots:
- the sum of -log2(1 - beta) over all keys on the right of the tile;
- P of the leftmost key of the tile.
The kernel `d_key_value` reads these two numbers for a tile, so it needs no running sum over other key tiles.

R is the number of rows of a query tile, and C is the number of keys of a key tile. H is the width of queries and keys,
and Hv is the width of values. Hp and Hvp are H and Hv, padded to powers of two.
"""

import triton
import triton.language as tl

from . import triton_tile as tile


@triton.jit
def visit(
    j, q, d_out, multiplier, prefix, high, low, acc, k_head, v_head, snapshots, last, first, query_segments,
    key_segments_ref, S: tl.constexpr, K: tl.constexpr, H: tl.constexpr, Hv: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, Hp: tl.constexpr, Hvp: tl.constexpr, padded: tl.constexpr, window: tl.constexpr,
    segments: tl.constexpr, precision: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Add key tile j to dq of a query tile, and store its snapshots. Return `prefix`, `high`, `low` and `acc`, updated.

    These four sums are in registers. `acc` [R,Hp] is dq, not yet multiplied by the scale. `prefix` [R] is P: the
    cotangent of log_rem plus the sum of `a` over all keys on the left of tile j, where `a` is the weight times the
    cotangent of the weight. high + low [R] is the cumulative log-decay: the sum of -log2(1 - beta) over the keys of
    tile j and all keys on the right of tile j. The returned sums are for the next tile, j + 1.

    q [R,Hp] and `d_out` [R,Hvp], in registers, are the queries and the cotangent of the output. `k_head` and `v_head`
    point to the keys and values of one key head in global memory. `snapshots` [R] are pointers to the snapshots of the
    query rows for key tile 0. `padded` is the number of query rows of a head, rounded up to whole tiles. The other
    arguments are as in `triton_tile.key_tile`.
    """
    k, v, z = tile.key_tile(
        j, q, multiplier, k_head, v_head, last, first, query_segments, key_segments_ref, S, K, H, Hv, C, Hp, Hvp,
        window, segments, precision, masked,
    )  # fmt: skip
    log_beta, softplus = tile.sticks(z)
    high, low = tile.two_sum(high, low, -tl.sum(softplus, 1))
    softplus = tl.minimum(softplus, tile.ENOUGH)
    entering = high + low
    # This is j. Written in this way, it compiles to the code that benchmarks/results/triton-static.json describes.
    number = j * C // C
    snapshot = snapshots + number.to(tl.int64) * (2 * padded)
    tl.store(snapshot, entering)
    tl.store(snapshot + padded, prefix)
    a = tile.weights_of(log_beta, softplus, entering) * tile.product(d_out, tl.trans(v), precision)
    dz = tile.d_logits(a, log_beta, softplus, prefix)
    acc += tile.product(dz.to(k.dtype), k, precision)
    return prefix + tl.sum(a, 1), high, low, acc


@triton.jit
def d_query(
    q_ref, k_ref, v_ref, d_out_ref, d_log_rem_ref, log_decay_ref, reached_ref, scale_ref, key_ranges_ref, offset_ref,
    query_segments_ref, key_segments_ref,
    dq_ref, d_scale_ref, snapshots_ref,
    B: tl.constexpr, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, Hv: tl.constexpr, R: tl.constexpr, C: tl.constexpr, Hp: tl.constexpr, Hvp: tl.constexpr,
    tiles: tl.constexpr, together: tl.constexpr, attend_current: tl.constexpr, window: tl.constexpr,
    segments: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Compute dq, d_scale and the snapshots of one query tile of one query head, and write them to global memory.

    Each argument whose name ends in `_ref` points to an array in global memory: an argument or a result of
    `Kernels.d_query`. R and C are the numbers of queries and keys of a tile. Hp and Hvp are H and Hv, padded to powers
    of two. `tiles` is the number of query tiles of a head. `together` is explained in `triton_tile.block`.
    """
    b, n, i = tile.block(B * N, N, tiles, together)
    head = n // (N // K)
    row = i * R
    rows = row + tl.arange(0, R)
    q = tile.load(tile.head_of(q_ref, b, n, T, N, H), row, T, N * H, H, R, Hp)
    d_out = tile.load(tile.head_of(d_out_ref, b, n, T, N, Hv), row, T, N * Hv, Hv, R, Hvp)
    k_head, v_head = tile.head_of(k_ref, b, head, S, K, H), tile.head_of(v_ref, b, head, S, K, Hv)
    multiplier = tl.load(scale_ref) * tile.LOG2E
    last, first = tile.reach(tl.load(offset_ref + b) + rows, attend_current, window, S)
    query_segments = rows
    if segments:
        query_segments = tl.load(query_segments_ref + b * (tiles * R) + rows)
        key_segments_ref += b * ((S + C - 1) // C * C)

    own = ((b * N + n) * tiles).to(tl.int64) * R + rows
    prefix, high, low = (
        tl.load(d_log_rem_ref + own),
        tl.load(log_decay_ref + own),
        tl.load(log_decay_ref + B * N * tiles * R + own),
    )
    snapshots = snapshots_ref + ((b * N + n) * ((S + C - 1) // C)).to(tl.int64) * (2 * tiles * R) + rows
    acc = tl.zeros([R, Hp], tl.float32)
    key_range = key_ranges_ref + (b * tiles + i) * 4  # stop, whole_stop, whole_start, start
    begin = tl.load(reached_ref + (b * N + n) * tiles + i)
    for part in tl.static_range(3):
        until = tl.load(key_range + 2 - part)
        for j in range(begin, until):
            prefix, high, low, acc = visit(
                j, q, d_out, multiplier, prefix, high, low, acc, k_head, v_head, snapshots, last, first, query_segments,
                key_segments_ref, S, K, H, Hv, R, C, Hp, Hvp, tiles * R, window, segments, precision, part != 1,
            )  # fmt: skip
        begin = tl.maximum(begin, until)

    # d_scale is what every row adds to the gradient of the scale: the sum of dz * <q, k> over all keys, or <acc, q>. It
    # uses acc before acc is rounded.
    tl.store(d_scale_ref + own, tl.sum(acc * q.to(tl.float32), 1))
    dq = tile.pointers(tile.head_of(dq_ref, b, n, T, N, H), row, N * H, R, Hp)
    tl.store(dq, (acc * tl.load(scale_ref)).to(dq_ref.dtype.element_ty), mask=tile.inside(row, T, H, R, Hp))
