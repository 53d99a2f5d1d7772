"""One step of Ordered Memory (Shen et al., arXiv 1910.13466): where to write in the memory, and what to write.

The memory of a sentence has N slots of H numbers each. Slot N holds the most complete phrase, and lower slots hold
parts of it. For a new token, a distribution p over the slots says up to which slot the stored phrases are joined. Then
a cell composes the token with the slots, one slot after the other, from the lowest to the highest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels.arguments import sum_type
from stickjax.models.layers import LayerNorm, cast, linear_bias, linear_weight
from stickjax.models.ordered_memory.compose import Weights, compose

SMALLEST = 1e-5  # a cumulative probability below this counts as 0, so that slots with almost no weight are skipped


class Memory(NamedTuple):
    """The memory of B sentences after a token was read: N slots with H numbers per sentence.

    `slots` [N,B,H]: M, the contents of the slots. `candidates` [N,B,H]: C, the new vectors for the slots, computed from
    this token; the next step mixes them into M. `p` [B,N]: the distribution of this token over the slots.
    """

    slots: jax.Array
    candidates: jax.Array
    p: jax.Array


def empty_memory(B: int, N: int, H: int, dtype) -> Memory:
    """Return the memory of B sentences before the first token: all zeros.

    `slots` and `candidates` have the type `dtype`. `p` has the type in which sums are computed, at least float32.
    """
    return Memory(
        jnp.zeros((N, B, H), dtype), jnp.zeros((N, B, H), dtype), jnp.zeros((B, N), sum_type(jnp.zeros((), dtype)))
    )


class Distribution(nnx.Module):
    r"""Computes the distribution p of a token x over the N memory slots.

    p is computed from x and from two results of the previous token: the candidates C_i and the distribution p'.

    .. math::
        \beta_i = (w \cdot relu(q + k_i) + b) / \sqrt{H}, \qquad q = LN(x W_q + b_q), \quad k_i = LN(C_i W_k + b_k)

        p_i = c_i \exp(\beta_i) / \sum_m c_m \exp(\beta_m), \qquad
        c_i = \sum_{m \le i + 1} p'_m \; (i < N), \quad c_N = 1

    The factor c limits which slots a token can use. If l is the lowest slot with p'_l above 0, the token can use only
    the slots l - 1 and higher. A c_i below 1e-5 counts as 0.
    """

    def __init__(self, config, key):
        self.config = c = config
        keys = jax.random.split(key, 6)
        self.query, self.query_bias = linear_weight(keys[0], c.H, c.H, c), linear_bias(keys[1], c.H, c.H, c)
        self.key, self.key_bias = linear_weight(keys[2], c.H, c.H, c), linear_bias(keys[3], c.H, c.H, c)
        self.query_norm, self.key_norm = LayerNorm(c, size=c.H), LayerNorm(c, size=c.H)
        self.weight, self.bias = linear_weight(keys[4], c.H, 1, c), linear_bias(keys[5], c.H, 1, c)

    def queries(self, x: Float[Array, "*b H"]) -> Float[Array, "*b H"]:
        """Return the queries q of the projected tokens x, with any number of leading axes."""
        return self.query_norm(_affine(x, cast(self.query, self.config), cast(self.query_bias, self.config)))

    def __call__(
        self, q: Float[Array, "B H"], candidates: Float[Array, "N B H"], previous: Float[Array, "B N"], dropped
    ) -> Float[Array, "B N"]:
        """Return p for one token of each sentence, in float32 or float64, from the queries q of these tokens.

        `candidates` and `previous` are C and p' of the previous token. `dropped(x, index)` applies dropout to x, with a
        different mask for each index.
        """
        c = self.config
        k = self.key_norm(_affine(dropped(candidates, 0), cast(self.key, c), cast(self.key_bias, c)))
        hidden = dropped(jax.nn.relu(q[None] + k), 1)
        beta = jnp.einsum("NBH,H->BN", hidden, cast(self.weight, c)[:, 0], preferred_element_type=sum_type(q))
        beta = (beta + self.bias[...].astype(beta.dtype)[None]) * c.H**-0.5
        return restricted_softmax(beta, reachable(previous))


def reachable(previous: Float[Array, "B N"]) -> Float[Array, "B N"]:
    """Return the factor c of `Distribution`: a token cannot use a slot where c is 0.

    `previous` is the previous token's distribution over the N slots.

    >>> reachable(jnp.array([[0.0, 0.0, 1.0]])).tolist()  # the previous token used only the highest slot
    [[0.0, 1.0, 1.0]]
    """
    c = jnp.concatenate([jnp.cumsum(previous, axis=1)[:, 1:], jnp.ones_like(previous[:, :1])], axis=1)
    return jnp.where(c < SMALLEST, 0, c)


def restricted_softmax(beta: Float[Array, "B N"], c: Float[Array, "B N"]) -> Float[Array, "B N"]:
    """Return c_i exp(beta_i) / sum_m c_m exp(beta_m), where i and m are indices of the last axis.

    The result is 0 where c is 0.
    """
    beta = beta - jax.lax.stop_gradient(jnp.where(c > 0, beta, -jnp.inf).max(1, keepdims=True))
    weight = jnp.where(c > 0, c * jnp.exp(jnp.where(c > 0, beta, 0)), 0)
    return weight / weight.sum(1, keepdims=True)


class Cell(nnx.Module):
    """The parameters of the cell, which composes the vector of a phrase with a memory slot into one vector.

    `stickjax.models.ordered_memory.compose` has the formula and computes it.
    """

    def __init__(self, config, key):
        self.config = c = config
        keys = jax.random.split(key, 4)
        self.w_in, self.in_bias = linear_weight(keys[0], 2 * c.H, 4 * c.H, c), linear_bias(keys[1], 2 * c.H, 4 * c.H, c)
        self.w_out, self.out_bias = (
            linear_weight(keys[2], 4 * c.H, 4 * c.H, c),
            linear_bias(keys[3], 4 * c.H, 4 * c.H, c),
        )

    def weights(self, norm: LayerNorm) -> Weights:
        """Return the parameters of the cell and of the LayerNorm `norm` as arrays of the type `config.dtype`."""
        return Weights(*(cast(p, self.config) for p in (
            self.w_in, self.in_bias, self.w_out, self.out_bias, norm.scale, norm.bias
        )))  # fmt: skip


def step(
    distribution: Distribution,
    weights: Weights,
    memory: Memory,
    x: Float[Array, "B H"],
    q: Float[Array, "B H"],
    token_mask: Bool[Array, "B"],
    is_first: Bool[Array, ""],
    dropped,
    masks=None,
) -> tuple[Memory, Float[Array, "B H"]]:
    r"""Read the next token of each sentence. Return the new memory, and the output: the new candidate for slot N.

    .. math::
        M_i \leftarrow (1 - r_i) M_i + r_i C_i, \qquad r_i = \sum_{m \ge i} p_m

        C_i = (1 - s_i) x + s_i \, cell(C_{i-1}, M_i), \qquad s_i = \sum_{m \le i} p_m, \quad C_0 = x

    p is the token's distribution over the slots. In the first line, C_i is the candidate of the previous token; the
    second line computes the new C_i. At the first position of the array, r is 1, and s and p are 0. If the token is
    padding, the new memory and the output are 0.

    Args:
      distribution: the module that computes p.
      weights: the parameters of the cell.
      memory: the memory after the previous token.
      x: the projected token, LN(e w_in + in_bias) in `Encoder`, where e is the embedding of the token.
      q: the query of the token (`Distribution.queries`).
      token_mask: False for padding.
      is_first: whether this is the first position of the array.
      dropped: `dropped(x, index)` applies dropout to x, with a different mask for each index.
      masks: the dropout masks of the cell (`Masks`); None: no dropout.
    """
    p = distribution(q, memory.candidates, memory.p, dropped)
    p = jnp.where(is_first, 0, p)
    share = jnp.cumsum(p, axis=1).astype(x.dtype)
    above = jnp.where(is_first, 1, jnp.cumsum(p[:, ::-1], axis=1)[:, ::-1]).astype(x.dtype).T[..., None]
    slots = memory.slots * (1 - above) + memory.candidates * above
    candidates = compose(weights, x, slots, share.T, masks)
    keep = token_mask[None, :, None]
    memory = Memory(jnp.where(keep, slots, 0), jnp.where(keep, candidates, 0), jnp.where(token_mask[:, None], p, 0))
    return memory, memory.candidates[-1]


def _affine(x, weight, bias):
    """Return x weight + bias, for x with any number of leading axes."""
    return x @ weight + bias.reshape((1,) * (x.ndim - 1) + (-1,))
