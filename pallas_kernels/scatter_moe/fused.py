"""`expert_linear` and `expert_mlp` by GPU kernels, written in Mosaic or in Triton: the forward and backward passes.

The functions call the kernels through the interface `kernels.Kernels`. The forward pass of `mlp` saves its arguments
and the pre-activation h = x @ w_in + b_in. The backward pass does not compute y = act(h) @ w_out again. It would need y
only for the gradient of a gate, the dot product <y + b_out, d_out>, where d_out is the cotangent of the output. But
<y, d_out> is equal to <act(h), dy> with dy = d_out @ w_out^T, and dy is needed in any case, for the gradient of h.

The kernels gather the rows of x and d_out when they load them, so the forward pass makes no array with k copies of each
row of x. XLA, and not a kernel, sums the k rows of every token, both in the output and in the gradient of x. If these
rows are sorted by expert, a gather reads them, and XLA fuses the gather into the sum.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .call import PRE_ACTIVATION, LinearCall, MlpCall
from .kernels import Kernels
from .tasks import Tasks, row_numbers

UNCOMBINED = 2**30  # bytes; if the outputs of all (token, choice) pairs take more, `_combined` uses groups of columns
STEP = 256  # the number of columns of a group is a multiple of this


def by_tile(gates, tasks: Tasks):
    """Return the gate of every row of the tiles in `tasks`, fp32 [tiles * M]. The argument `gates` is [T, k].

    `tasks` has the (token, choice) pairs, sorted by expert and cut into tiles of M rows. A row of a tile gets the gate
    of its pair. An empty row gets 0.
    """
    return jnp.where(tasks.pairs < 0, 0, gates.astype(jnp.float32).reshape(-1)[jnp.maximum(tasks.pairs, 0)])


def _combine(y, routing, gates=None):
    """Return the sum of the k expert outputs of each token, fp32 [T, F].

    y [T*k, F] has one output for every (token, choice) pair, sorted by expert. With gates [T, k], each output is first
    multiplied by its gate.
    """
    y = y[routing.inverse].reshape(*routing.expert_indices.shape, y.shape[-1]).astype(jnp.float32)
    return (y if gates is None else gates.astype(jnp.float32)[..., None] * y).sum(1)


def _combined(kernels: Kernels, x, weight, routing, tasks, gates=None, bias=None, *, dtype, transposed=False):
    """Multiply rows by the weights of their experts, and sum the k results of each token. Return [T, F] in `dtype`.

    x has one row for every (token, choice) pair, sorted by expert. Let x_s be the row of x for choice s of token t, and
    e the expert of this choice. Then

      out[t] = sum_s gates[t,s] * (x_s @ weight[e] + bias[e]).

    Without gates, every gate is 1. The weight is [E, D, F], or [E, F, D] if `transposed`. The columns of the result are
    computed in groups, so that the terms of the sum, [T*k, columns of a group], usually take 1 GiB or less. A group has
    at least 256 columns, or all columns if there are fewer.
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

    For choice s of token t with expert e, let y be the product of the input row and the weight of e. Then the output of
    token t is the sum over its choices of gates[t,s] * (y + bias[e]). With d_out [T, F], the cotangent of the output,
    the gradient of gates[t,s] is

      <y, d_out[t]> + <bias[e], d_out[t]>.

    `d_gate` [T*k] has the first term for every (token, choice) pair. `bias` is [E, F], or None for zero.
    """
    d_gates = d_gate.reshape(gates.shape)
    if bias is not None:
        chosen = jnp.pad(bias, ((0, 1), (0, 0)))[routing.expert_indices].astype(jnp.float32)
        d_gates += (chosen * d_out[:, None].astype(jnp.float32)).sum(-1)
    return d_gates.astype(gates.dtype)


# Feed-forward networks.


def mlp(kernels: Kernels, call: MlpCall):
    """Return the result of `expert_mlp`, [T, D], computed by GPU kernels. The backward pass uses GPU kernels too.

    `kernels` are the kernels of Mosaic or of Triton. `call` has the checked arguments.
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
    """Return the result of `expert_linear`, [T*k, F], or [T, F] with gates, computed by GPU kernels.

    The backward pass uses GPU kernels too. `kernels` are the kernels of Mosaic or of Triton. `call` has the checked
    arguments.
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
