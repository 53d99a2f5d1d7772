"""Code that the three Triton attention kernels share: loads, masks, and the arithmetic of one tile.

A logit is scale * <q, k>, and beta = sigmoid(logit) is the share that a key breaks off the part of the stick that
remains. All logarithms are base 2. So the code uses z = logit * log2(e), and beta = 1 / (1 + 2^-z).

The cumulative log-decay of a query row is -log2 of the part of the stick that remains. It is a positive number, the sum
of -log2(1 - beta) over the keys visited so far. It is stored as the sum of two floats (`two_sum`), so that the backward
pass can subtract the terms again without losing the small terms.

Queries, keys and values are arrays [batch, tokens, heads, width] in global memory. A tile in registers is
[rows, columns], where `columns` is the width, padded with zeros to a power of two. R is the number of queries of a
tile, C is the number of keys, and Hp and Hvp are the padded H and Hv. docs/design/triton_kernels.md says what Triton
does for the kernels.
"""

import triton
import triton.language as tl

from . import logarithm

LOG2E = tl.constexpr(logarithm.LOG2E)
NOTHING = tl.constexpr(logarithm.NOTHING)
# -log2(1 - beta) is limited to this value. The limit changes no weight: at the limit and above it, the part of the
# stick that remains for further keys is zero in fp32. float16 can represent 160.
ENOUGH = tl.constexpr(160.0)
LOG2P1 = tl.constexpr(tuple(logarithm.LOG2P1))
DEGREE = tl.constexpr(len(logarithm.LOG2P1))


@triton.jit
def block(heads: tl.constexpr, N: tl.constexpr, tiles: tl.constexpr, together: tl.constexpr):
    """Return (entry, head, query tile): the indices of the query tile that this block computes.

    `entry` is the index of the batch entry. But if decoding splits the keys into parts, it is one number for part p and
    batch entry b: p * B + b. B is the number of batch entries. N is the number of heads for one value of `entry`,
    `heads` is the number of heads for all values, and `tiles` is the number of query tiles of a head.

    The GPU starts the blocks in the order of their indices. The first blocks compute all query tiles of the first
    `together` heads, the next blocks compute the next group of `together` heads, and so on. So the keys and values of a
    group fit into the cache, if the keys and values of one head fit. Within a group, the last query tile of every head
    comes first, because the last queries see the most keys.
    """
    program = tl.program_id(0)
    group = program // (together * tiles)
    program = program % (together * tiles)
    head = group * together + program % together
    return head // N, head % N, tiles - 1 - program // together


@triton.jit
def head_of(ref, b, head, tokens: tl.constexpr, heads: tl.constexpr, width: tl.constexpr):
    """Return the pointer to the first element of batch entry b and head `head` of an array [batch,tokens,heads,width].

    `ref` points to the first element of the array in global memory.
    """
    return ref + (b.to(tl.int64) * tokens * heads + head) * width


@triton.jit
def pointers(ref, first, stride: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Return pointers [rows, columns] to the elements of a tile. The tile begins at row `first` of an array.

    `ref` points to row 0 of the array in global memory. The rows of the array are `stride` elements apart.
    """
    row, column = tl.arange(0, rows), tl.arange(0, columns)
    return ref + first.to(tl.int64) * stride + (row[:, None] * stride + column[None, :])


@triton.jit
def inside(first, limit, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Return whether each element of a tile is inside the array: bool [rows, columns].

    The tile begins at row `first` of the array. The array has `limit` rows and `width` columns.
    """
    row, column = first + tl.arange(0, rows), tl.arange(0, columns)
    return (row < limit)[:, None] & (column < width)[None, :]


@triton.jit
def load(ref, first, limit, stride: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Load a tile [rows, columns] of an array from global memory to registers. The tile begins at row `first`.

    `ref` points to row 0 of the array. The rows of the array are `stride` elements apart. The array has `limit` rows
    and `width` columns. Outside the array, the tile has zeros.
    """
    mask = inside(first, limit, width, rows, columns)
    return tl.load(pointers(ref, first, stride, rows, columns), mask=mask, other=0.0)


@triton.jit
def load_whole(ref, first, stride: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Load a tile like `load`, but without a check of the rows: all rows of the tile must be inside the array.

    The arguments are as in `load`. The array has `width` columns. Beyond these columns, the tile has zeros.
    """
    if width == columns:
        return tl.load(pointers(ref, first, stride, rows, columns))
    return load(ref, first, first + rows, stride, width, rows, columns)


@triton.jit
def keys_of(ref, first, S: tl.constexpr, stride: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
            columns: tl.constexpr, masked: tl.constexpr):  # fmt: skip
    """Load a tile [rows, columns] of the keys or values of one head to registers. The tile begins at key `first`.

    `ref` points to key 0 in global memory. Consecutive keys are `stride` elements apart. There are S keys, each with
    `width` elements. Beyond these elements, the tile has zeros. If `masked`, the tile also has zeros beyond the last
    key. If not `masked`, all keys of the tile must exist.
    """
    if masked:
        return load(ref, first, S, stride, width, rows, columns)
    return load_whole(ref, first, stride, width, rows, columns)


@triton.jit
def product(a, b, precision: tl.constexpr):
    """Return a @ b in fp32, for tiles a and b in registers. `precision` is the `input_precision` of `tl.dot`."""
    return tl.dot(a, b, input_precision=precision)


@triton.jit
def reach(position, attend_current: tl.constexpr, window: tl.constexpr, S: tl.constexpr):
    """Return (last, first): causality and the window permit a query at position `position` to see the keys first..last.

    Segment ids are not considered. A `window` of -1 means no window. Then `first` is 0.
    """
    last = position if attend_current else position - 1
    first = position - window if window >= 0 else position * 0
    return tl.minimum(last, S - 1), first


@triton.jit
def visible(column, last, first, query_segments, key_segments_ref, window: tl.constexpr, segments: tl.constexpr):
    """Return whether each of R queries sees each of C keys: bool [R,C].

    `column` [C] are the indices of the keys. `last` and `first` [R] are the results of `reach`: causality and the
    window permit query r to see the keys first[r]..last[r]. If `segments`, the segment ids of a query and a key must
    also be equal, and not negative (padding). `query_segments` [R] has the ids of the queries, and `key_segments_ref`
    points to the ids of all keys of the batch entry.
    """
    seen = column[None, :] <= last[:, None]
    if window >= 0:
        seen &= column[None, :] >= first[:, None]
    if segments:
        key_segments = tl.load(key_segments_ref + column)
        seen &= (query_segments[:, None] == key_segments[None, :]) & (query_segments >= 0)[:, None]
    return seen


@triton.jit
def key_tile(
    j, q, multiplier, k_head, v_head, last, first, query_segments, key_segments_ref, S: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, Hv: tl.constexpr, C: tl.constexpr, Hp: tl.constexpr, Hvp: tl.constexpr, window: tl.constexpr,
    segments: tl.constexpr, precision: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Load key tile j. Return (keys [C,Hp], values [C,Hvp], logits [R,C] times log2(e)) for the queries q [R,Hp].

    `multiplier` is the scale times log2(e). `k_head` and `v_head` point to the keys and values of one head in global
    memory. If `masked`, the logit of a key that a query does not see is NOTHING (-1e30), which makes its beta 0. The
    mask is computed from `last` and `first` [R] (results of `reach`), the segment ids `query_segments` [R], and the
    segment ids of the keys at `key_segments_ref`.
    """
    column = j * C
    k = keys_of(k_head, column, S, K * H, H, C, Hp, masked)
    v = keys_of(v_head, column, S, K * Hv, Hv, C, Hvp, masked)
    z = product(q, tl.trans(k), precision) * multiplier
    if masked:
        seen = visible(column + tl.arange(0, C), last, first, query_segments, key_segments_ref, window, segments)
        z = tl.where(seen, z, NOTHING)
    return k, v, z


@triton.jit
def sticks(z):
    """Return (log2 of beta, -log2 of 1 - beta), each [R,C] in registers, where beta = 1 / (1 + 2^-z).

    z [R,C] are the logits times log2(e). beta is the share of the stick that a key breaks off.
    """
    y = tl.exp2(-tl.abs(z))
    polynomial = tl.zeros_like(z) + LOG2P1[0]
    for power in tl.static_range(1, DEGREE):
        polynomial = polynomial * y + LOG2P1[power]
    softplus = tl.maximum(z, 0.0) + y * polynomial
    return z - softplus, softplus


@triton.jit
def sum_of_nearer(softplus):
    """Return, for each query and key, the sum of `softplus` over the keys on the right of this key in the tile: [R,C].

    `softplus` [R,C] is -log2(1 - beta), limited to ENOUGH (160), so that it fits into float16. The sums are a matrix
    product of `softplus` and a strictly triangular matrix of zeros and ones [C,C]. Each number in `softplus` is split
    into two float16 numbers, which together keep 22 bits. A tensor core multiplies them by ones without an error, and
    adds in fp32. The sum leaves out the key itself: to add its number and subtract it again would lose digits.

    `tl.cumsum(reverse=True)` would be slower. It reverses the order of the keys, scans from the left, and reverses the
    order again. Each reversal moves all numbers between threads.
    """
    key = tl.arange(0, softplus.shape[1])
    nearer = (key[:, None] > key[None, :]).to(tl.float16)
    coarse = softplus.to(tl.float16)
    fine = (softplus - coarse.to(tl.float32)).to(tl.float16)
    return tl.dot(fine, nearer, tl.dot(coarse, nearer))


@triton.jit
def weights_of(log_beta, softplus, entering):
    """Return the attention weights [R,C] of the keys of one tile.

    The weight of a key is its beta, times the product of 1 - beta over all keys between this key and the query. These
    nearer keys are on the right of the key, in this tile and in the tiles on the right of this tile.

    `log_beta` and `softplus` [R,C] are log2(beta) and -log2(1 - beta), where `softplus` is limited to ENOUGH (160).
    `entering` [R] is the sum of -log2(1 - beta) over all keys on the right of the tile, for each query row.
    """
    return tl.exp2(log_beta - (sum_of_nearer(softplus) + entering[:, None]))


@triton.jit
def d_logits(a, log_beta, softplus, prefix):
    """Return the gradient of the logits [R,C]: (1 - beta) * a - beta * P.

    `a` [R,C] is the weight times the cotangent of the weight. P of a key is the cotangent of log_rem plus the sum of
    `a` over all keys on the left of this key. `prefix` [R] is P of the leftmost key of the tile. `log_beta` and
    `softplus` [R,C] are log2(beta) and -log2(1 - beta). Both beta and 1 - beta are computed from their logarithms,
    because the subtraction 1 - beta would lose precision.
    """
    further = prefix[:, None] + (tl.cumsum(a, 1) - a)
    return tl.exp2(-softplus) * a - tl.exp2(log_beta) * further


@triton.jit
def two_sum(high, low, x):
    """Add x to a number that is stored as the sum of two floats, high + low. Return the new pair (high, low).

    The new `high` is high + x, rounded. The new `low` is low plus the error of this rounding.
    """
    total = high + x
    rest = total - high
    return total, low + ((high - (total - rest)) + (x - rest))
