"""One checked call of an expert product, as the implementations take it."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from .routing import Routing

# How the rows of an array are ordered: one row per token, per slot (token * k + choice), or sorted by expert.
Rows = Literal["token", "slot", "sorted"]


class LinearCall(NamedTuple):
    """x -> x @ weight[e] + bias[e] for every row of expert e, times its gate and summed over k if gates are given."""

    x: jax.Array  # [T, D] or [T*k, D]
    weight: jax.Array  # [E, D, F]
    bias: jax.Array | None  # [E, F]
    gates: jax.Array | None  # [T, k]
    routing: Routing
    x_rows: Rows
    out_rows: Rows  # "token" exactly when gates are given


class MlpCall(NamedTuple):
    """x -> sum over k of gate * (act(x @ w_in[e] + b_in[e]) @ w_out[e] + b_out[e])."""

    x: jax.Array  # [T, D]
    w_in: jax.Array  # [E, D, F], 2F for a gated activation: the gate's half first
    w_out: jax.Array  # [E, F, D]
    b_in: jax.Array | None
    b_out: jax.Array | None
    gates: jax.Array  # [T, k]
    routing: Routing
    activation: str


def _gated(act):
    def apply(h):
        gate, up = jnp.split(h, 2, axis=-1)
        return act(gate) * up

    return apply


ACTIVATIONS = {
    "swiglu": _gated(jax.nn.silu),
    "geglu": _gated(lambda x: jax.nn.gelu(x, approximate=True)),
    "reglu": _gated(jax.nn.relu),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}
GATED = ("swiglu", "geglu", "reglu")
