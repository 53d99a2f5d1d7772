"""Code that the three Triton kernels share: the tile of a block, loads, masks, and the arithmetic of one tile.

All logarithms are base 2. The cumulative log-decay of a query row is -log2 of the stick left, a positive number, kept
as the sum of two floats (`two_sum`). So the backward pass can subtract the terms again without losing the small ones.

Queries, keys and values are arrays [batch, tokens, heads, width]. A tile in registers is [rows, columns], where
`columns` is the width, padded with zeros to a power of two.
docs/design/triton_kernels.md says what Triton does for the kernels.
"""

import triton
import triton.language as tl

from . import logarithm

LOG2E = tl.constexpr(logarithm.LOG2E)
NOTHING = tl.constexpr(logarithm.NOTHING)
# The upper limit of -log2(1 - beta). 2^-160 is zero in fp32, so with a larger value too, nothing is left for further
# keys. float16 can hold 160.
ENOUGH = tl.constexpr(160.0)
LOG2P1 = tl.constexpr(tuple(logarithm.LOG2P1))
DEGREE = tl.constexpr(len(logarithm.LOG2P1))


@triton.jit
def block(heads: tl.constexpr, N: tl.constexpr, tiles: tl.constexpr, together: tl.constexpr):
    """Return (batch entry, query head, query tile) that this block computes, from the number of the block.

    `heads` is the number of query heads of all batch entries, and `tiles` is the number of query tiles of a head. Query
    tiles with the most keys come first. Only `together` heads are computed at the same time.
    """
    program = tl.program_id(0)
    group = program // (together * tiles)
    program = program % (together * tiles)
    head = group * together + program % together
    return head // N, head % N, tiles - 1 - program // together


@triton.jit
def head_of(ref, b, head, tokens: tl.constexpr, heads: tl.constexpr, width: tl.constexpr):
    """Return the pointer to the first number of head `head` of batch entry b of an array [batch,tokens,heads,width]."""
    return ref + (b.to(tl.int64) * tokens * heads + head) * width


@triton.jit
def pointers(ref, first, stride: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Return pointers [rows, columns] to the elements of a tile that begins at row `first`.

    `ref` points to row 0 of the array. Its rows are `stride` elements apart.
    """
    row, column = tl.arange(0, rows), tl.arange(0, columns)
    return ref + first.to(tl.int64) * stride + (row[:, None] * stride + column[None, :])


@triton.jit
def inside(first, limit, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Return bool [rows, columns]: which elements of a tile that begins at row `first` exist.

    They are those whose row is before `limit` and whose column is before `width`.
    """
    row, column = first + tl.arange(0, rows), tl.arange(0, columns)
    return (row < limit)[:, None] & (column < width)[None, :]


@triton.jit
def load(ref, first, limit, stride: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Return a tile [rows, columns] from memory, from row `first` on.

    It has zeros in the rows from `limit` on and in the columns from `width` on.
    """
    mask = inside(first, limit, width, rows, columns)
    return tl.load(pointers(ref, first, stride, rows, columns), mask=mask, other=0.0)


@triton.jit
def load_whole(ref, first, stride: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Return a tile [rows, columns] from memory, from row `first` on, all of whose rows exist.

    It has zeros in the columns from `width` on.
    """
    if width == columns:
        return tl.load(pointers(ref, first, stride, rows, columns))
    return load(ref, first, first + rows, stride, width, rows, columns)


@triton.jit
def keys_of(ref, first, S: tl.constexpr, stride: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
            columns: tl.constexpr, masked: tl.constexpr):  # fmt: skip
    """Return a tile [rows, columns] of keys or values, from key `first` on. If `masked`, keys from S on are zeros."""
    if masked:
        return load(ref, first, S, stride, width, rows, columns)
    return load_whole(ref, first, stride, width, rows, columns)


@triton.jit
def product(a, b, precision: tl.constexpr):
    """Return a @ b in fp32, for tiles a and b. `precision` says how float32 numbers are multiplied."""
    return tl.dot(a, b, input_precision=precision)


@triton.jit
def reach(position, attend_current: tl.constexpr, window: tl.constexpr, S: tl.constexpr):
    """Return (last, first): without segments, a query at this position sees the keys first..last.

    A `window` of -1 means no window; then `first` is 0.
    """
    last = position if attend_current else position - 1
    first = position - window if window >= 0 else position * 0
    return tl.minimum(last, S - 1), first


@triton.jit
def visible(column, last, first, query_segments, key_segments_ref, window: tl.constexpr, segments: tl.constexpr):
    """Return which keys each query sees: bool [rows, columns].

    `column` [columns] are key indices. `last` and `first` [rows] are results of `reach`. `query_segments` [rows] are
    segment ids, and `key_segments_ref` points to the segment ids of all keys of the batch entry.
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
    """Return (keys [C,Hp], values [C,Hvp], logits [R,C] times log2(e)) of key tile j for the queries q [R,Hp].

    `multiplier` is the scale times log2(e). If `masked`, the logit of a key that a query does not see is NOTHING.
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
    """Return (log2 of beta, -log2 of 1 - beta), each [R,C], for logits z [R,C] times log2(e)."""
    y = tl.exp2(-tl.abs(z))
    polynomial = tl.zeros_like(z) + LOG2P1[0]
    for power in tl.static_range(1, DEGREE):
        polynomial = polynomial * y + LOG2P1[power]
    softplus = tl.maximum(z, 0.0) + y * polynomial
    return z - softplus, softplus


@triton.jit
def sum_of_nearer(softplus):
    """Return, for each query and key, the sum of `softplus` [R,C] over the keys on the right of the key in the tile.

    This is a product with a strictly triangular 0/1 matrix. `softplus` is at most ENOUGH. It is split into two float16
    numbers, which keep 22 bits. A tensor core multiplies them by ones without an error and adds in fp32. The key itself
    is not in the sum, so nothing cancels. A scan from the right (`tl.cumsum(reverse=True)`) would exchange every score
    between threads before and after a scan from the left.
    """
    key = tl.arange(0, softplus.shape[1])
    nearer = (key[:, None] > key[None, :]).to(tl.float16)
    coarse = softplus.to(tl.float16)
    fine = (softplus - coarse.to(tl.float32)).to(tl.float16)
    return tl.dot(fine, nearer, tl.dot(coarse, nearer))


@triton.jit
def weights_of(log_beta, softplus, entering):
    """Return the weights A [R,C]: beta times the share of the stick that the nearer keys leave.

    `log_beta` and `softplus` are results of `sticks`, where `softplus` is limited to ENOUGH. `entering` [R] is the
    cumulative log-decay, a positive number, with which the rows enter the tile from the right.
    """
    return tl.exp2(log_beta - (sum_of_nearer(softplus) + entering[:, None]))


@triton.jit
def d_logits(a, log_beta, softplus, prefix):
    """Return dz [R,C], the gradient of the logits, by the formula of triton_d_query.py.

    `a` is A dA [R,C]. `prefix` [R] is P at the leftmost key of the tile. beta and 1 - beta are each computed from a
    logarithm, so neither loses digits.
    """
    further = prefix[:, None] + (tl.cumsum(a, 1) - a)
    return tl.exp2(-softplus) * a - tl.exp2(log_beta) * further


@triton.jit
def two_sum(high, low, x):
    """Return two floats whose sum is high + low + x. The second one takes the rounding error of the first one."""
    total = high + x
    rest = total - high
    return total, low + ((high - (total - rest)) + (x - rest))
