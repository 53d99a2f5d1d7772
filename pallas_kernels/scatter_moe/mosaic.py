"""The implementation "mosaic" of `expert_linear` and `expert_mlp`: Pallas Mosaic kernels for Hopper GPUs.

This module checks whether the kernels can run a call, pads the arrays, and launches the kernels. A call is a
`LinearCall` or an `MlpCall`: the checked arguments of `expert_linear` or `expert_mlp`.
"""

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .. import hopper
from . import fused, xla
from .call import ACTIVATIONS, GATED, PRE_ACTIVATION, LinearCall, MlpCall
from .kernels import Kernels
from .mosaic_float32 import d_weights, product
from .mosaic_product import COLUMNS, ROWS, Plan, activated, d_activated

WIDTH = 64  # columns of a tile in shared memory; D and F are padded to multiples of it, for the copy engine
ONES = 8  # columns of the array `left` in `_d_bias`: one column is enough, but a copy takes at least 16 bytes of a row


def refuses(call: LinearCall | MlpCall) -> str | None:
    """Return the reason why the Mosaic kernels cannot run this call, or None if they can."""
    if reason := hopper.refuses(call.x):
        return reason
    if call.x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes bfloat16, float16 and float32, not {call.x.dtype}"
    return None


def detail(call: LinearCall | MlpCall) -> str:
    """Describe for `explain` how the kernels run this call, such as "128 x 256 tiles, activation by XLA"."""
    rows, experts = call.routing.order.shape[0], call.routing.num_experts
    odd = any(n % WIDTH for n in _widths(call))
    text = f"{ROWS * _warpgroups(rows, experts)} x {2 * COLUMNS} tiles"
    text += f", D and F padded to multiples of {WIDTH}" if odd else ""
    text += ", activation by XLA" if _is_unfused(call) else ""
    return text + (", float32 as six products of bfloat16" if call.x.dtype == jnp.float32 else "")


def _widths(call) -> tuple[int, ...]:
    """Return the shape of one expert's weight matrix: (D, F) of `weight`, or (F, D) of `w_out` for `expert_mlp`."""
    return call.weight.shape[1:] if isinstance(call, LinearCall) else call.w_out.shape[1:]


def _warpgroups(rows: int, experts: int) -> int:
    """Return how many warpgroups of a thread block multiply, if `rows` rows in total are routed to `experts` experts.

    Each of these warpgroups multiplies 64 rows of a tile. The number is 2 if an expert has 128 rows or more on average.
    With fewer rows, as in decoding, many rows of a tile of 128 rows would be empty, so the number is 1.
    """
    return 2 if rows >= 2 * ROWS * experts else 1


def _padded(x, *axes: int):
    """Return x, padded with zeros so that its size along every axis in `axes` is a multiple of 64.

    `axes` are the indices of these axes. An array that needs no padding is not copied.
    """
    return jnp.pad(x, [(0, -n % WIDTH if axis in axes else 0) for axis, n in enumerate(x.shape)])


def mlp(call: MlpCall):
    """Return the result of `expert_mlp`, [T, D], computed by Mosaic kernels.

    D and F are padded with zeros to multiples of 64, because the copy engine copies complete tiles. If an array is
    empty, plain JAX computes the result.
    """
    if 0 in call.x.shape + call.w_out.shape:
        return xla.mlp(call)
    if _is_unfused(call):
        return _mlp_of_linears(call)
    D, F = call.w_out.shape[2], call.w_out.shape[1]
    parts = 2 if call.activation in GATED else 1

    def halves(x):  # x [.., parts * F]; each part of F columns is padded to a multiple of 64 columns
        x = _padded(x.reshape(*x.shape[:-1], parts, F), x.ndim)
        return x.reshape(*x.shape[:-2], -1)

    b_in = None if call.b_in is None else halves(call.b_in)
    b_out = None if call.b_out is None else _padded(call.b_out, 1)
    w_in, w_out = _padded(halves(call.w_in), 1), _padded(call.w_out, 1, 2)
    padded = call._replace(x=_padded(call.x, 1), w_in=w_in, w_out=w_out, b_in=b_in, b_out=b_out)
    return fused.mlp(KERNELS, padded)[:, :D]


def _is_unfused(call: LinearCall | MlpCall) -> bool:
    """Return whether this is a call of `expert_mlp` in which XLA computes the activation, and not a kernel.

    XLA computes it for "gelu", because Mosaic kernels have no error function. XLA also computes it for float32, because
    the float32 kernels compute only matrix products. (Float32 is meant for checks and small models.)
    """
    return isinstance(call, MlpCall) and (call.activation == "gelu" or call.x.dtype == jnp.float32)


def _mlp_of_linears(call: MlpCall):
    """Return the result of `expert_mlp`, [T, D]: two calls of `linear`, and between them the activation by XLA."""
    up = LinearCall(call.x, call.w_in, call.b_in, None, call.routing, "token", "sorted")
    hidden = ACTIVATIONS[call.activation](checkpoint_name(linear(up), PRE_ACTIVATION))
    return linear(LinearCall(hidden, call.w_out, call.b_out, call.gates, call.routing, "sorted", "token"))


def linear(call: LinearCall):
    """Return the result of `expert_linear`, [T*k, F], or [T, F] with gates, computed by Mosaic kernels.

    D and F are padded with zeros to multiples of 64, because the copy engine copies complete tiles. If an array is
    empty, plain JAX computes the result.
    """
    if 0 in call.x.shape + call.weight.shape:
        return xla.linear(call)
    bias = None if call.bias is None else _padded(call.bias, 1)
    padded = call._replace(x=_padded(call.x, 1), weight=_padded(call.weight, 1, 2), bias=bias)
    return fused.linear(KERNELS, padded)[:, : call.weight.shape[2]]


# The methods of `Kernels`. Its docstrings explain them and their arguments. The pre-activation h is [parts, R, F] here:
# for a gated activation, h has two parts, the halves of the hidden layer. For any other activation, h has one part.


def _rows_of_tile(routing, x) -> int:
    return ROWS * _warpgroups(routing.order.shape[0], routing.num_experts)


def _parts(x):
    """Return x as an array [parts, rows, width]. A gated hidden layer has two parts, its halves; other arrays have one.

    An array [rows, width] becomes [1, rows, width]. An array with three axes is returned unchanged.
    """
    return x if x.ndim == 3 else x[None]


def _plan(tasks, x, columns: int, *, parts: int = 1, **options) -> Plan:
    """Return the `Plan` of a kernel launch, for x [x_parts, rows, width] and a result [parts, rows, columns].

    `Plan` explains what a part is. `options` are other fields of `Plan`. The number of multiplying warpgroups follows
    from the size of the tiles in `tasks`: each of them multiplies 64 rows of a tile.
    """
    warpgroups = tasks.rows_of_tile // ROWS
    return Plan(x.shape[0], x.shape[2], columns, parts, x.dtype, warpgroups, **options)


def _bias(bias, parts: int = 1):
    """Return the biases of all experts as the kernels read them: fp32 [E + 1, parts, F padded to a multiple of 256].

    `bias` is [E, parts * F]. `parts` is 2 for a gated activation, whose hidden layer has two halves, else 1. Entry E of
    the result is zero: it is the bias of rows without an expert. If `bias` is None, return None.
    """
    if bias is None:
        return None
    bias = bias.astype(jnp.float32).reshape(bias.shape[0], parts, -1)
    return jnp.pad(bias, ((0, 1), (0, 0), (0, -bias.shape[2] % (2 * COLUMNS))))


def _product(x, source, weight, tasks, target, bias=None, *, first=0, columns=None, transposed=False):
    x, columns = _parts(x), weight.shape[1 if transposed else 2] if columns is None else columns
    plan = _plan(tasks, x, columns, transposed=transposed, first=first)
    bias_columns = None if bias is None else _bias(bias[:, first : first + columns])
    return product(plan, x, source, weight, tasks, target, tasks.num_pairs, bias_columns)


def _activated(activation, x, source, weight, tasks, bias, *, keep):
    parts = 2 if activation in GATED else 1
    plan = _plan(tasks, x[None], weight.shape[2] // parts, parts=parts)
    return activated(plan, activation, x[None], source, weight, tasks, _bias(bias, parts), keep=keep)


def _d_activated(activation, d_out, source, weight, tasks, h, gates):
    plan = _plan(tasks, d_out[None], h.shape[2], parts=h.shape[0], transposed=True)
    dh, gated, d_gate = d_activated(plan, activation, d_out[None], source, weight, tasks, h, gates)
    return dh, gated, d_gate.sum(0)


def _d_gated(d_out, source, weight, tasks, x, x_rows, gates, routing):
    """Compute the backward pass of gate * (x @ weight[e]), the output of one expert in `expert_linear` with gates.

    Return (dx, gated, gated_numbers, d_gate). `Kernels.d_gated` explains the arguments and the results. A Mosaic kernel
    computes dy = d_out[source] @ weight[e]^T, with one row per (token, choice) pair. XLA computes the rest.
    """
    k = gates.shape[1]
    dy = _product(d_out, source, weight, tasks, tasks.pairs, transposed=True).astype(jnp.float32)
    by_pair = {"token": lambda: jnp.repeat(x, k, 0), "pair": lambda: x, "sorted": lambda: x[routing.inverse]}
    idle = (routing.expert_indices >= routing.num_experts).reshape(-1, 1)
    x_of_pair = jnp.where(idle, 0, by_pair[x_rows]()).astype(jnp.float32)
    gate = gates.astype(jnp.float32).reshape(-1, 1)
    dx = (gate * dy).astype(x.dtype)
    dx = dx[routing.order] if x_rows == "sorted" else dx
    return dx, (gate * x_of_pair).astype(x.dtype), tasks.pairs, (x_of_pair * dy).sum(-1)


def _d_weights(left, left_numbers, right, right_numbers, tasks):
    return d_weights(left, left_numbers, _parts(right), right_numbers, tasks)


def _d_bias(bias, right, numbers, tasks, gates=None):
    """Compute the gradient of `bias` [E, F]: for every expert, the sum of the cotangents of its outputs.

    `Kernels.d_bias` explains the arguments. A Mosaic kernel computes the sum for an expert as a matrix product,
    left^T @ right. `left` has a row for every (token, choice) pair. Without gates, the row is filled with ones. With
    gates, it is filled with the gate of the pair.
    """
    gate_of_pair = jnp.ones((1, 1)) if gates is None else gates.reshape(-1, 1)
    left = jnp.broadcast_to(gate_of_pair.astype(right.dtype), (tasks.num_pairs, ONES))
    sums = _d_weights(left, tasks.pairs, right, numbers, tasks)[:, 0]
    return sums.reshape(bias.shape).astype(bias.dtype)


class MosaicKernels(Kernels):
    """The expert kernels for Hopper GPUs as an object that `fused.py` calls. `Kernels` says what each method does."""

    rows_of_tile, product = staticmethod(_rows_of_tile), staticmethod(_product)
    activated, d_activated = staticmethod(_activated), staticmethod(_d_activated)
    d_gated, d_weights, d_bias = staticmethod(_d_gated), staticmethod(_d_weights), staticmethod(_d_bias)


KERNELS = MosaicKernels()
