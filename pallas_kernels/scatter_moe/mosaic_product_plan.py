"""Two classes that describe the kernels in mosaic_product.py: `Plan` and `Kind`.

A `Plan` has the sizes of one launch of a kernel. A `Kind` has the properties in which the kernels differ.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

ROWS = 64  # rows of a tile that one warpgroup multiplies
COLUMNS = 128  # columns of an accumulator
HALF = COLUMNS // 2
DEPTH = 64  # elements along the summed axis in one step: columns of x, and rows of the weight


class Plan(NamedTuple):
    """The static sizes of one launch of a kernel.

    x is [x_parts, rows of x, width], and a result is [parts, rows of the result, columns].
    Usually, x and the result have one part. The hidden layer of a gated activation has two parts, its two halves. A
    float32 product is the sum of six bfloat16 products. There, x has six parts, one for each bfloat16 product.
    """

    x_parts: int  # the number of parts of a row of x
    width: int  # columns of a part of x
    columns: int  # columns of a part of the result
    parts: int  # the number of parts of a row of the result
    dtype: jnp.dtype  # the type of x and of the weight
    warpgroups: int  # W, the number of multiplying warpgroups of a block
    transposed: bool = False  # whether the weight is [E, F, x_parts * width], and not [E, x_parts * width, F]
    first: int = 0  # the result of `product` has columns first, first + 1, .. of x @ weight[e]
    out_dtype: jnp.dtype | None = None  # the type of the result of `product`; None: dtype

    @property
    def rows(self) -> int:
        """The number of rows of a tile: 64 for each multiplying warpgroup."""
        return ROWS * self.warpgroups

    @property
    def steps_of_part(self) -> int:
        """The number of steps of the matrix product for one part of x. A step multiplies 64 columns of this part."""
        return -(-self.width // DEPTH)


class Kind(NamedTuple):
    """One of the kernels `product`, `activated` and `d_activated`. They differ in their work after the matrix product.

    `finish`: `finish(at, accumulators, inputs, outputs, scratch)` runs in every multiplying warpgroup, after the matrix
      product of a tile. It reads the sums `accumulators` and the arrays `inputs`, and writes the results `outputs` in
      global memory. `at` says which rows and columns of the result the warpgroup computes.
    `per_tile`: how many accumulators [64, 128] a warpgroup has.
    `apart`: the accumulators multiply rows of x by different columns of the weight. Accumulator p has the 128 columns
      from c + p * apart on, where c is the first column of the tile.
    `prefetch`: None, or a function. `prefetch(tile, inputs, scratch)` runs in the copying warpgroup. It starts to copy
      rows of `inputs` to shared memory, where `finish` reads them. It returns the barrier at which the copying
      warpgroup must arrive when these rows are in shared memory.
    """

    name: str
    finish: Callable
    per_tile: int
    apart: int
    prefetch: Callable | None = None

    @property
    def columns_of_tile(self) -> int:
        """The number of columns of a tile of the result: 256 in `product`, 128 in `activated` and `d_activated`.

        There is one exception: the number is 256 in `activated` if the activation is gated and the result has exactly
        128 columns. This has no effect, because one tile has all 128 columns with either number.
        """
        return self.per_tile * COLUMNS if self.apart == COLUMNS else COLUMNS
