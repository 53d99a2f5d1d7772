"""Tile sizes of the Triton kernels for experts, by a rule that is not yet measured.

The rule uses the chip, the dtype and the number of rows of an expert. Tensor cores before Hopper read their operands
from registers, so a thread has registers for only half as many sums as on Hopper. The tensor cores of data centre GPUs
since Hopper read their operands from shared memory, and these GPUs have more shared memory.
"""

from typing import NamedTuple

import jax.numpy as jnp

from .. import triton_call


class Sizes(NamedTuple):
    """The sizes of a Triton program.

    It computes a tile of `rows` x `columns` elements, in steps of `depth` along the axis that is summed. `warps` is the
    number of its warps, and `stages` is the number of stages of its software pipeline.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def _power(n: int) -> int:
    """Return the largest power of two that is at most n, or 1 if n is 0."""
    return 1 << max(0, n.bit_length() - 1)


def fitting(most: int, size: int) -> int:
    """Return the size of a tile along an axis of size `size`: a power of two, from 16 to `most`.

    It is `most`, or less if the axis is shorter. A tensor core needs at least 16.
    """
    return min(most, max(16, _power(2 * size - 1)))


def rows_of_tile(rows: int, experts: int, dtype) -> int:
    """Return the number of rows of a tile: a power of two, from 16 to 128 (64 for float32).

    It is about the mean number of rows of an expert, rows / experts, so that few rows of a tile are empty.
    """
    most = 64 if dtype == jnp.float32 else 128
    return max(16, min(most, _power(rows // experts)))


def _is_large() -> bool:
    """Return whether JAX traces code for a data centre GPU, Hopper or newer.

    The tensor cores of such a GPU read their operands from shared memory and need wide tiles.
    """
    return triton_call.shared_memory() > 200 * 1024


def _stages(rows: int, columns: int, depth: int, dtype, most: int) -> int:
    """Return how many stages of tiles [rows, depth] and [depth, columns] fit into shared memory, from 2 to `most`."""
    stage = (rows + columns) * depth * jnp.dtype(dtype).itemsize
    return max(2, min(most, triton_call.shared_memory() // stage))


def product_sizes(rows: int, depth: int, columns: int, dtype, *, products: int = 1, widest: int = 256) -> Sizes:
    """Return the sizes of a program that computes products of a tile of rows with the weight of an expert.

    The rows are [rows, depth], and each of the `products` products has a weight [depth, columns]. `widest` is the most
    columns of a tile, over all products. Float32 products run without tensor cores. With few rows, loading the weights
    takes the most time.
    """
    if dtype == jnp.float32:
        columns_most, depth_most, warps = 64, 32, 4
    elif rows < 64:
        columns_most, depth_most, warps = 64, 128 if _is_large() else 64, 4
    elif _is_large() and rows == 128:
        columns_most, depth_most, warps = widest, 64, 8
    else:
        columns_most, depth_most, warps = 128, 64 if _is_large() else 32, rows // 16
    N, K = fitting(columns_most // products, columns), fitting(depth_most, depth)
    return Sizes(rows, N, K, warps, _stages(rows, products * N, K, dtype, 4))


def weight_sizes(D: int, F: int, dtype) -> Sizes:
    """Return the sizes of a program for the gradient of a weight [D, F]. It sums over `depth` rows at a time.

    The row numbers are loaded ahead of the rows, which takes half of the stages.
    """
    if dtype == jnp.float32:
        rows_most, columns_most, depth, warps = 64, 64, 32, 4
    else:
        rows_most, columns_most, depth, warps = 128, 256 if _is_large() else 128, 64 if _is_large() else 32, 8
    rows, columns = fitting(rows_most, D), fitting(columns_most, F)
    return Sizes(rows, columns, depth, warps, 2 * _stages(rows, columns, depth, dtype, 3))
