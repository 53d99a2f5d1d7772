"""Sizes of the expert kernels in Triton, by the chip, the type and the rows of an expert: a rule, not yet measured.

Older tensor cores take their operands from registers, so a thread has room for half of the sums. The tensor cores of
data centre GPUs since Hopper read shared memory, and these GPUs have more of it.
"""

from typing import NamedTuple

import jax.numpy as jnp

from .. import triton_call


class Sizes(NamedTuple):
    """A program takes `rows` x `columns` of a result, by `depth` at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def _power(n: int) -> int:
    """The largest power of two up to n."""
    return 1 << max(0, n.bit_length() - 1)


def fitting(most: int, size: int) -> int:
    """A power of two: `most`, or less if the array is smaller, but at least 16, which a tensor core needs."""
    return min(most, max(16, _power(2 * size - 1)))


def rows_of_tile(rows: int, experts: int, dtype) -> int:
    """As many rows as an expert has on average, so that few rows of a tile are empty: from 16 to what fits."""
    most = 64 if dtype == jnp.float32 else 128
    return max(16, min(most, _power(rows // experts)))


def _is_large() -> bool:
    """Whether this is a data centre GPU since Hopper. Its tensor cores read shared memory and need wide tiles."""
    return triton_call.shared_memory() > 200 * 1024


def _stages(rows: int, columns: int, depth: int, dtype, most: int) -> int:
    stage = (rows + columns) * depth * jnp.dtype(dtype).itemsize
    return max(2, min(most, triton_call.shared_memory() // stage))


def product_sizes(rows: int, depth: int, columns: int, dtype, *, products: int = 1, widest: int = 256) -> Sizes:
    """The sizes of `products` products with the same rows.

    Float32 runs without tensor cores. With few rows, loading the weights takes the most time.
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
    """The sizes of a product for weights. `depth` rows are taken at a time.

    The row numbers are loaded ahead of the rows, which takes half of the stages.
    """
    if dtype == jnp.float32:
        rows_most, columns_most, depth, warps = 64, 64, 32, 4
    else:
        rows_most, columns_most, depth, warps = 128, 256 if _is_large() else 128, 64 if _is_large() else 32, 8
    rows, columns = fitting(rows_most, D), fitting(columns_most, F)
    return Sizes(rows, columns, depth, warps, 2 * _stages(rows, columns, depth, dtype, 3))
