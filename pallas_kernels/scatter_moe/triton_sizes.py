"""Tile sizes of the Triton kernels for experts. They come from estimates, which no measurement has confirmed yet.

The sizes depend on the GPU, the dtype and the number of rows of an expert. On data centre GPUs since Hopper, tensor
cores read their operands from shared memory, and a block has more shared memory. On all other GPUs, tensor cores read
their operands from registers, so fewer registers remain for the sums, and a tile has fewer columns.
"""

from typing import NamedTuple

import jax.numpy as jnp

from .. import triton_call


class Sizes(NamedTuple):
    """The sizes of a Triton program, which computes one tile of the result.

    The tile has `rows` x `columns` elements, which are sums. A step of the program adds `depth` terms to each sum.
    `warps` is the number of warps of the program, and `stages` is the number of stages of its software pipeline.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def _power(n: int) -> int:
    """Return the largest power of two that is at most n. Return 1 if n is 0."""
    return 1 << max(0, n.bit_length() - 1)


def fitting(most: int, size: int) -> int:
    """Return the size of a tile along an axis with `size` elements: a power of two, from 16 to `most`.

    It is the smallest power of two that covers the axis, but at most `most` and, for tensor cores, at least 16.
    """
    return min(most, max(16, _power(2 * size - 1)))


def rows_of_tile(rows: int, experts: int, dtype) -> int:
    """Return the number of rows of a tile, if `rows` rows in total are routed to `experts` experts.

    It is the largest power of two up to the mean number of rows of an expert, so that few rows of the tiles are empty.
    It is at least 16, and at most 128 (64 for float32).
    """
    most = 64 if dtype == jnp.float32 else 128
    return max(16, min(most, _power(rows // experts)))


def _is_large() -> bool:
    """Return whether JAX traces code for a data centre GPU, Hopper or newer, whose tensor cores need wide tiles.

    The tensor cores of these GPUs read their operands from shared memory, and a block has more than 200 KiB of it.
    """
    return triton_call.shared_memory() > 200 * 1024


def _stages(rows: int, columns: int, depth: int, dtype, most: int) -> int:
    """Return how many stages of a software pipeline fit into shared memory, but at least 2 and at most `most`.

    A stage holds two tiles, [rows, depth] and [depth, columns], of elements of `dtype`.
    """
    stage = (rows + columns) * depth * jnp.dtype(dtype).itemsize
    return max(2, min(most, triton_call.shared_memory() // stage))


def product_sizes(rows: int, depth: int, columns: int, dtype, *, products: int = 1, widest: int = 256) -> Sizes:
    """Return the sizes of a program that multiplies rows [rows, depth] by `products` weights of one expert.

    Each weight is [depth, columns]. The program computes `Sizes.columns` columns of every product, in steps of
    `Sizes.depth` along the summed axis. `products` * `Sizes.columns` is at most `widest`, a number of 128 or more.
    `Sizes.columns` is small for float32, which runs without tensor cores. It is also small if `rows` is small, because
    then most of the time goes into loading weights.
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
    """Return the sizes of a program that computes a tile of the gradient of a weight [D, F].

    The program sums over the rows of an expert, `Sizes.depth` rows in each step. A step has two loads: first the
    row numbers, and then the rows with these numbers. The second load must wait for the first one, so each step takes
    two pipeline stages. The number of stages is 2 * n, where n is the number of steps whose rows fit into shared
    memory, but at least 2 and at most 3.
    """
    if dtype == jnp.float32:
        rows_most, columns_most, depth, warps = 64, 64, 32, 4
    else:
        rows_most, columns_most, depth, warps = 128, 256 if _is_large() else 128, 64 if _is_large() else 32, 8
    rows, columns = fitting(rows_most, D), fitting(columns_most, F)
    return Sizes(rows, columns, depth, warps, 2 * _stages(rows, columns, depth, dtype, 3))
