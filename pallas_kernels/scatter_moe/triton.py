"""The implementation "triton" of `expert_linear` and `expert_mlp`: Triton kernels for GPUs from sm_80 on.

The functions here say which calls the kernels can run, and launch the kernels.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from .. import cost, triton_call
from . import fused, xla
from .call import LinearCall, MlpCall
from .kernels import Kernels
from .tasks import Tasks, row_numbers
from .triton_sizes import Sizes, fitting, product_sizes, rows_of_tile, weight_sizes

# A gated activation is f(first half of the pre-activation) * second half. POINTWISE has the name of f in the kernels.
POINTWISE = {"swiglu": "silu", "geglu": "gelu_tanh", "reglu": "relu"}


def refuses(call: LinearCall | MlpCall) -> str | None:
    """Return the reason why the Triton kernels cannot run this call, or None if they can."""
    if reason := triton_call.refuses(call.x):
        return reason
    if call.x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes bfloat16, float16 and float32, not {call.x.dtype}"
    return None


def detail(call: LinearCall | MlpCall) -> str:
    """Describe for `explain` the tiles of the forward pass, as rows x columns, such as "128 x 256 tiles".

    For `expert_mlp`, these are the tiles of the product with w_out. The other products may have tiles of other widths.
    """
    weight = call.weight if isinstance(call, LinearCall) else call.w_out
    rows = _rows_of_tile(call.routing, call.x)
    return f"{rows} x {product_sizes(rows, *weight.shape[1:], call.x.dtype).columns} tiles"


def mlp(call: MlpCall):
    """Compute `expert_mlp` with Triton kernels, or in plain JAX if an array is empty. Return its result [T, D]."""
    return xla.mlp(call) if 0 in call.x.shape + call.w_out.shape else fused.mlp(KERNELS, call)


def linear(call: LinearCall):
    """Compute `expert_linear` with Triton kernels, or in plain JAX if an array is empty.

    Return its result: [T*k, F], or [T, F] with gates.
    """
    return xla.linear(call) if 0 in call.x.shape + call.weight.shape else fused.linear(KERNELS, call)


# The methods of `Kernels`, as functions. The pre-activation h is [R, F], or [R, 2F] for a gated activation.


def _launch(name: str, flops: int, kernel: Callable, sizes: Sizes, *arrays, **options):
    """Run a Triton kernel on `arrays`, and return its outputs.

    `kernel` is a function without arguments that returns the `triton.jit` function. `sizes` has the number of warps and
    the number of pipeline stages. `options` are further keyword arguments of `triton_call.launch`. The kernel runs in a
    jitted function whose name contains `name` and `flops`, the number of floating-point operations, so that cost
    estimates find this number (`cost.kernel`).
    """
    run = partial(triton_call.launch, kernel, num_warps=sizes.warps, num_stages=sizes.stages, **options)
    return cost.kernel(name, flops, run)(*arrays)


def _products(name: str, sizes: Sizes, tasks: Tasks, D: int, F: int, products: int, *arrays, **options):
    """Launch the kernel `name` of triton_product.py on `arrays`, and return its outputs.

    The kernel multiplies the row of every (token, choice) pair, with D columns, by `products` weight matrices [D, F] of
    the pair's expert. Each program computes one tile of the result: one tile of rows in `tasks`, and some of the F
    columns. `options` are further keyword arguments of `triton_call.launch`: `out`, the shapes and dtypes of the
    outputs, and constants of the kernel.
    """

    def kernel():
        from . import triton_product

        return getattr(triton_product, name)

    tiles = tasks.expert.shape[0]
    return _launch(
        f"expert_{name}", 2 * products * tasks.num_pairs * D * F, kernel, sizes, *arrays,
        grid=(tiles * -(-F // sizes.columns),), E=tasks.rows.shape[0], D=D, F=F, TILES=tiles, M=sizes.rows,
        N=sizes.columns, K=sizes.depth, **options,
    )  # fmt: skip


def _rows_of_tile(routing, x) -> int:
    return rows_of_tile(routing.order.shape[0], routing.num_experts, x.dtype)


def _product(x, source, weight, tasks, target, bias=None, *, first=0, columns=None, transposed=False):
    D, F = (weight.shape[2], weight.shape[1]) if transposed else weight.shape[1:]
    columns = F if columns is None else columns
    sizes = product_sizes(tasks.rows_of_tile, D, columns, x.dtype)
    return _products(
        "product", sizes, tasks, D, columns, 1,
        x, source, weight, weight if bias is None else bias, tasks.expert, tasks.count, target,
        out=jax.ShapeDtypeStruct((tasks.num_pairs, columns), x.dtype),
        FIRST=first, ALL=F, TRANSPOSED=transposed, BIASED=bias is not None,
    )  # fmt: skip


def _activated(activation, x, source, weight, tasks, bias, *, keep):
    D, width = weight.shape[1:]
    products = 2 if activation in POINTWISE else 1
    F, R = width // products, tasks.num_pairs
    sizes = product_sizes(tasks.rows_of_tile, D, F, x.dtype, products=products, widest=128 * products)
    outs = _products(
        "activated", sizes, tasks, D, F, products,
        x, source, weight, weight if bias is None else bias, tasks.expert, tasks.count, tasks.sorted,
        out=(jax.ShapeDtypeStruct((R, F), x.dtype), jax.ShapeDtypeStruct((R, width) if keep else (1, 1), x.dtype)),
        GATED=products == 2, ACTIVATION=POINTWISE.get(activation, activation), BIASED=bias is not None, KEEP=keep,
    )  # fmt: skip
    return outs if keep else outs[:1]


def _d_activated(activation, d_out, source, weight, tasks, h, gates):
    return _d_activated_rows(activation, d_out, source, weight, tasks, h, tasks.sorted, gates, tasks.sorted)


def _d_gated(d_out, source, weight, tasks, x, x_rows, gates, routing):
    """Compute the backward pass of gate * (x @ weight[e]), the output of one expert in `expert_linear` with gates.

    The kernel `d_activated` computes the backward pass of gate * act(h) @ weight[e]. Here, h is x, and act is the
    identity. Return (dx, gated, gated_numbers, d_gate), as `Kernels.d_gated` explains them.
    """
    k = gates.shape[1]
    target, x_numbers = row_numbers(tasks, "pair" if x_rows == "token" else x_rows, k), row_numbers(tasks, x_rows, k)
    tiled = fused.by_tile(gates, tasks)
    dx, gated, d_gate = _d_activated_rows("none", d_out, source, weight, tasks, x, x_numbers, tiled, target)
    return dx, gated, target, d_gate[tasks.tile_row]


def _d_activated_rows(activation, d_out, source, weight, tasks, h, h_numbers, gates, target):
    """Compute the backward pass of gate * act(h) @ weight[e], the output of one expert, for rows of h in any order.

    The tiles in `tasks` have M rows each. Row i of the tiles has the expert e, the token source[i], the pre-activation
    h[h_numbers[i]] and the gate gates[i]. A row index of -1 means that row i is empty. `weight` is [E, F, D], and
    d_out [.., D] is the cotangent of the output. The cotangent of gate * act(h) is dy = d_out[source[i]] @ weight[e]^T.
    Return (dh, gated, d_gate):

    `dh`: the gradient of h, gate * dy times the derivative of act. The values for row i are at index target[i].
    `gated`: gate * act(h), a factor of the gradient of the weight. The values for row i are at index target[i].
    `d_gate` [tiles * M]: the dot products <act(h), dy>. They are the gradients of `gates`, except for the term of the
      bias that the experts add to their outputs. `fused.py` adds this term.
    """
    F, D = weight.shape[1:]
    sizes, R = product_sizes(tasks.rows_of_tile, D, F, d_out.dtype, widest=128), tasks.num_pairs
    dh, gated, d_gates = _products(
        "d_activated", sizes, tasks, D, F, 1,
        d_out, source, weight, h, h_numbers, gates, tasks.expert, tasks.count, target,
        out=(
            jax.ShapeDtypeStruct((R, h.shape[1]), d_out.dtype),
            jax.ShapeDtypeStruct((R, F), d_out.dtype),
            jax.ShapeDtypeStruct((-(-F // sizes.columns), gates.shape[0]), jnp.float32),
        ),
        GATED=activation in POINTWISE, ACTIVATION=POINTWISE.get(activation, activation),
    )  # fmt: skip
    return dh, gated, d_gates.sum(0)


def _d_weights(left, left_numbers, right, right_numbers, tasks):
    def kernel():
        from .triton_weights import d_weights

        return d_weights

    E, D, F = tasks.rows.shape[0], left.shape[1], right.shape[1]
    sizes = weight_sizes(D, F, left.dtype)
    heavy = jnp.argsort(-tasks.rows, stable=True).astype(jnp.int32)
    return _launch(
        "expert_d_weights", 2 * tasks.num_pairs * D * F, kernel, sizes,
        left, left_numbers, right, right_numbers, heavy, tasks.first, tasks.rows,
        out=jax.ShapeDtypeStruct((E, D, F), left.dtype), grid=(E * -(-D // sizes.rows) * -(-F // sizes.columns),),
        D=D, F=F, M=tasks.rows_of_tile, DOWN=sizes.rows, ACROSS=sizes.columns, R=sizes.depth,
    )  # fmt: skip


def _d_bias(bias, right, numbers, tasks, gates=None):
    def kernel():
        from .triton_weights import d_bias

        return d_bias

    E, F = bias.shape
    sizes = Sizes(rows=1, columns=fitting(64, F), depth=64, warps=4, stages=3)
    return _launch(
        "expert_d_bias", tasks.num_pairs * F, kernel, sizes,
        right, numbers, numbers if gates is None else fused.by_tile(gates, tasks), tasks.first, tasks.rows,
        out=jax.ShapeDtypeStruct((E, F), bias.dtype), grid=(-(-F // sizes.columns), E),
        F=F, WEIGHED=gates is not None, M=tasks.rows_of_tile, ACROSS=sizes.columns, R=sizes.depth,
    )  # fmt: skip


class TritonKernels(Kernels):
    """The expert kernels in Triton, as an object that fused.py calls. `Kernels` says what each method does."""

    rows_of_tile, product = staticmethod(_rows_of_tile), staticmethod(_product)
    activated, d_activated = staticmethod(_activated), staticmethod(_d_activated)
    d_gated, d_weights, d_bias = staticmethod(_d_gated), staticmethod(_d_weights), staticmethod(_d_bias)


KERNELS = TritonKernels()
