"""The composition of a token with the slots of a memory, from the lowest used slot to the highest slot.

Ordered Memory spends nearly all its time here. The loop over the slots skips the slots that no sentence of the batch
uses, so its length depends on the data. JAX cannot compute the reverse-mode derivative of such a loop. So the
derivative is written by hand. This also saves memory: only two intermediate arrays per slot are kept for the backward
pass.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stickjax.models.layers import normalised


class Weights(NamedTuple):
    """The parameters of the cell as arrays, in the type `config.dtype`.

    `w_in` [2H,4H], `in_bias` [4H], `w_out` [4H,4H] and `out_bias` [4H] belong to the `Cell`. `scale` and `shift` [H]
    are the parameters of the LayerNorm of the cell's output. `Encoder` also applies this LayerNorm, with the same
    parameters, to the projected tokens.
    """

    w_in: jax.Array
    in_bias: jax.Array
    w_out: jax.Array
    out_bias: jax.Array
    scale: jax.Array
    shift: jax.Array


class Masks(NamedTuple):
    """The dropout masks of the cell at one token. A mask is True where a value is kept.

    The cell runs once for each of the N slots. `inputs` [N,B,2H] are the masks for its inputs, and `hidden` [N,B,4H]
    the masks for its hidden units. `rate`: the probability that a value is dropped.
    """

    inputs: jax.Array
    hidden: jax.Array
    rate: jax.Array


EPS = 1e-5  # the epsilon of the LayerNorm in the cell, which does not use `config.norm_eps`


@jax.custom_vjp
def compose(
    weights: Weights,
    x: Float[Array, "B H"],
    slots: Float[Array, "N B H"],
    share: Float[Array, "N B"],
    masks: Masks | None = None,
) -> Float[Array, "N B H"]:
    r"""Return the candidates C_1 .. C_N of a token x: the new vectors for the N memory slots M_1 .. M_N.

    .. math::
        C_i = (1 - s_i) x + s_i \, LN(\sigma(v) C_{i-1} + \sigma(g) M_i + \sigma(u) z), \qquad C_0 = x

        [v, g, u, z] = relu([C_{i-1}, M_i] W_{in} + b_{in}) W_{out} + b_{out}

    `share` is s, the weight of the composed vector. s must not decrease from a slot to the next higher slot. A slot
    where s is 0 for the whole batch is skipped, and its candidate is x. `masks`: dropout masks of the cell, or None.

    >>> ones, zeros = jnp.ones, jnp.zeros
    >>> weights = Weights(ones((4, 8)), zeros(8), ones((8, 8)), zeros(8), ones(2), zeros(2))
    >>> x, share = jnp.array([[1.0, 3.0]]), jnp.array([[0.0], [0.0], [1.0]])
    >>> jnp.round(compose(weights, x, ones((3, 1, 2)), share)[:, 0], 2).tolist()
    [[1.0, 3.0], [1.0, 3.0], [-1.0, 1.0]]
    """
    first = _first_used(share)
    start = (x, jnp.broadcast_to(x, slots.shape))

    def body(i, now):
        h, candidates = now
        h, _, _ = _call(weights, x, h, slots[i], share[i], _of_slot(masks, i))
        return h, candidates.at[i].set(h)

    return jax.lax.fori_loop(first, len(slots), body, start)[1]


def _first_used(share: Float[Array, "N B"]) -> Int[Array, ""]:
    """Return the lowest index of a slot with a share above 0 in any sentence of the batch; N if all shares are 0."""
    used = (share > 0).any(1)
    return jnp.where(used.any(), jnp.argmax(used), len(share)).astype(jnp.int32)


def _of_slot(masks: Masks | None, i) -> Masks | None:
    return None if masks is None else Masks(masks.inputs[i], masks.hidden[i], masks.rate)


def _call(w: Weights, x, h, m, share, masks: Masks | None):
    """Run the cell for one slot. Return (the candidate C_i [B,H], the hidden units [B,4H], the gates [B,4H]).

    The symbols are defined in `compose`. `h` is C_(i-1), `m` is M_i, and `x` is the token, [B,H] each. `share` [B] is
    s_i. The hidden units are returned after relu and dropout. The gates are the array [v, g, u, z].
    """
    hidden = jax.nn.relu(_dropped(jnp.concatenate([h, m], -1), masks, "inputs") @ w.w_in + w.in_bias[None])
    hidden = _dropped(hidden, masks, "hidden")
    gates = hidden @ w.w_out + w.out_bias[None]
    return _mixed(gates, h, m, x, share, w.scale, w.shift), hidden, gates


def _dropped(x, masks: Masks | None, name: str):
    return x if masks is None else jnp.where(getattr(masks, name), x / (1 - masks.rate), 0)


def _mixed(gates, h, m, x, share, scale, shift):
    """Return the candidate C_i of `compose`. `gates` [B,4H] is [v, g, u, z], h is C_(i-1), m is M_i, `share` is s_i.

    x is the token. `scale` and `shift` are the parameters of the LayerNorm.
    """
    v, g, u, z = jnp.split(gates, 4, axis=-1)
    y = jax.nn.sigmoid(v) * h + jax.nn.sigmoid(g) * m + jax.nn.sigmoid(u) * z
    return x * (1 - share[:, None]) + (normalised(y, EPS) * scale[None] + shift[None]) * share[:, None]


def _forward(weights, x, slots, share, masks):
    """Return the result of `compose`, and the arrays that the backward pass needs."""
    first, (N, B, H) = _first_used(share), slots.shape
    wide = jnp.zeros((N, B, 4 * H), x.dtype)

    def body(i, now):
        h, candidates, hidden, gates = now
        h, a, b = _call(weights, x, h, slots[i], share[i], _of_slot(masks, i))
        return h, candidates.at[i].set(h), hidden.at[i].set(a), gates.at[i].set(b)

    start = (x, jnp.broadcast_to(x, slots.shape), wide, wide)
    _, candidates, hidden, gates = jax.lax.fori_loop(first, N, body, start)
    return candidates, (weights, x, slots, share, masks, candidates, hidden, gates)


def _backward(saved, cotangent):
    w, x, slots, share, masks, candidates, hidden, gates = saved
    first, N, H = _first_used(share), len(slots), x.shape[1]
    w_in, w_out = w.w_in.T, w.w_out.T
    below_first = (jnp.arange(N) < first)[:, None, None]
    d_x = jnp.where(below_first, cotangent, 0).sum(0)  # the candidates below `first` are x

    def body(n, now):
        i = N - 1 - n
        d_h, d_x, d_slots, d_share, d = now
        h = jnp.where(i == 0, x, candidates[jnp.maximum(i - 1, 0)])
        mask = _of_slot(masks, i)
        _, pull = jax.vjp(_mixed, gates[i], h, slots[i], x, share[i], w.scale, w.shift)
        d_gates, d_lower, d_m, one_x, d_s, d_scale, d_shift = pull(d_h + cotangent[i])
        d_hidden = jnp.where(hidden[i] > 0, d_gates @ w_out if mask is None else d_gates @ w_out / (1 - mask.rate), 0)
        d_inputs = _dropped(d_hidden @ w_in, mask, "inputs")
        inputs = _dropped(jnp.concatenate([h, slots[i]], -1), mask, "inputs")
        grads = Weights(inputs.T @ d_hidden, d_hidden.sum(0), hidden[i].T @ d_gates, d_gates.sum(0), d_scale, d_shift)
        return (
            d_lower + d_inputs[:, :H], d_x + one_x, d_slots.at[i].set(d_m + d_inputs[:, H:]), d_share.at[i].set(d_s),
            jax.tree.map(jnp.add, d, grads),
        )  # fmt: skip

    zeros = jax.tree.map(jnp.zeros_like, (x, slots, share, w))
    start = (zeros[0], d_x, *zeros[1:])
    d_h, d_x, d_slots, d_share, d_weights = jax.lax.fori_loop(0, N - first, body, start)
    return d_weights, d_x + d_h, d_slots, d_share, None


compose.defvjp(_forward, _backward)
