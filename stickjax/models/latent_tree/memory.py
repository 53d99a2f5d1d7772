"""The variant of Ordered Memory (arXiv 1910.13466) that the encoder of arXiv 2010.04704 uses.

Its cell differs from the cell of the original Ordered Memory: the three gates of a unit are the results of one softmax,
and the activation is tanh(LayerNorm(x)).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.arguments import sum_type
from stickjax.config.latent_tree import TreeConfig
from stickjax.models.latent_tree.parts import affine, dropped, split_key
from stickjax.models.layers import LayerNorm, cast, linear_bias, linear_weight, random_bytes, uniform
from stickjax.models.ordered_memory.cell import reachable, restricted_softmax


class SlotDistribution(nnx.Module):
    """Computes the distribution p of a word over the N slots of the memory.

    x is the projected word. m_i is the previous word's candidate for the content of slot i (`OrderedMemory`), and p' is
    the previous word's distribution over the slots. Then

      q = LN(x @ query + query_bias),   k_i = LN(m_i @ key + key_bias)
      p_i is proportional to c_i exp((relu(q + k_i) . weight + bias) / sqrt(H)),

    where c_i = sum over j <= i + 1 of p'_j for i < N, and c_N = 1. A c_i below 1e-5 counts as 0:
    the word cannot use this slot.
    """

    def __init__(self, config: TreeConfig, key):
        self.config = c = config
        keys = jax.random.split(key, 6)
        self.query, self.query_bias = linear_weight(keys[0], c.H, c.H, c), linear_bias(keys[1], c.H, c.H, c)
        self.key, self.key_bias = linear_weight(keys[2], c.H, c.H, c), linear_bias(keys[3], c.H, c.H, c)
        self.weight, self.bias = linear_weight(keys[4], c.H, 1, c), linear_bias(keys[5], c.H, 1, c)
        self.query_norm, self.key_norm = LayerNorm(c), LayerNorm(c)

    def queries(self, x: Float[Array, "B S H"], random=None) -> Float[Array, "B S H"]:
        """Return the queries q of the projected words x. `random`: random bytes [B,S,H] for dropout, or None."""
        c = self.config
        return self.query_norm(affine(dropped(x, c.memory_dropout, random), self.query, self.query_bias, c))

    def __call__(
        self, query: Float[Array, "B H"], candidates: Float[Array, "B N H"], before: Float[Array, "B N"], random
    ) -> Float[Array, "B N"]:
        """Return p, from the query q and from the candidates and the distribution of the previous word.

        `random`: two arrays of random bytes [B,N,H] for dropout; (None, None): no dropout.
        """
        c, rate = self.config, self.config.memory_dropout
        keys = self.key_norm(affine(dropped(candidates, rate, random[0]), self.key, self.key_bias, c))
        hidden = dropped(jax.nn.relu(query[:, None] + keys), rate, random[1])
        beta = affine(hidden, self.weight, self.bias, c)[..., 0].astype(sum_type(hidden)) * c.H**-0.5
        return restricted_softmax(beta, reachable(before))


class OrderedMemory(nnx.Module):
    """A memory of N slots that reads a sentence word by word.

    The vector e of a word is projected: x = act(e w_project + project_bias), with act(x) = tanh(LN(x)). M_i is the
    content of slot i. m_i is this word's candidate for the content of slot i, and m'_i is the candidate of the previous
    word. p is this word's distribution over the slots (`SlotDistribution`). With s_i = sum over j <= i of p_j,
    r_i = sum over j >= i of p_j, and m_0 = x, a word first changes all slots, and then computes its candidates in the
    order i = 1, 2, ..., N:

      M_i <- (1 - r_i) M_i + r_i m'_i
      m_i = (1 - s_i) x + s_i cell(m_(i-1), M_i)
      cell(h, M) = v h + g M + u act(z),   [a, b, d, z] = relu([h; M] w_in + in_bias) w_out + out_bias,

    where (v, g, u) is the softmax of (a, b, d) in every unit. The first word is an exception: its p and all its s_i are
    0, all its r_i are 1, and all M_i and m'_i before it are 0.
    """

    def __init__(self, config: TreeConfig, key):
        self.config = c = config
        keys = jax.random.split(key, 7)
        self.w_project, self.project_bias = linear_weight(keys[0], c.H, c.H, c), linear_bias(keys[1], c.H, c.H, c)
        self.w_in, self.in_bias = linear_weight(keys[2], 2 * c.H, 4 * c.H, c), linear_bias(keys[3], 2 * c.H, 4 * c.H, c)
        limit = (4 * c.H) ** -0.5
        self.w_out, self.out_bias = uniform(keys[4], (4 * c.H, 4, c.H), limit, c), uniform(keys[5], (4, c.H), limit, c)
        self.norm = LayerNorm(c)
        self.distribution = SlotDistribution(c, keys[6])

    def activation(self, x):
        return jnp.tanh(self.norm(x))

    def __call__(
        self, e: Float[Array, "B S H"], key=None
    ) -> tuple[Float[Array, "B S H"], Float[Array, "B S N H"], Float[Array, "B S N"]]:
        """Return the projected words x, and for every word its candidates and its distribution over the slots.

        The results for a word do not depend on later words, so padding on the right does not change them.
        """
        c, (B, S, H), (k_query, k_steps) = self.config, e.shape, split_key(key, 2)
        x = self.activation(affine(e, self.w_project, self.project_bias, c))
        queries = self.distribution.queries(x, random_bytes(k_query, B, S, H))
        # For each word and slot, the distribution needs 2 H random bytes, and the cell 6 H.
        random = random_bytes(k_steps, S, 8, B, c.N, H)

        def step(state, inputs):
            slots, candidates, p = state
            t, word, query, random = inputs
            random = [None] * 8 if random is None else random
            p = jnp.where(t == 0, 0, self.distribution(query, candidates, p, random[:2]))
            below, above = jnp.cumsum(p, 1), jnp.where(t == 0, 1, jnp.cumsum(p[:, ::-1], 1)[:, ::-1])
            r = above.astype(e.dtype)[..., None]
            slots = slots * (1 - r) + candidates * r
            candidates = self._compose(word, slots, below.astype(e.dtype), random[2:])
            return (slots, candidates, p), (candidates, p)

        empty = jnp.zeros((B, c.N, c.H), e.dtype)
        inputs = (jnp.arange(S), x.swapaxes(0, 1), queries.swapaxes(0, 1), random)
        _, (candidates, p) = jax.lax.scan(step, (empty, empty, jnp.zeros((B, c.N), sum_type(e))), inputs)
        return x, candidates.swapaxes(0, 1), p.swapaxes(0, 1)

    def _compose(self, x: Float[Array, "B H"], slots: Float[Array, "B N H"], share: Float[Array, "B N"], random):
        """Return the candidates m_1 .. m_N [B,N,H] of a word with the vector x. `slots` are M_1 .. M_N.

        `share`: s_1 .. s_N. `random`: 6 arrays of random bytes [B,N,H] for dropout; 6 values None: no dropout.
        """
        c = self.config
        rate, at = c.encoder_dropout, lambda array, i: None if array is None else array[:, i]
        w_in, w_out = cast(self.w_in, c), cast(self.w_out, c).reshape(4 * c.H, -1)
        of_slots = affine(dropped(slots, rate, random[0]), w_in[c.H :], self.in_bias, c)  # for all slots at once
        h, found = x, []
        for i in range(c.N):
            hidden = jax.nn.relu(dropped(h, rate, at(random[1], i)) @ w_in[: c.H] + of_slots[:, i])
            of_hidden = None if random[2] is None else jnp.concatenate([at(one, i) for one in random[2:]], -1)
            out = (dropped(hidden, rate, of_hidden) @ w_out).reshape(-1, 4, c.H) + cast(self.out_bias, c)[None]
            v, g, u = jnp.moveaxis(jax.nn.softmax(out[:, :3], axis=1), 1, 0)
            composed = v * h + g * slots[:, i] + u * self.activation(out[:, 3])
            h = x * (1 - share[:, i, None]) + composed * share[:, i, None]
            found.append(h)
        return jnp.stack(found, axis=1)
