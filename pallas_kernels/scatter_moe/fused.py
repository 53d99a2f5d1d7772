"""Code around the GPU kernels of the experts, shared by Mosaic and Triton: derivatives, and sums over the k choices.

The forward pass of `mlp` saves its arguments and the pre-activation h. Let d_out be the cotangent of the output, y =
act(h) w_out and dy = d_out w_out^T. Then the gradient of a gate is <y, d_out> = <act(h), dy>, so the backward pass does
not need y. The kernels gather the rows of x and d_out when they load them, so no array with k copies of these rows is
made. For every token, the k rows of the output and the k rows of the gradient of x are summed. XLA computes both sums
as gathers, which it fuses. `kernels.py` says what the kernels take and return.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .call import PRE_ACTIVATION, LinearCall, MlpCall
from .kernels import Kernels
from .tasks import Tasks, row_numbers

UNCOMBINED = 2**30  # bytes; if the outputs of all (token, choice) pairs take more, columns are computed in groups
STEP = 256  # the number of columns of a group is a multiple of this


def by_tile(gates, tasks: Tasks):
    """Return the gate of every row of the tiles in `tasks`, fp32 [tiles * M], from gates [T, k].

    M is the number of rows of a tile. A tile row without a (token, choice) pair gets 0.
    """
    return jnp.where(tasks.pairs < 0, 0, gates.astype(jnp.float32).reshape(-1)[jnp.maximum(tasks.pairs, 0)])


def _combine(y, routing, gates=None):
    """Return the sum of the k expert outputs of each token, fp32 [T, F]. The outputs y [T*k, F] are sorted by expert.

    With gates [T, k], each output is multiplied by its gate before the sum.
    """
    y = y[routing.inverse].reshape(*routing.expert_indices.shape, y.shape[-1]).astype(jnp.float32)
    return (y if gates is None else gates.astype(jnp.float32)[..., None] * y).sum(1)


def _combined(kernels: Kernels, x, weight, routing, tasks, gates=None, bias=None, *, dtype, transposed=False):
    """Return, for each token, the sum over its k choices of gate * (x @ weight[e] + bias[e]): [T, F] in `dtype`.

    x has one row for every (token, choice) pair, and the rows are sorted by expert. The weight is [E, D, F], or
    [E, F, D] if `transposed`. Without gates, every gate is 1. The columns are computed in groups, so that the terms of
    the sum, [T*k, columns of a group], take about UNCOMBINED bytes or less.
    """
    columns = weight.shape[1 if transposed else 2]
    at_once = max(1, UNCOMBINED // (routing.order.shape[0] * dtype.itemsize) // STEP) * STEP
    pieces = []
    for first in range(0, columns, at_once):
        size = min(at_once, columns - first)
        options = dict(first=first, columns=size, transposed=transposed)
        y = kernels.product(x, tasks.sorted, weight, tasks, tasks.sorted, bias, **options)
        out = _combine(y, routing, gates).astype(dtype)
        x, out = lax.optimization_barrier((x, out))  # XLA must compute one group after the other
        pieces.append(out)
    return jnp.concatenate(pieces, 1)


def _d_gates(gates, d_gate, bias, d_out, routing):
    """Return the gradient of the gates, [T, k].

    The output of a token is the sum over its choices of gate * (y + bias), where y is the result of the matrix product.
    So the gradient of a gate is <y, d_out> + <bias, d_out>. `d_gate` has <y, d_out> of every (token, choice) pair,
    [T*k]. `bias` is [E, F] or None, and `d_out` [T, F] is the cotangent of the output.
    """
    d_gates = d_gate.reshape(gates.shape)
    if bias is not None:
        chosen = jnp.pad(bias, ((0, 1), (0, 0)))[routing.expert_indices].astype(jnp.float32)
        d_gates += (chosen * d_out[:, None].astype(jnp.float32)).sum(-1)
    return d_gates.astype(gates.dtype)


# Feed-forward networks.


def mlp(kernels: Kernels, call: MlpCall):
    """Return the result of `expert_mlp`, [T, D].

    `kernels` are the GPU kernels of Mosaic or Triton.
    """
    arrays = call.x, call.w_in, call.w_out, call.b_in, call.b_out, call.gates
    return _mlp(*arrays, call.routing, call.activation, kernels)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _mlp(x, w_in, w_out, b_in, b_out, gates, routing, activation, kernels):
    return _mlp_forward(x, w_in, w_out, b_in, b_out, gates, routing, activation, kernels, keep=False)[0]


def _mlp_forward(x, w_in, w_out, b_in, b_out, gates, routing, activation, kernels, keep=True):
    tasks = kernels.tasks(routing, x)
    by_token = row_numbers(tasks, "token", gates.shape[1])
    activated, *hidden = kernels.activated(activation, x, by_token, w_in, tasks, b_in, keep=keep)
    out = _combined(kernels, activated, w_out, routing, tasks, gates, b_out, dtype=x.dtype)
    return out, (x, w_in, w_out, b_in, b_out, gates, routing, *(checkpoint_name(h, PRE_ACTIVATION) for h in hidden))


def _mlp_backward(activation, kernels, residuals, d_out):
    x, w_in, w_out, b_in, b_out, gates, routing, h = residuals
    tasks, d_out = kernels.tasks(routing, x), d_out.astype(x.dtype)
    by_token = row_numbers(tasks, "token", gates.shape[1])
    dh, gated, d_gate = kernels.d_activated(activation, d_out, by_token, w_out, tasks, h, by_tile(gates, tasks))
    d_gates = _d_gates(gates, d_gate[tasks.tile_row], b_out, d_out, routing)
    d_w_out = kernels.d_weights(gated, tasks.sorted, d_out, by_token, tasks).reshape(w_out.shape)
    d_w_in = kernels.d_weights(x, by_token, dh, tasks.sorted, tasks).reshape(w_in.shape)
    dx = _combined(kernels, dh, w_in, routing, tasks, dtype=x.dtype, transposed=True)
    d_b_in = None if b_in is None else kernels.d_bias(b_in, dh, tasks.sorted, tasks)
    d_b_out = None if b_out is None else kernels.d_bias(b_out, d_out, by_token, tasks, gates)
    return dx, d_w_in, d_w_out, d_b_in, d_b_out, d_gates, None


_mlp.defvjp(_mlp_forward, _mlp_backward)


# Linear maps.


def linear(kernels: Kernels, call: LinearCall):
    """Return the result of `expert_linear`, [T*k, F], or [T, F] with gates.

    `kernels` are the GPU kernels of Mosaic or Triton.
    """
    arrays = call.x, call.weight, call.bias, call.gates
    return _linear(*arrays, call.routing, call.x_rows, call.out_rows, kernels)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _linear(x, weight, bias, gates, routing, x_rows, out_rows, kernels):
    tasks, k = kernels.tasks(routing, x), routing.expert_indices.shape[1]
    target = row_numbers(tasks, "sorted" if out_rows == "token" else out_rows, k)
    y = kernels.product(x, row_numbers(tasks, x_rows, k), weight, tasks, target, bias)
    return _combine(y, routing, gates).astype(x.dtype) if out_rows == "token" else y


def _linear_forward(x, weight, bias, gates, routing, x_rows, out_rows, kernels):
    out = _linear(x, weight, bias, gates, routing, x_rows, out_rows, kernels)
    return out, (x, weight, bias, gates, routing)


def _linear_backward(x_rows, out_rows, kernels, residuals, d_out):
    x, weight, bias, gates, routing = residuals
    tasks, (T, k), d_out = kernels.tasks(routing, x), routing.expert_indices.shape, d_out.astype(x.dtype)
    numbers, d_gates = row_numbers(tasks, out_rows, k), None
    if gates is None:
        left, left_numbers = x, row_numbers(tasks, x_rows, k)
        target = row_numbers(tasks, "pair" if x_rows == "token" else x_rows, k)
        dx = kernels.product(d_out, numbers, weight, tasks, target, transposed=True)
    else:
        dx, left, left_numbers, d_gate = kernels.d_gated(d_out, numbers, weight, tasks, x, x_rows, gates, routing)
        d_gates = _d_gates(gates, d_gate, bias, d_out, routing)
    if x_rows == "token":
        dx = dx.reshape(T, k, -1).astype(jnp.float32).sum(1).astype(x.dtype)
    d_weight = kernels.d_weights(left, left_numbers, d_out, numbers, tasks).reshape(weight.shape)
    d_bias = None if bias is None else kernels.d_bias(bias, d_out, numbers, tasks, gates)
    return dx, d_weight, d_bias, d_gates, None


_linear.defvjp(_linear_forward, _linear_backward)
