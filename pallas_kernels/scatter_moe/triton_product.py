"""The Triton kernels that multiply rows by the weights of their experts.

The rows are sorted by expert and cut into tiles (`Tasks`). For row i of the tiles, whose expert is e, the kernels
compute out[target[i]] = x[source[i]] @ weight[e]. The indices `source` and `target` let one kernel read and write rows
in any order: by token, by pair or sorted by expert. A program computes one tile of rows, all of one expert, times one
tile of columns. It gathers the rows of x when it loads them, and scatters the rows of the result when it stores them.
An activation or its derivative is applied to the sums in registers.

The constants in capitals: a row of x has D columns, and a row of the result has F columns. There are TILES tiles of M
rows, and E experts. A program computes M rows and N columns, in steps of K along D. Addresses of rows have 64 bits,
because the rows of all (token, choice) pairs may have more elements than 32 bits can count.
"""

import triton
import triton.language as tl

from .triton_activation import activate, slope

_TOGETHER = tl.constexpr(8)  # tiles of rows whose programs use the same tile of columns at about the same time


@triton.jit
def _tiles_of_program(TILES: tl.constexpr, F: tl.constexpr, N: tl.constexpr):
    """Return (the index of the tile of rows, the index of the tile of columns) that this program computes.

    There are TILES tiles of rows, and F columns in tiles of N columns. Programs with successive numbers compute the
    same tile of columns for up to 8 tiles of rows, so that weights which they share stay in the cache.
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

    `rows` and `columns` are the row numbers and the column numbers of the tile. `offsets` are the offsets of its
    elements from the start of the array. `exist` is false for an element whose row number is negative, or whose column
    number is WIDTH or more. Both results are [rows, columns].
    """
    return rows.to(tl.int64)[:, None] * WIDTH + columns[None, :], (rows >= 0)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def _sums(x, rows, weight, columns, alive, D: tl.constexpr, LIMIT: tl.constexpr, DOWN: tl.constexpr,
          ACROSS: tl.constexpr, APART: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Return (x[rows] @ weight[:, columns], x[rows] @ weight[:, columns + APART]), each [M, N] in fp32, in registers.

    If APART is 0, the second result is not computed. `x` points to an array [.., D] in global memory. `weight` points
    to the weight of one expert: its D rows are DOWN elements apart, and its columns are ACROSS elements apart. `rows`
    [M] and `columns` [N] are the row numbers and column numbers to use. A negative row number gives a row of zeros. A
    column number of LIMIT or more gives a column of zeros. If `alive` is false, as for rows without an expert, both
    results are zero.
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
    `weight`: [E, D, ALL], or [E, ALL, D] if TRANSPOSED. Of the ALL columns, F are used, from column FIRST on.
    `bias`: [E, ALL]. It is added only if BIASED.
    `source`, `target`: [TILES * M], the row indices in x and in `out`, or -1 for an empty row.
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
def activated(x, source, weight, bias, expert, count, target, out, hidden, E: tl.constexpr, D: tl.constexpr,
              F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIASED: tl.constexpr,
              KEEP: tl.constexpr, TILES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Compute the hidden layer of `expert_mlp`: write act(h) to rows of `out` and, with KEEP, h to rows of `hidden`.

    For row i of the TILES tiles of M rows, whose expert is e, h = x[source[i]] @ weight[e] + bias[e], and
    out[target[i]] is act(h). A row of h has F columns, or 2 F columns if GATED. If GATED,
    act(h) = f(first half of h) * second half, and ACTIVATION is the name of f. Otherwise ACTIVATION is the name of act.
    The bias is added only if BIASED. All arguments that are not constants point to global memory.

    `source`, `target`: [TILES * M], the row indices in x and in `out` and `hidden`, or -1 for an empty row.
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
            hidden_at = hidden + rows.to(tl.int64)[:, None] * all_columns + columns[None, :]
            tl.store(hidden_at, h.to(hidden.dtype.element_ty), mask=there)
            if GATED:
                tl.store(hidden_at + F, up.to(hidden.dtype.element_ty), mask=there)
        y = activate(ACTIVATION, h)
        if GATED:
            y *= up
        tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def _d_activated(dy, gate, hidden, hidden_rows, rows, columns, dh, gated, F: tl.constexpr, GATED: tl.constexpr,
                 ACTIVATION: tl.constexpr):  # fmt: skip
    """Write the gradient of h to `dh`, and gate * act(h) to `gated`, for M rows and C columns.

    `columns` [C] are the indices of the columns. h is the pre-activation, and `dy` [M, C] is the cotangent of
    gate * act(h). Return the dot products <act(h), dy> over these columns, [M]. Their sum over all columns is the
    gradient of the gates. `dy`, `gate` [M, 1] (the gates of the rows) and the returned values are in registers.

    `hidden`, `dh` and `gated` are pointers to global memory; h is read from `hidden`. `hidden_rows` [M] are the indices
    of the rows of `hidden` to read, and `rows` [M] are the indices of the rows of `dh` and `gated` to write. If an
    index is negative, the row is empty.
    """
    all_columns: tl.constexpr = 2 * F if GATED else F
    at, there = _elements(rows, columns, F)
    h_at = hidden + hidden_rows.to(tl.int64)[:, None] * all_columns + columns[None, :]
    used = (hidden_rows >= 0)[:, None] & (columns < F)[None, :]
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
    # Several lanes may hold one row, and all must store the same sum. Without tl.where the compiler fuses the product
    # of a lane with the addition of the other lanes' products (fma), and each lane rounds differently.
    return tl.sum(tl.where(used, y * dy, 0.0), 1)


@triton.jit
def d_activated(d_out, source, weight, hidden, hidden_numbers, gates, expert, count, target, dh, gated, d_gate,
                E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
                TILES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Compute the backward pass of gate * act(h) @ weight[e], the output of one expert in `expert_mlp`.

    For row i of the TILES tiles of M rows, whose expert is e, the pre-activation is h = hidden[hidden_numbers[i]], and
    the gate is gates[i]. `weight` is [E, F, D], d_out [.., D] is the cotangent of the output of `expert_mlp`, and
    dy = d_out[source[i]] @ weight[e]^T is the cotangent of gate * act(h). The kernel writes:

    `dh`: the gradient of h, gate * dy times the derivative of act, to row target[i].
    `gated`: gate * act(h), a factor of the gradient of the weight, to row target[i].
    `d_gate`: [tiles of columns, TILES * M]. Its sum over the first axis is <act(h), dy>, the gradient of the gates.

    All arguments that are not constants point to global memory. `expert` [TILES] has the expert of every tile, or E for
    none. `count` [1] is the number of tiles in use. A row index of -1 means that row i is empty. If GATED, h has two
    halves of F columns, and ACTIVATION is the name of the function of the first half.
    """
    tile, across = _tiles_of_program(TILES, F, N)
    if tile < tl.load(count):
        e, tile_rows = tl.load(expert + tile), tile * M + tl.arange(0, M)
        columns = across * N + tl.arange(0, N)
        weight += e.to(tl.int64) * (D * F)
        dy, _ = _sums(d_out, tl.load(source + tile_rows), weight, columns, e < E, D, F, 1, D, 0, M, N, K)
        rows, gate = tl.load(target + tile_rows), tl.load(gates + tile_rows)[:, None]
        hidden_rows = tl.where(e < E, tl.load(hidden_numbers + tile_rows), -1)  # without an expert, h counts as 0
        # Two halves, one after the other: both at once would not fit the registers.
        left, right = tl.split(tl.permute(tl.reshape(dy, (M, 2, N // 2)), (0, 2, 1)))
        half = across * N + tl.arange(0, N // 2)
        total = _d_activated(left, gate, hidden, hidden_rows, rows, half, dh, gated, F, GATED, ACTIVATION)
        half += N // 2
        total += _d_activated(right, gate, hidden, hidden_rows, rows, half, dh, gated, F, GATED, ACTIVATION)
        tl.store(d_gate + across.to(tl.int64) * (TILES * M) + tile_rows, total)
