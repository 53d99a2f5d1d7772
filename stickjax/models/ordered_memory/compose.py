"""The composition of a token with the slots of a memory, from the lowest slot to the highest.

This is nearly all the work of Ordered Memory. Its derivative is written by hand: the backward pass collects the
derivatives of all slots, and computes the gradients of the matrices with one product per token instead of one per slot.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from stickjax.models.layers import normalised


class Weights(NamedTuple):
    """The parameters of the cell, in the type of the computation.

    `w_in` [2H,4H], `in_bias` [4H], `w_out` [4H,4H] and `out_bias` [4H] are the cell's own. `scale` and `shift` [H]
    belong to the LayerNorm that the cell shares with the projection of the tokens.
    """

    w_in: jax.Array
    in_bias: jax.Array
    w_out: jax.Array
    out_bias: jax.Array
    scale: jax.Array
    shift: jax.Array


class Masks(NamedTuple):
    """Dropout masks for the N calls of the cell at one token: True where a value is kept.

    `inputs` [N,B,2H] and `hidden` [N,B,4H]. `rate`: the share of values that are dropped.
    """

    inputs: jax.Array
    hidden: jax.Array
    rate: jax.Array


EPS = 1e-5  # of the LayerNorm in the cell
import os

NOCOND = bool(os.environ.get("NOCOND"))


@jax.custom_vjp
def compose(
    weights: Weights,
    x: Float[Array, "B H"],
    slots: Float[Array, "B N H"],
    share: Float[Array, "B N"],
    masks: Masks | None = None,
) -> Float[Array, "B N H"]:
    r"""Return the candidates Mh_1 .. Mh_N of a token x for the slots M_1 .. M_N of the memory.

    .. math::
        Mh_i = (1 - s_i) x + s_i \, LN(\sigma(v) Mh_{i-1} + \sigma(g) M_i + \sigma(u) z), \qquad Mh_0 = x

        [v, g, u, z] = relu([Mh_{i-1}, M_i] W_{in} + b_{in}) W_{out} + b_{out}

    `share` is s: how much of the composed vector is used. A slot whose share is 0 in the whole batch is not computed.

    >>> H, keys = 2, jax.random.split(jax.random.key(0), 4)
    >>> weights = Weights(jnp.ones((2 * H, 4 * H)), jnp.zeros(4 * H), jnp.ones((4 * H, 4 * H)), jnp.zeros(4 * H),
    ...                   jnp.ones(H), jnp.zeros(H))
    >>> compose(weights, jnp.ones((1, H)), jnp.ones((1, 3, H)), jnp.zeros((1, 3))).tolist()  # no share: the token itself
    [[[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]]
    """
    return _forward(weights, x, slots, share, masks)[0]


def _forward(weights, x, slots, share, masks):
    w, (B, N, H) = weights, slots.shape
    h, candidates, hidden, gates = x, [], [], []
    for i in range(N):

        def composed(h, i=i):
            a, m, s = _inputs(h, slots[:, i], masks, i), slots[:, i], share[:, i : i + 1]
            a = jax.nn.relu(a @ w.w_in + w.in_bias[None])
            if masks is not None:
                a = jnp.where(masks.hidden[i], a / (1 - masks.rate), 0)
            pre = a @ w.w_out + w.out_bias[None]
            return _mixed(pre, h, m, x, s, w.scale, w.shift), a, pre

        empty = lambda h: (x, jnp.zeros((B, 4 * H), x.dtype), jnp.zeros((B, 4 * H), x.dtype))  # noqa: E731
        h, a, pre = composed(h) if NOCOND else jax.lax.cond((share[:, i] > 0).any(), composed, empty, h)
        candidates.append(h), hidden.append(a), gates.append(pre)
    candidates = jnp.stack(candidates, 1)
    return candidates, (weights, x, slots, share, masks, candidates, hidden, gates)


def _inputs(h, m, masks, i):
    """Return the input [B,2H] of call i of the cell, with dropout."""
    a = jnp.concatenate([h, m], -1)
    return a if masks is None else jnp.where(masks.inputs[i], a / (1 - masks.rate), 0)


def _mixed(gates, h, m, x, share, scale, shift):
    """Return the candidate (1 - share) x + share LN(...) from the four vectors in `gates` [B,4H]."""
    v, g, u, z = jnp.split(gates, 4, axis=-1)
    y = jax.nn.sigmoid(v) * h + jax.nn.sigmoid(g) * m + jax.nn.sigmoid(u) * z
    return x * (1 - share) + (normalised(y, EPS) * scale[None] + shift[None]) * share


def _backward(saved, cotangent):
    weights, x, slots, share, masks, candidates, hidden, gates = saved
    w, (B, N, H) = weights, slots.shape
    w_in, w_out = w.w_in.T, w.w_out.T
    lower = jnp.concatenate([x[:, None], candidates[:, :-1]], 1)  # the h of every call
    d_h, d_x = jnp.zeros_like(x), jnp.zeros_like(x)
    d_scale, d_shift = jnp.zeros_like(w.scale), jnp.zeros_like(w.shift)
    d_slots, d_share, d_hidden, d_gates = [], [], [], []
    for i in reversed(range(N)):
        d_h = d_h + cotangent[:, i]

        def composed(d_h, i=i):
            h, m, s = lower[:, i], slots[:, i], share[:, i : i + 1]
            d_pre, d_lower, d_m, d_x, d_s, d_scale, d_shift = jax.vjp(_mixed, gates[i], h, m, x, s, w.scale, w.shift)[
                1
            ](d_h)
            d_a = d_pre @ w_out
            d_a = jnp.where(hidden[i] > 0, d_a if masks is None else d_a / (1 - masks.rate), 0)
            d_in = d_a @ w_in
            if masks is not None:
                d_in = jnp.where(masks.inputs[i], d_in / (1 - masks.rate), 0)
            return d_lower + d_in[:, :H], d_x, d_m + d_in[:, H:], d_s[:, 0], d_a, d_pre, d_scale, d_shift

        def unchanged(d_h):
            wide = jnp.zeros((B, 4 * H), x.dtype)
            return (
                jnp.zeros_like(x),
                d_h,
                jnp.zeros_like(x),
                jnp.zeros_like(x[:, 0]),
                wide,
                wide,
                *(jnp.zeros_like(p) for p in (w.scale, w.shift)),
            )

        d_h, one_x, one_m, one_s, one_a, one_pre, one_scale, one_shift = (
            composed(d_h) if NOCOND else jax.lax.cond((share[:, i] > 0).any(), composed, unchanged, d_h)
        )
        d_x, d_scale, d_shift = d_x + one_x, d_scale + one_scale, d_shift + one_shift
        d_slots.append(one_m), d_share.append(one_s), d_hidden.append(one_a), d_gates.append(one_pre)
    d_slots, d_share = jnp.stack(d_slots[::-1], 1), jnp.stack(d_share[::-1], 1)
    d_hidden, d_gates = jnp.concatenate(d_hidden[::-1]), jnp.concatenate(d_gates[::-1])
    inputs = jnp.concatenate([_inputs(lower[:, i], slots[:, i], masks, i) for i in range(N)])
    d_weights = Weights(
        inputs.T @ d_hidden, d_hidden.sum(0), jnp.concatenate(hidden).T @ d_gates, d_gates.sum(0), d_scale, d_shift
    )
    return d_weights, d_x + d_h, d_slots, d_share, None


compose.defvjp(_forward, _backward)
