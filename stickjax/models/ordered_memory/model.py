"""A classifier of one sentence or of a pair of sentences, with an Ordered Memory encoder."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from stickjax.config import OrderedMemoryConfig
from stickjax.models.classifier import Classifier, compared
from stickjax.models.layers import cast, normal
from stickjax.models.ordered_memory.encoder import Encoder, dropout_of


class ClassifierOutput(NamedTuple):
    """The output of a classifier for B sentences, or for B pairs of sentences.

    `logits` [B,classes], in float32.
    `p` [B,T,N]: the distribution of every token over the N memory slots; for pairs [2,B,T,N], first the left sentences.
      `parse.induced_tree` converts the distributions of a sentence to a binary tree.
    """

    logits: jax.Array
    p: jax.Array


class OrderedMemoryClassifier(nnx.Module):
    """A model that computes the logits of the labels for a sentence, or for a pair of sentences.

    A batch has the token ids `tokens` [B,T], or for pairs `left` and `right` [B,T]. Id 0 is padding, on the right or on
    the left. A sentence is represented by the encoder's output at its last token. With `directions=2`, a second encoder
    reads the sentence from its end, and its output is appended. Without a random key (inference), the memory has
    `config.evaluation_N` slots; 0 means `config.N` slots, as in training.
    """

    def __init__(self, config: OrderedMemoryConfig, key):
        self.config = c = config
        k_embed, k_forward, k_backward, k_head = jax.random.split(key, 4)
        self.embed = normal(k_embed, (c.vocabulary, c.D), c.embedding_std, c)
        self.encoder = Encoder(c, k_forward)
        self.backward = Encoder(c, k_backward) if c.directions == 2 else None
        width = c.H * c.directions * (4 if c.sentences == 2 else 1)
        self.head = Classifier(c, k_head, width, hidden=width if c.hidden else 0)

    def __call__(self, batch: dict[str, jax.Array], key=None) -> ClassifierOutput:
        c = self.config
        tokens = jnp.concatenate([batch["left"], batch["right"]]) if c.sentences == 2 else batch["tokens"]
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        embedded = dropout_of(keys[0], c.input_dropout)(cast(self.embed, c)[tokens], 0)
        N = c.N if key is not None or not c.evaluation_N else c.evaluation_N
        u, p = last_output(self.encoder, embedded, tokens != 0, N, keys[1])
        if self.backward is not None:
            reverse = reversed_places(tokens != 0)
            turned = jnp.take_along_axis(embedded, reverse[..., None], axis=1)
            v, _ = last_output(self.backward, turned, tokens != 0, N, keys[2])
            u = jnp.concatenate([u, v], -1)
        if c.sentences == 2:
            u, p = compared(*jnp.split(u, 2)), p.reshape(2, -1, *p.shape[1:])
        return ClassifierOutput(self.head(u, dropout_of(keys[3], c.output_dropout)), p)


def last_output(
    encoder: Encoder, embedded: Float[Array, "B T D"], token_mask: Bool[Array, "B T"], N: int, key
) -> tuple[Float[Array, "B H"], Float[Array, "B T N"]]:
    """Encode sentences with a memory of N slots. Return (the output at the last token of every sentence, p).

    p is the distribution of every token over the slots. `key` is a random key for dropout, or None.
    """
    end = encoder(embedded, token_mask, N, key)
    T = token_mask.shape[1]
    last = T - 1 - jnp.argmax(token_mask[:, ::-1], axis=1)
    return jnp.take_along_axis(end.output, last[:, None, None], axis=1)[:, 0], end.p


def reversed_places(token_mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the indices [B,T] that reverse the order of the tokens in every sentence. Padding keeps its position.

    The tokens of a sentence must be next to each other, with padding on one side or on both sides.

    >>> reversed_places(jnp.array([[True, True, True, False]])).tolist()
    [[2, 1, 0, 3]]
    """
    T = token_mask.shape[1]
    first, last = jnp.argmax(token_mask, axis=1), T - 1 - jnp.argmax(token_mask[:, ::-1], axis=1)
    places = jnp.arange(T)[None]
    return jnp.where(token_mask, (first + last)[:, None] - places, places)
