"""The Triton kernels as functions of arrays: their sizes, their grids, and the work that they state.

`work` is from `tasks`, in tiles of `rows_of_tile`. Row numbers are one for every row of the tiles, -1 where none is.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import cost, triton_call
from .tasks import Tasks

# The kernels name an activation by the function of its first half.
POINTWISE = {"swiglu": "silu", "geglu": "gelu_tanh", "reglu": "relu"}


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


def _fitting(most: int, size: int) -> int:
    """A power of two: `most`, or as much as the array has, but what a tensor core takes."""
    return min(most, max(16, _power(2 * size - 1)))


def rows_of_tile(rows: int, experts: int, dtype) -> int:
    """As many as experts have on average, so that few are empty: 16 when decoding, and no more than fit."""
    most = 64 if dtype == jnp.float32 else 128
    return max(16, min(most, _power(rows // experts)))


def _is_large() -> bool:
    """Whether a GPU of data centres since Hopper, whose tensor cores read shared memory and need tiles this wide."""
    return triton_call.shared_memory() > 200 * 1024


def _stages(rows: int, columns: int, depth: int, dtype, most: int) -> int:
    stage = (rows + columns) * depth * jnp.dtype(dtype).itemsize
    return max(2, min(most, triton_call.shared_memory() // stage))


def product_sizes(rows: int, depth: int, columns: int, dtype, *, products: int = 1, widest: int = 256) -> Sizes:
    """Of `products` products with the same rows. Float32 runs without tensor cores, and few rows wait for weights."""
    if dtype == jnp.float32:
        columns_most, depth_most, warps = 64, 32, 4
    elif rows < 64:
        columns_most, depth_most, warps = 64, 128 if _is_large() else 64, 4
    elif _is_large() and rows == 128:
        columns_most, depth_most, warps = widest, 64, 8
    else:
        columns_most, depth_most, warps = 128, 64 if _is_large() else 32, rows // 16
    N, K = _fitting(columns_most // products, columns), _fitting(depth_most, depth)
    return Sizes(rows, N, K, warps, _stages(rows, products * N, K, dtype, 4))


def weight_sizes(D: int, F: int, dtype) -> Sizes:
    """`depth` rows at a time, whose numbers are loaded ahead of them: that takes half of the stages."""
    if dtype == jnp.float32:
        rows_most, columns_most, depth, warps = 64, 64, 32, 4
    else:
        rows_most, columns_most, depth, warps = 128, 256 if _is_large() else 128, 64 if _is_large() else 32, 8
    rows, columns = _fitting(rows_most, D), _fitting(columns_most, F)
    return Sizes(rows, columns, depth, warps, 2 * _stages(rows, columns, depth, dtype, 3))


def _launch(name: str, flops: int, kernel: Callable, sizes: Sizes, *arrays, **options):
    run = partial(triton_call.launch, kernel, num_warps=sizes.warps, num_stages=sizes.stages, **options)
    return cost.kernel(name, flops, run)(*arrays)


def _products(name: str, sizes: Sizes, work: Tasks, D: int, F: int, products: int, *arrays, **options):
    """A kernel of `triton_product`, over the row tiles and the columns."""

    def kernel():
        from . import triton_product

        return getattr(triton_product, name)

    tiles = work.expert.shape[0]
    return _launch(
        f"expert_{name}", 2 * products * work.place.shape[0] * D * F, kernel, sizes, *arrays,
        grid=(tiles * -(-F // sizes.columns),), E=work.rows.shape[0], D=D, F=F, TILES=tiles, M=sizes.rows,
        N=sizes.columns, K=sizes.depth, **options,
    )  # fmt: skip


def _rows(work: Tasks) -> int:
    return work.slots.shape[0] // work.expert.shape[0]


def product(x, source, weight, work: Tasks, target, bias=None, *, first=0, columns=None, transposed=False):
    """[R, columns] from column `first` on: x[source] @ weight + bias in the rows `target`. x [rows, D].

    weight [E, D, F], or [E, F, D] if transposed; bias [E, F].
    """
    D, F = (weight.shape[2], weight.shape[1]) if transposed else weight.shape[1:]
    columns = F if columns is None else columns
    sizes = product_sizes(_rows(work), D, columns, x.dtype)
    return _products(
        "product", sizes, work, D, columns, 1,
        x, source, weight, weight if bias is None else bias, work.expert, work.count, target,
        out=jax.ShapeDtypeStruct((work.place.shape[0], columns), x.dtype),
        FIRST=first, ALL=F, TRANSPOSED=transposed, BIASED=bias is not None,
    )  # fmt: skip


def activated(activation: str, x, source, weight, work: Tasks, bias=None, *, keep: bool):
    """act(h) [R, F] and, to keep, h, [R, F] or [R, 2F], of h = x[source] @ weight + bias, in sorted rows."""
    D, width = weight.shape[1:]
    products = 2 if activation in POINTWISE else 1
    F, R = width // products, work.place.shape[0]
    sizes = product_sizes(_rows(work), D, F, x.dtype, products=products, widest=128 * products)
    out, hidden = _products(
        "activated", sizes, work, D, F, products,
        x, source, weight, weight if bias is None else bias, work.expert, work.count, work.sorted,
        out=(jax.ShapeDtypeStruct((R, F), x.dtype), jax.ShapeDtypeStruct((R, width) if keep else (1, 1), x.dtype)),
        GATED=products == 2, ACTIVATION=POINTWISE.get(activation, activation), BIASED=bias is not None, KEEP=keep,
    )  # fmt: skip
    return out, hidden


def d_activated(activation: str, d_out, source, weight, hidden, kept, gates, work: Tasks, target):
    """dh like hidden, gate * act(h) [R, F], <act(h), dy> [rows of the tiles], with dy = d_out[source] @ weight^T.

    weight [E, F, D]; h is in the rows `kept` of hidden, dh and the rest in the rows `target`; gates are of the tiles.
    """
    F, D = weight.shape[1:]
    gated, R = activation in POINTWISE, work.place.shape[0]
    sizes = product_sizes(_rows(work), D, F, d_out.dtype, widest=128)
    dh, gated, d_gates = _products(
        "d_activated", sizes, work, D, F, 1,
        d_out, source, weight, hidden, kept, gates, work.expert, work.count, target,
        out=(
            jax.ShapeDtypeStruct((R, hidden.shape[1]), d_out.dtype),
            jax.ShapeDtypeStruct((R, F), d_out.dtype),
            jax.ShapeDtypeStruct((-(-F // sizes.columns), gates.shape[0]), jnp.float32),
        ),
        GATED=gated, ACTIVATION=POINTWISE.get(activation, activation),
    )  # fmt: skip
    return dh, gated, d_gates.sum(0)


def d_weights(left, left_numbers, right, right_numbers, work: Tasks):
    """[E, D, F]: the sums of left[r]^T right[r] over the rows of every expert."""

    def kernel():
        from .triton_weights import d_weights

        return d_weights

    E, D, F = work.rows.shape[0], left.shape[1], right.shape[1]
    sizes = weight_sizes(D, F, left.dtype)
    heavy = jnp.argsort(-work.rows, stable=True).astype(jnp.int32)
    return _launch(
        "expert_d_weights", 2 * work.place.shape[0] * D * F, kernel, sizes,
        left, left_numbers, right, right_numbers, heavy, work.first, work.rows,
        out=jax.ShapeDtypeStruct((E, D, F), left.dtype), grid=(E * -(-D // sizes.rows) * -(-F // sizes.columns),),
        D=D, F=F, M=_rows(work), DOWN=sizes.rows, ACROSS=sizes.columns, R=sizes.depth,
    )  # fmt: skip


def d_bias(bias, right, right_numbers, work: Tasks, gates=None):
    """Like bias [E, F]: the sums of the rows of every expert, times their gates if given; None without a bias."""
    if bias is None:
        return None

    def kernel():
        from .triton_weights import d_bias

        return d_bias

    E, F = bias.shape
    sizes = Sizes(rows=1, columns=_fitting(64, F), depth=64, warps=4, stages=3)
    return _launch(
        "expert_d_bias", work.place.shape[0] * F, kernel, sizes,
        right, right_numbers, right_numbers if gates is None else gates, work.first, work.rows,
        out=jax.ShapeDtypeStruct((E, F), bias.dtype), grid=(-(-F // sizes.columns), E),
        F=F, WEIGHED=gates is not None, M=_rows(work), ACROSS=sizes.columns, R=sizes.depth,
    )  # fmt: skip
