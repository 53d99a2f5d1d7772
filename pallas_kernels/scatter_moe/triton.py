"""Expert products by Triton, on every GPU since sm_80: the calls they take and the derivatives.

Residuals of `mlp`: x, the pre-activation, the gates and the routing. With y = act(h) w_out and dy = d_out w_out^T, the
gradient of a gate is <act(h), dy>, so y is never kept; rows are gathered inside of the products, so neither the rows of
x nor those of d_out are ever copied; and both sums over the k slots of a token are gathers, which XLA fuses. A linear
map with gates is the same, of an activation that does nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .. import triton_call
from . import triton_calls as calls
from . import xla
from .call import PRE_ACTIVATION, LinearCall, MlpCall
from .tasks import row_numbers, tasks

UNCOMBINED = 2**30  # bytes of the outputs of all slots at a time; more columns come in a second product


def refuses(call: LinearCall | MlpCall) -> str | None:
    if reason := triton_call.refuses(call.x):
        return reason
    if call.x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes bfloat16, float16 and float32, not {call.x.dtype}"
    return None


def detail(call: LinearCall | MlpCall) -> str:
    weight = call.weight if isinstance(call, LinearCall) else call.w_out
    rows = _rows_of_tile(call.routing, call.x)
    sizes = calls.product_sizes(rows, *weight.shape[1:], call.x.dtype)
    return f"{rows} x {sizes.columns} tiles"


def _rows_of_tile(routing, x) -> int:
    return calls.rows_of_tile(routing.order.shape[0], routing.num_experts, x.dtype)


def _work(routing, x):
    return tasks(routing, _rows_of_tile(routing, x))


def _combine(y, routing, gates=None):
    """The sum over the slots of a token of y, in sorted rows, in fp32: XLA reads every row once."""
    y = y[routing.inverse].reshape(*routing.expert_indices.shape, y.shape[-1]).astype(jnp.float32)
    return (y if gates is None else gates.astype(jnp.float32)[..., None] * y).sum(1)


def _combined(x, weight, routing, work, gates=None, bias=None, *, transposed=False):
    """[T, F] of x in sorted rows; over so many columns at a time that few uncombined rows exist."""
    columns = weight.shape[1 if transposed else 2]
    at_once = max(1, UNCOMBINED // (x.shape[0] * x.dtype.itemsize) // 256) * 256
    pieces = []
    for first in range(0, columns, at_once):
        size = min(at_once, columns - first)
        y = calls.product(
            x, work.sorted, weight, work, work.sorted, bias, first=first, columns=size, transposed=transposed
        )
        out = _combine(y, routing, gates).astype(x.dtype)
        x, out = lax.optimization_barrier((x, out))  # one y after the other
        pieces.append(out)
    return jnp.concatenate(pieces, 1)


def _by_tile(gates, work):
    return jnp.where(work.slots < 0, 0, gates.astype(jnp.float32).reshape(-1)[jnp.maximum(work.slots, 0)])


def _d_gates(gates, d_gate, bias, d_out, routing, work):
    """Of the gates of sum gate * (y + bias), from <y, d_out> of the rows of the tiles."""
    d_gates = d_gate[work.place].reshape(gates.shape)
    if bias is not None:
        chosen = jnp.pad(bias, ((0, 1), (0, 0)))[routing.expert_indices].astype(jnp.float32)
        d_gates += (chosen * d_out[:, None].astype(jnp.float32)).sum(-1)
    return d_gates.astype(gates.dtype)


# Feed-forward networks.


def mlp(call: MlpCall):
    if 0 in call.x.shape + call.w_out.shape:
        return xla.mlp(call)
    return _mlp(call.x, call.w_in, call.w_out, call.b_in, call.b_out, call.gates, call.routing, call.activation)


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _mlp(x, w_in, w_out, b_in, b_out, gates, routing, activation):
    return _mlp_forward(x, w_in, w_out, b_in, b_out, gates, routing, activation, keep=False)[0]


def _mlp_forward(x, w_in, w_out, b_in, b_out, gates, routing, activation, keep=True):
    work = _work(routing, x)
    by_token = row_numbers(work, "token", gates.shape[1])
    hidden, kept = calls.activated(activation, x, by_token, w_in, work, b_in, keep=keep)
    out = _combined(hidden, w_out, routing, work, gates, b_out)
    return out, (x, w_in, w_out, b_in, b_out, gates, routing, checkpoint_name(kept, PRE_ACTIVATION))


def _mlp_backward(activation, residuals, d_out):
    x, w_in, w_out, b_in, b_out, gates, routing, hidden = residuals
    work, d_out = _work(routing, x), d_out.astype(x.dtype)
    by_token, tiled = row_numbers(work, "token", gates.shape[1]), _by_tile(gates, work)
    dh, gated, d_gate = calls.d_activated(
        activation, d_out, by_token, w_out, hidden, work.sorted, tiled, work, work.sorted
    )
    d_gates = _d_gates(gates, d_gate, b_out, d_out, routing, work)
    d_w_out = calls.d_weights(gated, work.sorted, d_out, by_token, work)
    d_w_in = calls.d_weights(x, by_token, dh, work.sorted, work)
    d_b_in = calls.d_bias(b_in, dh, work.sorted, work)
    d_b_out = calls.d_bias(b_out, d_out, by_token, work, tiled)
    dx = _combined(dh, w_in, routing, work, transposed=True)
    return dx, d_w_in, d_w_out, d_b_in, d_b_out, d_gates, None


_mlp.defvjp(_mlp_forward, _mlp_backward)


# Linear maps.


def linear(call: LinearCall):
    if 0 in call.x.shape + call.weight.shape:
        return xla.linear(call)
    return _linear(call.x, call.weight, call.bias, call.gates, call.routing, call.x_rows, call.out_rows)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _linear(x, weight, bias, gates, routing, x_rows, out_rows):
    work, k = _work(routing, x), routing.expert_indices.shape[1]
    combines = out_rows == "token"
    target = work.sorted if combines else row_numbers(work, out_rows, k)
    y = calls.product(x, row_numbers(work, x_rows, k), weight, work, target, bias)
    return _combine(y, routing, gates).astype(x.dtype) if combines else y


def _linear_forward(x, weight, bias, gates, routing, x_rows, out_rows):
    out = _linear(x, weight, bias, gates, routing, x_rows, out_rows)
    return out, (x, weight, bias, gates, routing)


def _linear_backward(x_rows, out_rows, residuals, d_out):
    x, weight, bias, gates, routing = residuals
    work, k, d_out = _work(routing, x), routing.expert_indices.shape[1], d_out.astype(x.dtype)
    d_numbers, x_numbers = row_numbers(work, out_rows, k), row_numbers(work, x_rows, k)
    # Of a row that all slots of a token have read, the gradient is a sum.
    to = work.sorted if x_rows == "token" else x_numbers
    if gates is None:
        tiled, d_gates, left, left_numbers = None, None, x, x_numbers
        dx = calls.product(d_out, d_numbers, weight, work, to, transposed=True)
    else:
        tiled, left_numbers = _by_tile(gates, work), to
        dx, left, d_gate = calls.d_activated("none", d_out, d_numbers, weight, x, x_numbers, tiled, work, to)
        d_gates = _d_gates(gates, d_gate, bias, d_out, routing, work)
    if x_rows == "token":
        dx = _combine(dx, routing).astype(x.dtype)
    d_weight = calls.d_weights(left, left_numbers, d_out, d_numbers, work)
    return dx, d_weight, calls.d_bias(bias, d_out, d_numbers, work, tiled), d_gates, None


_linear.defvjp(_linear_forward, _linear_backward)
