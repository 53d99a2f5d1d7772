"""Expert products on Hopper GPUs: what the kernels take, their sizes, and the derivatives.

Residuals of `mlp`: x, the pre-activation, the gates and the routing. With y = act(h) w_out and dy = d_out w_out^T, the
gradient of a gate is <act(h), dy>, so y is never kept; rows are gathered inside of the products, so neither the rows of
x nor those of d_out are ever copied; and both sums over the k slots of a token are gathers, which XLA fuses.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .. import hopper
from . import xla
from .call import ACTIVATIONS, GATED, PRE_ACTIVATION, LinearCall, MlpCall
from .mosaic_float32 import d_weights, product
from .mosaic_product import COLUMNS, ROWS, Plan, activated, d_activated
from .tasks import row_numbers, tasks

UNCOMBINED = 2**30  # bytes of the outputs of all slots at a time; more columns come in a second product
WIDTH = 64  # columns of a tile in shared memory, of which the copy engine takes whole ones
ONES = 8  # columns of ones, by whose products rows are summed: as few as rows can be copied by


def refuses(call: LinearCall | MlpCall) -> str | None:
    if reason := hopper.refuses(call.x):
        return reason
    if call.x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes bfloat16, float16 and float32, not {call.x.dtype}"
    return None


def detail(call: LinearCall | MlpCall) -> str:
    rows, experts = call.routing.order.shape[0], call.routing.num_experts
    odd = any(n % WIDTH for n in _widths(call))
    said = f"{ROWS * _warpgroups(rows, experts)} x {2 * COLUMNS} tiles"
    said += f", padded to {WIDTH} columns" if odd else ""
    return said + (", float32 as three products of bfloat16" if call.x.dtype == jnp.float32 else "")


def _widths(call) -> tuple[int, ...]:
    return call.weight.shape[1:] if isinstance(call, LinearCall) else call.w_out.shape[1:]


def _warpgroups(rows: int, experts: int) -> int:
    """One where most tiles would be half empty: decoding."""
    return 2 if rows >= 2 * ROWS * experts else 1


def _plan(routing, x, columns: int, *, parts: int = 1, **options) -> Plan:
    """`x` [parts, rows, width]."""
    warpgroups = _warpgroups(routing.order.shape[0], routing.num_experts)
    return Plan(x.shape[0], x.shape[2], columns, parts, x.dtype, warpgroups, **options)


def _padded(x, *axes: int):
    """Up to whole tiles along these axes: a copy of arrays whose widths are no multiples of 64."""
    return jnp.pad(x, [(0, -n % WIDTH if axis in axes else 0) for axis, n in enumerate(x.shape)])


def _bias(bias, parts: int = 1):
    """[E + 1, parts, F in whole steps] in fp32: slots without an expert get none."""
    if bias is None:
        return None
    bias = bias.astype(jnp.float32).reshape(bias.shape[0], parts, -1)
    return jnp.pad(bias, ((0, 1), (0, 0), (0, -bias.shape[2] % (2 * COLUMNS))))


def _combine(y, routing, gates=None):
    """The sum over the slots of a token of y, in sorted rows, in fp32."""
    y = y[routing.inverse].reshape(*routing.expert_indices.shape, y.shape[-1]).astype(jnp.float32)
    return (y if gates is None else gates.astype(jnp.float32)[..., None] * y).sum(1)


def _combined(x, weight, routing, work, gates=None, bias=None, *, columns: int, transposed: bool = False):
    """[T, columns] of x [parts, R, width] in sorted rows; over so many columns that few uncombined rows exist."""
    rows = x.shape[1]
    at_once = max(1, UNCOMBINED // (rows * x.dtype.itemsize) // (2 * COLUMNS)) * 2 * COLUMNS
    pieces = []
    for first in range(0, columns, at_once):
        size = min(at_once, columns - first)
        plan = _plan(routing, x, size, transposed=transposed, first=first)
        some = None if bias is None else _bias(bias[:, first : first + size])
        y = product(plan, x, work.sorted, weight, work, work.sorted, rows, some)
        out = _combine(y, routing, gates).astype(x.dtype)
        x, out = lax.optimization_barrier((x, out))  # one y after the other
        pieces.append(out)
    return jnp.concatenate(pieces, 1)


def _d_bias(bias, rows, work, numbers, right):
    """[E, parts * F]: the sums over the rows of an expert, as a product with ones."""
    if bias is None:
        return None
    ones = jnp.ones((rows, ONES), right.dtype)
    return d_weights(ones, work.sorted, right, numbers, work)[:, 0].reshape(bias.shape).astype(bias.dtype)


def _work(routing):
    return tasks(routing, ROWS * _warpgroups(routing.order.shape[0], routing.num_experts))


# Feed-forward networks.


def mlp(call: MlpCall):
    if 0 in call.x.shape + call.w_out.shape:
        return xla.mlp(call)
    if call.x.dtype == jnp.float32:
        return _mlp_of_linears(call)
    D, F = call.w_out.shape[2], call.w_out.shape[1]
    parts = 2 if call.activation in GATED else 1

    def halves(x):  # [.., parts * F] with each part padded
        x = _padded(x.reshape(*x.shape[:-1], parts, F), x.ndim)
        return x.reshape(*x.shape[:-2], -1)

    b_in = None if call.b_in is None else halves(call.b_in)
    b_out = None if call.b_out is None else _padded(call.b_out, 1)
    w_in = _padded(halves(call.w_in), 1)
    out = _mlp(_padded(call.x, 1), w_in, _padded(call.w_out, 1, 2), b_in, b_out, call.gates, call.routing,
               call.activation)  # fmt: skip
    return out[:, :D]


def _mlp_of_linears(call: MlpCall):
    """Nothing fused: float32 is for checks and small models."""
    up = LinearCall(call.x, call.w_in, call.b_in, None, call.routing, "token", "sorted")
    hidden = ACTIVATIONS[call.activation](checkpoint_name(linear(up), PRE_ACTIVATION))
    return linear(LinearCall(hidden, call.w_out, call.b_out, call.gates, call.routing, "sorted", "token"))


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _mlp(x, w_in, w_out, b_in, b_out, gates, routing, activation):
    return _mlp_forward(x, w_in, w_out, b_in, b_out, gates, routing, activation, keep=False)[0]


def _mlp_forward(x, w_in, w_out, b_in, b_out, gates, routing, activation, keep=True):
    work, k = _work(routing), routing.expert_indices.shape[1]
    F, D = w_out.shape[1:]
    parts = w_in.shape[2] // F
    plan = _plan(routing, x[None], F, parts=parts)
    numbers = row_numbers(work, "token", k)
    hidden, *kept = activated(plan, activation, x[None], numbers, w_in, work, _bias(b_in, parts), keep=keep)
    out = _combined(hidden[None], w_out, routing, work, gates, b_out, columns=D)
    return out, (x, w_in, w_out, b_in, b_out, gates, routing, *(checkpoint_name(a, PRE_ACTIVATION) for a in kept))


def _mlp_backward(activation, residuals, d_out):
    x, w_in, w_out, b_in, b_out, gates, routing, hidden = residuals
    work, k, D = _work(routing), routing.expert_indices.shape[1], x.shape[1]
    E, (P, _, F) = w_in.shape[0], hidden.shape
    d_out = d_out.astype(x.dtype)
    by_token, R = row_numbers(work, "token", k), hidden.shape[1]
    tiled = jnp.where(work.slots < 0, 0, gates.astype(jnp.float32).reshape(-1)[jnp.maximum(work.slots, 0)])
    plan = _plan(routing, d_out[None], F, parts=P, transposed=True)
    dh, gated, d_gate = d_activated(plan, activation, d_out[None], by_token, w_out, work, hidden, tiled)
    d_gates = d_gate.sum(0)[work.place].reshape(gates.shape)
    if b_out is not None:
        chosen = jnp.pad(b_out, ((0, 1), (0, 0)))[routing.expert_indices].astype(jnp.float32)
        d_gates += (chosen * d_out[:, None].astype(jnp.float32)).sum(-1)
    d_w_out = d_weights(gated, work.sorted, d_out[None], by_token, work).reshape(w_out.shape)
    d_w_in = d_weights(x, by_token, dh, work.sorted, work).reshape(w_in.shape)
    dx = _combined(dh, w_in, routing, work, columns=D, transposed=True)
    d_b_in = _d_bias(b_in, R, work, work.sorted, dh)
    d_b_out = None
    if b_out is not None:
        by_slot = gates.astype(x.dtype).reshape(-1, 1) * jnp.ones((1, ONES), x.dtype)
        d_b_out = d_weights(by_slot, work.slots, d_out[None], by_token, work)[:, 0].reshape(E, D).astype(b_out.dtype)
    return dx, d_w_in, d_w_out, d_b_in, d_b_out, d_gates.astype(gates.dtype), None


_mlp.defvjp(_mlp_forward, _mlp_backward)


# Linear maps.


def linear(call: LinearCall):
    if 0 in call.x.shape + call.weight.shape:
        return xla.linear(call)
    F = call.weight.shape[2]
    bias = None if call.bias is None else _padded(call.bias, 1)
    y = _linear(_padded(call.x, 1), _padded(call.weight, 1, 2), bias, call.gates, call.routing, call.x_rows,
                call.out_rows)  # fmt: skip
    return y[:, :F]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _linear(x, weight, bias, gates, routing, x_rows, out_rows):
    work, k = _work(routing), routing.expert_indices.shape[1]
    F = weight.shape[2]
    source = row_numbers(work, x_rows, k)
    plan = _plan(routing, x[None], F)
    rows = work.place.shape[0]
    if out_rows == "token":
        y = product(plan, x[None], source, weight, work, work.sorted, rows, _bias(bias))
        return _combine(y, routing, gates).astype(x.dtype)
    return product(plan, x[None], source, weight, work, row_numbers(work, out_rows, k), rows, _bias(bias))


def _linear_forward(x, weight, bias, gates, routing, x_rows, out_rows):
    out = _linear(x, weight, bias, gates, routing, x_rows, out_rows)
    return out, (x, weight, bias, gates, routing)


def _linear_backward(x_rows, out_rows, residuals, d_out):
    """With dx' = d_out weight^T: the gradient of a gate is <x, dx'> + <bias, d_out>."""
    x, weight, bias, gates, routing = residuals
    work, k, rows = _work(routing), routing.expert_indices.shape[1], routing.order.shape[0]
    d_out = d_out.astype(x.dtype)
    d_numbers, x_numbers = row_numbers(work, out_rows, k), row_numbers(work, x_rows, k)
    to = x_rows if gates is None and x_rows != "token" else "slot"
    plan = _plan(routing, d_out[None], weight.shape[1], transposed=True)
    dx = product(plan, d_out[None], d_numbers, weight, work, row_numbers(work, to, k), rows)
    d_gates, left, left_numbers = None, x, x_numbers
    ones = jnp.ones((rows, 1), x.dtype)
    if gates is not None:
        slots = {"token": lambda: jnp.repeat(x, k, 0), "slot": lambda: x, "sorted": lambda: x[routing.inverse]}
        own, by_slot = slots[x_rows](), gates.astype(jnp.float32).reshape(-1, 1)
        idle = (routing.expert_indices >= routing.num_experts).reshape(-1, 1)
        own = jnp.where(idle, 0, own)
        d_gates = (own.astype(jnp.float32) * dx.astype(jnp.float32)).sum(-1).reshape(gates.shape)
        if bias is not None:
            chosen = jnp.pad(bias, ((0, 1), (0, 0)))[routing.expert_indices].astype(jnp.float32)
            d_gates += (chosen * d_out[:, None].astype(jnp.float32)).sum(-1)
        dx = (by_slot * dx.astype(jnp.float32)).astype(x.dtype)
        left, left_numbers, ones = (by_slot * own.astype(jnp.float32)).astype(x.dtype), work.slots, by_slot
        dx = dx if x_rows != "sorted" else dx[routing.order]
    if x_rows == "token":
        dx = dx.reshape(*routing.expert_indices.shape, -1).astype(jnp.float32).sum(1).astype(x.dtype)
    d_weight = d_weights(left, left_numbers, d_out[None], d_numbers, work).reshape(weight.shape)
    d_bias = None
    if bias is not None:
        ones = jnp.broadcast_to(ones.astype(x.dtype), (rows, ONES))
        d_bias = d_weights(ones, work.slots, d_out[None], d_numbers, work)[:, 0].reshape(bias.shape).astype(bias.dtype)
    return dx, d_weight, d_bias, None if gates is None else d_gates.astype(gates.dtype), None


_linear.defvjp(_linear_forward, _linear_backward)
