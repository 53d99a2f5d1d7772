"""The checked arguments of `expert_linear` and `expert_mlp`, their axes for sharding, and the activation functions."""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..partition import RECOMPUTED, STATIC, Letters
from .routing import Routing, route

# The order of the rows of an array. "token": one row per token. "pair": one row per (token, choice) pair; the row of
# choice s of token t is row t * k + s. "sorted": one row per pair, sorted by expert.
Rows = Literal["token", "pair", "sorted"]


class LinearCall(NamedTuple):
    """The checked arguments of a call of `expert_linear`.

    For every (token, choice) pair with expert e, the op multiplies the row of x by weight[e], and adds bias[e]. If
    gates are given, the op multiplies every result row by its gate, and sums the k result rows of a token. `x_rows`
    and `out_rows` say which rows x and the result have: "token" (one row per token), "pair" (one row per pair) or
    "sorted" (one row per pair, sorted by expert).
    """

    x: jax.Array  # [T, D] or [T*k, D]
    weight: jax.Array  # [E, D, F]
    bias: jax.Array | None  # [E, F]
    gates: jax.Array | None  # [T, k]
    routing: Routing
    x_rows: Rows
    out_rows: Rows  # "token" exactly when gates are given


class MlpCall(NamedTuple):
    """The checked arguments of a call of `expert_mlp`.

    The output of a token is the sum over its k choices of gate * (act(x @ w_in[e] + b_in[e]) @ w_out[e] + b_out[e]),
    where x is the row of the token, e is the expert of the choice, and act is the function with the name `activation`.
    """

    x: jax.Array  # [T, D]
    w_in: jax.Array  # [E, D, F]; gated activation: [E, D, 2F], first the columns of `gate`, then of `up` (`activate`)
    w_out: jax.Array  # [E, F, D]
    b_in: jax.Array | None  # [E, F]; gated activation: [E, 2F]
    b_out: jax.Array | None  # [E, D]
    gates: jax.Array  # [T, k]
    routing: Routing
    activation: str


_ROUTING = Routing(order=RECOMPUTED, inverse=RECOMPUTED, offsets=RECOMPUTED, expert_indices="T k")


def linear_letters(call: LinearCall) -> Letters:
    """Return the letters of the axes of all arrays of `expert_linear`, and which of these axes may be sharded.

    The letters of x are "T D", for example. Arrays may be sharded along the axis T of tokens, and along the axis F, the
    columns of the result. But if the rows of x or of the result are sorted by expert, arrays may be sharded only along
    F, because the sort mixes the tokens of all devices.
    """
    arrays = LinearCall("T D", "E D F", "E F", "T k", _ROUTING, x_rows=STATIC, out_rows=STATIC)
    if "sorted" in (call.x_rows, call.out_rows):
        return Letters("expert_linear of sorted rows", arrays._replace(x="R D"), "R F", {"F": "F"}, _routed)
    return Letters("expert_linear", arrays, "T F", {"T": "T", "F": "F"}, _routed)


def mlp_letters(call: MlpCall) -> Letters:
    """Return the letters of the axes of all arrays of `expert_mlp`, and which of these axes may be sharded.

    The letters of x are "T D", for example. Arrays may be sharded only along the axis T of tokens.
    """
    hidden = "2F" if call.activation in GATED else "F"
    arrays = MlpCall("T D", f"E D {hidden}", "E F D", f"E {hidden}", "E D", "T k", _ROUTING, activation=STATIC)
    return Letters("expert_mlp", arrays, "T D", {"T": "T"}, _routed)


def _routed(call):
    """Return `call` with a new `routing`, which sorts only the (token, choice) pairs of this device by expert.

    `call`, a `LinearCall` or an `MlpCall`, has the shards of the arrays on this device of a mesh. But `call.routing`
    was made from the pairs of all devices, so its fields `order`, `inverse` and `offsets` do not fit these shards.
    """
    weight = call.weight if isinstance(call, LinearCall) else call.w_out
    return call._replace(routing=route(call.routing.expert_indices, weight.shape[0]))


# The name of the pre-activation x @ w_in + b_in, which the forward pass saves. A remat policy can use it:
# jax.checkpoint_policies.save_only_these_names(PRE_ACTIVATION).
PRE_ACTIVATION = "expert_pre_activation"
GATED = ("swiglu", "geglu", "reglu")
_POINTWISE = {
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
    "reglu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


def activate(name: str, gate, up=None):
    """Apply the activation `name`, such as "swiglu", to a pre-activation, element by element. Return an array [.., F].

    The gated activations "swiglu", "geglu" and "reglu" take the two halves of the pre-activation, `gate` [.., F] and
    `up` [.., F], and return f(gate) * up. Here, f is silu for "swiglu", gelu_tanh for "geglu" and relu for "reglu". Any
    other activation takes the complete pre-activation [.., F] as `gate`, and no `up`.
    """
    return _POINTWISE[name](gate) if up is None else _POINTWISE[name](gate) * up


def _d_silu(x):
    s = jax.nn.sigmoid(x)
    return s * (1 + x * (1 - s))


def _d_gelu(x):
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5))) + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _d_gelu_tanh(x):
    c = math.sqrt(2 / math.pi)
    t = jnp.tanh(c * (x + 0.044715 * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _d_relu(x):
    return jnp.where(x > 0, 1.0, 0.0)


# The derivatives are written out, because a kernel cannot differentiate a function.
_SLOPES = {
    "swiglu": _d_silu,
    "geglu": _d_gelu_tanh,
    "reglu": _d_relu,
    "gelu": _d_gelu,
    "gelu_tanh": _d_gelu_tanh,
    "relu": _d_relu,
    "relu2": lambda x: 2 * jnp.maximum(x, 0),
    "silu": _d_silu,
}


def d_activate(name: str, d, gate, up=None) -> Iterator:
    """Yield the gradient of `gate`, and then of `up` if it is given: the backward pass of `activate(name, gate, up)`.

    `d` [.., F] is the cotangent of the result of `activate`. All arrays have the same shape. This is a generator, so
    that a kernel can store the first gradient before it computes the second one, which saves registers.
    """
    slope = d * _SLOPES[name](gate)
    yield slope if up is None else slope * up
    if up is not None:
        yield d * _POINTWISE[name](gate)


def _activation(name: str):
    """Return the activation `name`, such as "swiglu", as a function of one array, the complete pre-activation.

    The function takes an array [.., F], or [.., 2F] for the gated activations "swiglu", "geglu" and "reglu". It returns
    an array [.., F].
    """
    parts = 2 if name in GATED else 1

    def run(h):
        wide = h.astype(jnp.float32) if h.dtype == jnp.float16 else h  # squares and cubes overflow float16
        return activate(name, *jnp.split(wide, parts, axis=-1)).astype(h.dtype)

    return run


ACTIVATIONS = {name: _activation(name) for name in _POINTWISE}
