"""Code that the three Triton kernels share: the tile of a block, loads, masks, and the arithmetic of one tile.

All logarithms are base 2. Each row carries the cumulative log-decay of its stick as a positive number in two floats
(`two_sum`), so that the backward pass can subtract the terms again without losing the small ones.

Arrays of tokens are [batch, tokens, heads, width]. A width that is not a power of two is padded with zeros.
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
    """Return (entry, query head, query tile) of this block.

    Tiles with the most keys come first. A few heads are computed at a time.
    """
    program = tl.program_id(0)
    group = program // (together * tiles)
    program = program % (together * tiles)
    head = group * together + program % together
    return head // N, head % N, tiles - 1 - program // together


@triton.jit
def head_of(ref, b, head, tokens: tl.constexpr, heads: tl.constexpr, width: tl.constexpr):
    """Return the pointer to the first number of a head of a batch entry."""
    return ref + (b.to(tl.int64) * tokens * heads + head) * width


@triton.jit
def pointers(ref, first, stride: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Return pointers [rows, columns] from row `first` on. Rows are `stride` numbers apart."""
    row, column = tl.arange(0, rows), tl.arange(0, columns)
    return ref + first.to(tl.int64) * stride + (row[:, None] * stride + column[None, :])


@triton.jit
def inside(first, limit, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Return bool [rows, columns]: whether the row is before the limit and the column is within the width."""
    row, column = first + tl.arange(0, rows), tl.arange(0, columns)
    return (row < limit)[:, None] & (column < width)[None, :]


@triton.jit
def load(ref, first, limit, stride: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Load [rows, columns]: zeros in the rows from `limit` on and in the columns from `width` on."""
    mask = inside(first, limit, width, rows, columns)
    return tl.load(pointers(ref, first, stride, rows, columns), mask=mask, other=0.0)


@triton.jit
def load_whole(ref, first, stride: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Load [rows, columns]. All rows must be before the limit."""
    if width == columns:
        return tl.load(pointers(ref, first, stride, rows, columns))
    return load(ref, first, first + rows, stride, width, rows, columns)


@triton.jit
def keys_of(ref, first, S: tl.constexpr, stride: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
            columns: tl.constexpr, masked: tl.constexpr):  # fmt: skip
    if masked:
        return load(ref, first, S, stride, width, rows, columns)
    return load_whole(ref, first, stride, width, rows, columns)


@triton.jit
def product(a, b, precision: tl.constexpr):
    """Return a @ b in fp32."""
    return tl.dot(a, b, input_precision=precision)


@triton.jit
def reach(position, attend_current: tl.constexpr, window: tl.constexpr, S: tl.constexpr):
    """Return the (last, first) key that a query at this position sees. A window of -1 means no window."""
    last = position if attend_current else position - 1
    first = position - window if window >= 0 else position * 0
    return tl.minimum(last, S - 1), first


@triton.jit
def visible(column, last, first, query_segments, key_segments_ref, window: tl.constexpr, segments: tl.constexpr):
    """Return which keys a query sees: bool [rows, columns].

    `key_segments_ref` points to the segments of the batch entry.
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
    """Return (keys, values, logits in units of log2) of key tile j for the queries q."""
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
    """Return (log2 of beta, -log2 of 1 - beta) of logits in units of log2."""
    y = tl.exp2(-tl.abs(z))
    polynomial = tl.zeros_like(z) + LOG2P1[0]
    for power in tl.static_range(1, DEGREE):
        polynomial = polynomial * y + LOG2P1[power]
    softplus = tl.maximum(z, 0.0) + y * polynomial
    return z - softplus, softplus


@triton.jit
def sum_of_nearer(softplus):
    """Return, for each key, the sum over the keys on its right in the tile.

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
    """Return A: beta times the share of the stick that the nearer keys leave. `softplus` is at most ENOUGH.

    `entering`: the cumulative log-decay of the rows before the tile, as a positive number.
    """
    return tl.exp2(log_beta - (sum_of_nearer(softplus) + entering[:, None]))


@triton.jit
def d_logits(a, log_beta, softplus, prefix):
    """Return dz, given a = A dA. `prefix`: P before the tile.

    beta and 1 - beta are each computed from a logarithm, so neither loses digits.
    """
    further = prefix[:, None] + (tl.cumsum(a, 1) - a)
    return tl.exp2(-softplus) * a - tl.exp2(log_beta) * further


@triton.jit
def two_sum(high, low, x):
    """Return high + low + x as two floats. The low float takes the rounding error of the high float."""
    total = high + x
    rest = total - high
    return total, low + ((high - (total - rest)) + (x - rest))
