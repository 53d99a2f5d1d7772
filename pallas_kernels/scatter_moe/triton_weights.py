"""The Triton kernels for the gradients of expert weights and biases: sums over the rows of each expert.

The kernels gather rows by their row numbers when they load them, so no array is transposed, padded or copied in memory.
A program computes one piece of the gradient of one expert. It sums over all rows of the expert in their order, and
writes the piece once. So there are no atomic operations, and every run gives the same bits. The gradient of an expert
without rows is zero. In `d_weights`, the programs of the experts with the most rows start first.
"""

import triton
import triton.language as tl


@triton.jit
def d_weights(left, left_numbers, right, right_numbers, heavy, first, rows, out, D: tl.constexpr, F: tl.constexpr,
              M: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """Compute the gradients of the weights of all experts, and write them to `out` [E, D, F].

    The rows of every expert are cut into tiles of M rows, and its last tile is filled up with empty rows. The rows of
    all tiles are numbered 0, 1, and so on. first[e] is the index of the first tile of expert e, and rows[e] is the
    number of its rows, without empty rows. So expert e has the row numbers i from first[e] * M to
    first[e] * M + rows[e] - 1.

    out[e] is the sum of left[left_numbers[i]]^T @ right[right_numbers[i]] over these i. `left` [.., D] has the inputs
    of the matrix products, and `right` [.., F] has the cotangents of their results. `left_numbers` and `right_numbers`
    have a row index for every row of the tiles. `heavy` [E] lists the experts by their numbers of rows, the largest
    number first. All arguments that are not constants point to global memory. A program computes DOWN x ACROSS elements
    of out[e]. In each step, it adds the terms of R rows.
    """
    across: tl.constexpr = (F + ACROSS - 1) // ACROSS
    pieces: tl.constexpr = (D + DOWN - 1) // DOWN * across
    program = tl.program_id(0)
    e, piece = tl.load(heavy + program // pieces), program % pieces
    down = piece // across * DOWN + tl.arange(0, DOWN)
    columns = piece % across * ACROSS + tl.arange(0, ACROSS)
    start, count, row = tl.load(first + e) * M, tl.load(rows + e), tl.arange(0, R)
    sums = tl.zeros((DOWN, ACROSS), tl.float32)
    for before in range(0, count, R):
        tile_row, exists = start + before + row, row < count - before
        left_at = tl.load(left_numbers + tile_row, mask=exists, other=0).to(tl.int64)[None, :] * D + down[:, None]
        right_at = tl.load(right_numbers + tile_row, mask=exists, other=0).to(tl.int64)[:, None] * F + columns[None, :]
        left_tile = tl.load(left + left_at, mask=exists[None, :] & (down < D)[:, None], other=0.0)
        right_tile = tl.load(right + right_at, mask=exists[:, None] & (columns < F)[None, :], other=0.0)
        sums = tl.dot(left_tile, right_tile, sums, input_precision="ieee")
    inside = (down < D)[:, None] & (columns < F)[None, :]
    at = e.to(tl.int64) * (D * F) + down.to(tl.int64)[:, None] * F + columns[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def d_bias(right, right_numbers, gates, first, rows, out, F: tl.constexpr, WEIGHED: tl.constexpr, M: tl.constexpr,
           ACROSS: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """Compute the gradients of the biases of all experts, and write them to `out` [E, F].

    The rows of every expert are cut into tiles of M rows, and its last tile is filled up with empty rows. The rows of
    all tiles are numbered 0, 1, and so on. first[e] is the index of the first tile of expert e, and rows[e] is the
    number of its rows, without empty rows. So expert e has the row numbers i from first[e] * M to
    first[e] * M + rows[e] - 1.

    out[e] is the sum of right[right_numbers[i]] over these i, or of gates[i] * right[right_numbers[i]] if WEIGHED.
    `right` [.., F] has the cotangents of the outputs of the experts. `right_numbers` and `gates` have a row index and a
    gate for every row of the tiles. All arguments that are not constants point to global memory. A program computes
    ACROSS columns of out[e]. In each step, it adds R rows.
    """
    e, columns = tl.program_id(1), tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)
    start, count, row = tl.load(first + e) * M, tl.load(rows + e), tl.arange(0, R)
    sums = tl.zeros((R, ACROSS), tl.float32)
    for before in range(0, count, R):
        tile_row, exists = start + before + row, row < count - before
        r = tl.load(right_numbers + tile_row, mask=exists, other=0).to(tl.int64)
        mask = exists[:, None] & (columns < F)[None, :]
        tile = tl.load(right + r[:, None] * F + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHED:
            tile *= tl.load(gates + tile_row, mask=exists, other=0.0)[:, None]
        sums += tile
    tl.store(out + e.to(tl.int64) * F + columns, tl.sum(sums, 0).to(out.dtype.element_ty), mask=columns < F)
