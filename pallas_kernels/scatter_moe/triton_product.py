"""The Triton kernels that multiply rows by the weights of their experts.

A row is one (token, choice) pair. The rows are sorted by expert and cut into tiles, and all rows of a tile belong to
one expert (`Tasks`). For row i of the tiles, whose expert is e, the kernels compute
    out[target[i]] = x[source[i]] @ weight[e].
With the indices `source` and `target`, one kernel can read and write rows in any order: by token, by pair or sorted by
expert. A program gathers the rows of x when it loads them, and scatters the rows of the result when it stores them.
`activated` and `d_activated` apply an activation or its derivative to the products while these are in registers.

The constants in capitals: a row of x has D columns, and a row of the result has F columns. There are TILES tiles of M
rows, and E experts. A program computes the M rows of one tile in N columns of the result, in steps of K along D.
Addresses of rows have 64 bits, because the rows of all pairs may have more elements than 32 bits can count.

The hidden layer of `expert_mlp` is act(h), where h = x @ w_in + b_in is the pre-activation. If GATED, h has 2 * F
columns, act(h) = f(first half of h) * second half of h, and ACTIVATION is the name of f. Otherwise h has F columns, and
ACTIVATION is the name of act.
"""

import triton
import triton.language as tl

from .triton_activation import activate, slope

_TOGETHER = tl.constexpr(8)  # number of tiles of rows for which successive programs compute the same tile of columns


@triton.jit
def _tiles_of_program(TILES: tl.constexpr, F: tl.constexpr, N: tl.constexpr):
    """Return what this program computes, as two indices: (tile of rows, tile of columns).

    There are TILES tiles of rows, and F columns in tiles of N columns. Programs with successive numbers compute the
    same tile of columns for up to 8 tiles of rows. If these rows have the same expert, the programs read the same
    weights, which stay in the cache.
    """
    across: tl.constexpr = (F + N - 1) // N
    program = tl.program_id(0)
    first = program // (_TOGETHER * across) * _TOGETHER
    rest = program - first * across
    together = tl.minimum(TILES - first, _TOGETHER)
    return first + rest % together, rest // together


@triton.jit
def _elements(rows, columns, WIDTH: tl.constexpr):
    """Return (offsets, exist) for the elements of a tile in an array [.., WIDTH] in global memory.

    `rows` and `columns` are the row numbers and the column numbers of the tile. The results have one value for every
    pair of a row and a column, [len(rows), len(columns)]. `offsets` are the offsets of the elements from the start of
    the array. `exist` is false if the row number is negative, or if the column number is WIDTH or more.
    """
    return rows.to(tl.int64)[:, None] * WIDTH + columns[None, :], (rows >= 0)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def _sums(x, rows, weight, columns, alive, D: tl.constexpr, LIMIT: tl.constexpr, DOWN: tl.constexpr,
          ACROSS: tl.constexpr, APART: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Return (x[rows] @ weight[:, columns], x[rows] @ weight[:, columns + APART]), each [M, N] in fp32, in registers.

    If APART is 0, the second result is not computed: it is zeros [1, 1]. `x` points to an array [.., D] in global
    memory. `weight` points to the weight of one expert: its D rows are DOWN elements apart, and its columns are ACROSS
    elements apart. `rows` [M] are row numbers of x. A negative row number gives a row of zeros. `columns` [N] are
    column numbers of the weight. A column number of LIMIT or more gives a column of zeros in both results. If `alive`
    is false, as for rows without an expert, all results are zero.
    """
    inner = tl.arange(0, K)
    exists = rows >= 0
    x_at = x + rows.to(tl.int64)[:, None] * D + inner[None, :]
    w_at = weight + inner.to(tl.int64)[:, None] * DOWN + columns.to(tl.int64)[None, :] * ACROSS
    sums = tl.zeros((M, N), tl.float32)
    sums_apart = tl.zeros((M, N) if APART else (1, 1), tl.float32)
    for depth in range(0, tl.where(alive, D, 0), K):
        x_mask, w_mask = exists[:, None], (columns < LIMIT)[None, :]
        if D % K:
            x_mask, w_mask = x_mask & (inner < D - depth)[None, :], w_mask & (inner < D - depth)[:, None]
        x_tile = tl.load(x_at, mask=x_mask, other=0.0)
        sums = tl.dot(x_tile, tl.load(w_at, mask=w_mask, other=0.0), sums, input_precision="ieee")
        if APART:
            w_apart = tl.load(w_at + APART * ACROSS, mask=w_mask, other=0.0)
            sums_apart = tl.dot(x_tile, w_apart, sums_apart, input_precision="ieee")
        x_at += K
        w_at += K * DOWN
    return sums, sums_apart


@triton.jit
def product(x, source, weight, bias, expert, count, target, out, E: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
            FIRST: tl.constexpr, ALL: tl.constexpr, TRANSPOSED: tl.constexpr, BIASED: tl.constexpr,
            TILES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Multiply rows of x by the weights of their experts, and write the results to the rows of `out`.

    For row i of the TILES tiles of M rows, whose expert is e, out[target[i]] = x[source[i]] @ weight[e] + bias[e]. All
    arguments that are not constants point to global memory.

    `x`: [.., D], the rows to read.
    `out`: [.., F], the rows to write.
    `weight`: [E, D, ALL], or [E, ALL, D] if TRANSPOSED. Only F of the ALL columns are used, from column FIRST on.
    `bias`: [E, ALL]. If BIASED, the same F columns of the bias are added. Otherwise the bias is not used.
    `source`: [TILES * M], for every row of the tiles a row index in x, or -1 for an empty row.
    `target`: [TILES * M], for every row of the tiles a row index in `out`, or -1 for an empty row.
    `expert`: [TILES], the expert of every tile, or E for a tile without an expert, whose results are zero.
    `count`: [1], the number of tiles in use.
    """
    tile, across = _tiles_of_program(TILES, F, N)
    if tile < tl.load(count):
        e, tile_rows = tl.load(expert + tile), tile * M + tl.arange(0, M)
        columns = across * N + tl.arange(0, N)
        weight += e.to(tl.int64) * (D * ALL) + FIRST * (D if TRANSPOSED else 1)
        y, _ = _sums(x, tl.load(source + tile_rows), weight, columns, e < E, D, F, 1 if TRANSPOSED else ALL,
                     D if TRANSPOSED else 1, 0, M, N, K)  # fmt: skip
        if BIASED:
            inside = columns < tl.where(e < E, F, 0)
            y += tl.load(bias + e * ALL + FIRST + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        at, there = _elements(tl.load(target + tile_rows), columns, F)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def activated(x, source, weight, bias, expert, count, target, out, pre, E: tl.constexpr, D: tl.constexpr,
              F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIASED: tl.constexpr,
              KEEP: tl.constexpr, TILES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Compute the hidden layer of `expert_mlp`: write act(h) to rows of `out` and, if KEEP, h to rows of `pre`.

    For row i of the TILES tiles of M rows, whose expert is e, h = x[source[i]] @ weight[e] + bias[e] is the
    pre-activation. The kernel writes act(h) to out[target[i]], and h to pre[target[i]]. The module docstring explains
    GATED and ACTIVATION. All arguments that are not constants point to global memory.

    `x`: [.., D], the rows to read.
    `weight`: [E, D, F], or [E, D, 2 * F] if GATED.
    `bias`: [E, F], or [E, 2 * F] if GATED. It is added only if BIASED.
    `out`: [.., F].
    `pre`: [.., F], or [.., 2 * F] if GATED. Without KEEP, it is not written.
    `source`: [TILES * M], for every row of the tiles a row index in x, or -1 for an empty row.
    `target`: [TILES * M], for every row of the tiles a row index in `out` and `pre`, or -1 for an empty row.
    `expert`: [TILES], the expert of every tile, or E for a tile without an expert, whose results are zero.
    `count`: [1], the number of tiles in use.
    """
    all_columns: tl.constexpr = 2 * F if GATED else F
    tile, across = _tiles_of_program(TILES, F, N)
    if tile < tl.load(count):
        e, tile_rows = tl.load(expert + tile), tile * M + tl.arange(0, M)
        columns = across * N + tl.arange(0, N)
        weight += e.to(tl.int64) * (D * all_columns)
        h, up = _sums(x, tl.load(source + tile_rows), weight, columns, e < E, D, F, all_columns, 1, F if GATED else 0,
                      M, N, K)  # fmt: skip
        rows = tl.load(target + tile_rows)
        at, there = _elements(rows, columns, F)
        if BIASED:
            inside = columns < tl.where(e < E, F, 0)
            added = bias + e * all_columns + columns
            h += tl.load(added, mask=inside, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(added + F, mask=inside, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            pre_at = pre + rows.to(tl.int64)[:, None] * all_columns + columns[None, :]
            tl.store(pre_at, h.to(pre.dtype.element_ty), mask=there)
            if GATED:
                tl.store(pre_at + F, up.to(pre.dtype.element_ty), mask=there)
        y = activate(ACTIVATION, h)
        if GATED:
            y *= up
        tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def _d_activated(dy, gate, pre, pre_rows, rows, columns, dh, gated, F: tl.constexpr, GATED: tl.constexpr,
                 ACTIVATION: tl.constexpr):  # fmt: skip
    """Write the gradient of the pre-activation h to `dh`, and gate * act(h) to `gated`, for M rows and C columns.

    Return the dot products <act(h), dy> over these columns, [M]. Their sums over all F columns are the gradients of the
    gates, except for the term of b_out, the output bias of `expert_mlp`. `fused.mlp` adds this term. The module
    docstring explains GATED and ACTIVATION.

    In registers: `dy` [M, C] is the cotangent of gate * act(h), `gate` [M, 1] are the gates of the rows, and `columns`
    [C] are the indices of the columns. `pre_rows` [M] are the indices of the rows of `pre` to read, and `rows` [M] are
    the indices of the rows of `dh` and `gated` to write. If an index is negative, the row is empty.

    In global memory: `pre` points to h, `dh` to an array of the same shape, and `gated` to an array [.., F].
    """
    all_columns: tl.constexpr = 2 * F if GATED else F
    at, there = _elements(rows, columns, F)
    h_at = pre + pre_rows.to(tl.int64)[:, None] * all_columns + columns[None, :]
    used = (pre_rows >= 0)[:, None] & (columns < F)[None, :]
    h = tl.load(h_at, mask=used, other=0.0).to(tl.float32)
    y, dh_at = activate(ACTIVATION, h), dh + rows.to(tl.int64)[:, None] * all_columns + columns[None, :]
    slopes = dy * gate * slope(ACTIVATION, h)
    if GATED:
        up = tl.load(h_at + F, mask=used, other=0.0).to(tl.float32)
        tl.store(dh_at + F, (dy * gate * y).to(dh.dtype.element_ty), mask=there)
        y *= up
        slopes *= up
    tl.store(dh_at, slopes.to(dh.dtype.element_ty), mask=there)
    tl.store(gated + at, (y * gate).to(gated.dtype.element_ty), mask=there)
    # Several threads may hold the same row, and all of them must store the same sum. Without tl.where, the compiler
    # fuses the product of a thread with the addition of the other threads' products (fma), so each rounds differently.
    return tl.sum(tl.where(used, y * dy, 0.0), 1)


@triton.jit
def d_activated(d_out, source, weight, pre, pre_numbers, gates, expert, count, target, dh, gated, d_gate,
                E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
                TILES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Compute the backward pass of gate * act(h) @ weight[e], the output of one expert in `expert_mlp`.

    For row i of the TILES tiles of M rows, whose expert is e, the pre-activation is h = pre[pre_numbers[i]], and the
    gate is gates[i]. `weight` is [E, F, D], and d_out [.., D] is the cotangent of the output of `expert_mlp`. The
    cotangent of gate * act(h) is dy = d_out[source[i]] @ weight[e]^T. The kernel writes:

    `dh`: the gradient of h, gate * dy times the derivative of act, to row target[i].
    `gated`: gate * act(h), a factor of the gradient of the weight, to row target[i].
    `d_gate`: [tiles of columns, TILES * M]. Its sum over the first axis is <act(h), dy>. This is the gradient of the
      gates, except for the term of b_out, the output bias of `expert_mlp`. `fused.mlp` adds this term.

    All arguments that are not constants point to global memory. `expert` [TILES] has the expert of every tile, or E for
    a tile without an expert. `count` [1] is the number of tiles in use. A row index of -1 means that row i is empty.
    The module docstring explains GATED and ACTIVATION.
    """
    tile, across = _tiles_of_program(TILES, F, N)
    if tile < tl.load(count):
        e, tile_rows = tl.load(expert + tile), tile * M + tl.arange(0, M)
        columns = across * N + tl.arange(0, N)
        weight += e.to(tl.int64) * (D * F)
        dy, _ = _sums(d_out, tl.load(source + tile_rows), weight, columns, e < E, D, F, 1, D, 0, M, N, K)
        rows, gate = tl.load(target + tile_rows), tl.load(gates + tile_rows)[:, None]
        pre_rows = tl.where(e < E, tl.load(pre_numbers + tile_rows), -1)  # without an expert, h counts as 0
        # The columns are computed in two halves, one after the other, because all of them would not fit into registers.
        left, right = tl.split(tl.permute(tl.reshape(dy, (M, 2, N // 2)), (0, 2, 1)))
        half = across * N + tl.arange(0, N // 2)
        total = _d_activated(left, gate, pre, pre_rows, rows, half, dh, gated, F, GATED, ACTIVATION)
        half += N // 2
        total += _d_activated(right, gate, pre, pre_rows, rows, half, dh, gated, F, GATED, ACTIVATION)
        tl.store(d_gate + across.to(tl.int64) * (TILES * M) + tile_rows, total)
