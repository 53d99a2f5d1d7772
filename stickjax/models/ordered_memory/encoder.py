"""The encoder of Ordered Memory. It reads a sentence token by token, and updates the memory after each token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from stickjax.models.layers import LayerNorm, cast, linear_bias, linear_weight, random_bytes
from stickjax.models.ordered_memory.cell import Cell, Distribution, Memory, empty_memory, step
from stickjax.models.ordered_memory.compose import Masks


class Encoded(NamedTuple):
    """The output of an Ordered Memory encoder for B sentences of up to T tokens.

    `output` [B,T,H]: the vector that every token computes for the highest slot; 0 for padding. The vector of the last
      token represents the sentence.
    `p` [B,T,N]: the distribution of every token over the N slots. `parse.induced_tree` converts the distributions of a
      sentence to a binary tree.
    `memory`: the memory after the last position of the array.
    """

    output: jax.Array
    p: jax.Array
    memory: Memory


class Encoder(nnx.Module):
    """An encoder that reads sentences token by token with Ordered Memory (arXiv 1910.13466).

    The embeddings e [B,T,D] of the tokens are projected first: x = LN(e w_in + in_bias). The number of slots N is an
    argument of the call, because no parameter depends on it.
    """

    def __init__(self, config, key):
        self.config = c = config
        keys = jax.random.split(key, 4)
        self.w_in, self.in_bias = linear_weight(keys[0], c.D, c.H, c), linear_bias(keys[1], c.D, c.H, c)
        self.norm = LayerNorm(c, size=c.H)  # for the projected tokens, and in the cell
        self.distribution = Distribution(c, keys[2])
        self.cell = Cell(c, keys[3])

    def __call__(self, embedded: Float[Array, "B T D"], token_mask: Bool[Array, "B T"], N: int, key=None) -> Encoded:
        """Encode B sentences, given as embedded tokens, with a memory of N slots each.

        Padding may be on the right or on the left. As in the original code, the result depends on the side. A token at
        position 0 does not use the cell: its new vector for every slot is x, its projected embedding. With padding on
        the right, the first token of the sentence is at position 0. With padding on the left, the first token is at a
        later position, and the cell composes its x with the highest slot, which is still empty. With a random key,
        dropout is applied.
        """
        c = self.config
        x = self.norm(embedded @ cast(self.w_in, c) + cast(self.in_bias, c)[None, None])
        dropped = dropout_of(None if key is None else jax.random.fold_in(key, 0), c.memory_dropout)
        q = self.distribution.queries(dropped(x, 0))

        weights = self.cell.weights(self.norm)

        def one(memory, inputs):
            t, x_t, q_t, mask_t = inputs
            at = None if key is None else jax.random.fold_in(key, 1 + t)
            masks = cell_masks(at, c.cell_dropout, N, len(x_t), c.H)
            dropped = dropout_of(at, c.memory_dropout)
            memory, output = step(self.distribution, weights, memory, x_t, q_t, mask_t, t == 0, dropped, masks)
            return memory, (output, memory.p)

        B, T = token_mask.shape
        inputs = jnp.arange(T), x.swapaxes(0, 1), q.swapaxes(0, 1), token_mask.T
        memory, (output, p) = jax.lax.scan(one, empty_memory(B, N, c.H, x.dtype), inputs)
        return Encoded(output.swapaxes(0, 1), p.swapaxes(0, 1), memory)


def kept(key, rate: float, shape) -> tuple[Bool[Array, "..."], float]:
    """Return (mask, r), where r is `rate` rounded to a multiple of 1/256.

    `mask` is a random mask of this shape. Each of its values is True with probability 1 - r.
    """
    level = round(256 * rate)
    return random_bytes(key, *shape) >= level, level / 256


def dropout_of(key, rate: float):
    """Return a function `dropped(x, index)` that applies dropout to x. Without a key, `dropped` returns x unchanged.

    Each `index` gives a different mask. So calls that need independent masks must use different indices.
    """

    def dropped(x, index):
        if key is None or not rate:
            return x
        mask, exact = kept(jax.random.fold_in(key, index), rate, x.shape)
        return jnp.where(mask, x / (1 - exact), 0).astype(x.dtype)

    return dropped


def cell_masks(key, rate: float, N: int, B: int, H: int) -> Masks | None:
    """Return the dropout masks of the cell at one token, for N slots and B sentences.

    Without a key, or with the rate 0, return None.
    """
    if key is None or not rate:
        return None
    mask, exact = kept(jax.random.fold_in(key, 2), rate, (N, B, 6 * H))
    return Masks(mask[..., : 2 * H], mask[..., 2 * H :], jnp.float32(exact))
