"""The top-down decoder: from the vector of the root to the scores of all words at all nodes of a complete tree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.arguments import sum_type
from stickjax.config.latent_tree import TreeConfig
from stickjax.models.latent_tree.encoder import Encoding
from stickjax.models.latent_tree.parts import TreeAttention, affine, attention_weights, dropped, split_key
from stickjax.models.layers import LayerNorm, cast, linear_bias, linear_weight, normalised, uniform


class Production(NamedTuple):
    """The scores of a batch of trees. Nodes are numbered as in `chart`: the children of node i are 2i + 1 and 2i + 2.

    `logits` [B,n,V]: scores[i, w], the log-probability that node i is a leaf with the word w, plus the node's share of
      the log-probabilities that its ancestors split.
    `attention` [B,n,S]: the weights of the source words with which each node chooses its word.
    `slots` [B,S,N]: the distributions of the encoder's memory, or None.
    """

    logits: jax.Array
    attention: jax.Array
    slots: jax.Array | None


class Source(NamedTuple):
    """What the nodes attend to: the keys of bank and words, [B,M+S,H], and their values and masks."""

    keys: jax.Array
    bank: jax.Array
    bank_mask: jax.Array
    words: jax.Array
    mask: jax.Array


class TreeDecoder(nnx.Module):
    r"""The production of a complete binary tree of depth D, level by level. All nodes share the parameters.

    A node has a vector x and a context c. With act(x) = tanh(LN(x)) and the root vector r of the encoder, the root has
    x = act(r root + root_bias) and c = r. The children y_1, y_2 of a node are

      [a_1, a_2, b_1, b_2] = relu([x; c] w_in + in_bias) w_out + out_bias
      y_j = sigmoid(a_j) act(b_j) + (1 - sigmoid(a_j)) x,   c_j = Attend(y_j, bank).

    The node is a leaf with probability p, and splits with 1 - p, where [log p, log(1 - p)] is
    log_softmax([x; c] leaf + leaf_bias). A leaf has the word w with the probability

      softmax over w of N(unembed)_w . Attend(x, values),   N(v) = tanh((v - mean) / standard deviation).

    `TreeAttention` is Attend. The score of a word w at a node is

      log P(w) + log p + h,   where h = (log(1 - p') + h') / 2 for the parent's p' and h', and h = 0 for the root.

    The log-probability that a node splits is so divided among all nodes below it. A tree counts it exactly once.

    In training, one dropout mask of the keys and one of the query serve both attentions of a node, and one mask of the
    keys serves all levels. The original code draws them separately.
    """

    def __init__(self, config: TreeConfig, key):
        self.config = c = config
        keys = jax.random.split(key, 5)
        self.root, self.root_bias = linear_weight(keys[0], c.H, c.H, c), linear_bias(keys[1], c.H, c.H, c)
        xavier = lambda k, i, o: uniform(k, (i, o), (6 / (i + o)) ** 0.5, c)  # noqa: E731
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape, c.param_dtype))  # noqa: E731
        self.w_in, self.in_bias = xavier(keys[2], 2 * c.H, 2 * c.H), zeros(2 * c.H)
        self.w_out, self.out_bias = xavier(keys[3], 2 * c.H, 4 * c.H), zeros(4 * c.H)
        k_leaf, k_attention = jax.random.split(keys[4])
        self.leaf, self.leaf_bias = zeros(2 * c.H, 2), linear_bias(k_leaf, 2 * c.H, 2, c)
        self.unembed = zeros(c.target_vocabulary, c.H)
        self.norm, self.attention = LayerNorm(c), TreeAttention(c, k_attention)

    def activation(self, x):
        return jnp.tanh(self.norm(x))

    def __call__(self, encoding: Encoding, key=None) -> Production:
        c, keys = self.config, split_key(key, self.config.depth + 3)
        e, split = encoding, split_key(keys[-1], 2)
        of_bank, of_words = (self.attention.keys(y, k) for y, k in zip((e.bank, e.keys), split, strict=True))
        values = jnp.tanh(normalised(e.values, c.norm_eps))
        source = Source(jnp.concatenate([of_bank, of_words], 1), e.bank, e.bank_mask, values, e.mask)
        x = self.activation(affine(e.root, self.root, self.root_bias, c))[:, None]
        context, words, seen = self._attend(x, source, keys[0])
        context = e.root[:, None]
        leaf = self._leaf(x, context, keys[0])
        levels = [self._emitted(words, leaf, keys[0])]
        seen = [seen]
        for k in keys[1 : c.depth + 1]:
            x = self._children(x, context, k)
            context, words, attended = self._attend(x, source, k)
            shared = jnp.repeat(leaf[..., 1:] / 2, 2, axis=1)
            leaf = self._leaf(x, context, k) + shared
            levels.append(self._emitted(words, leaf, k))
            seen.append(attended)
        return Production(jnp.concatenate(levels, 1), jnp.concatenate(seen, 1), e.slots)

    def _children(self, x: Float[Array, "B n H"], context: Float[Array, "B n H"], key) -> Float[Array, "B 2n H"]:
        c, (B, n, H) = self.config, x.shape
        x = dropped(x, c.split_dropout, _fold(key, 0))
        w_in = cast(self.w_in, c)
        hidden = jax.nn.relu(x @ w_in[:H] + affine(context, w_in[H:], self.in_bias, c))
        out = affine(hidden, self.w_out, self.out_bias, c).reshape(B, n, 4, H)
        gate, new = jax.nn.sigmoid(out[:, :, :2]), self.activation(out[:, :, 2:])
        return (gate * new + (1 - gate) * x[:, :, None]).reshape(B, 2 * n, H)

    def _attend(self, x: Float[Array, "B n H"], source: Source, key):
        """Return what nodes get from the bank and from the words [B,n,H], and the weights of the words [B,n,S]."""
        query, M = self.attention.queries(x, _fold(key, 1)), source.bank.shape[1]
        scores = jnp.einsum("BnH,BMH->BnM", query, source.keys)
        of_bank = attention_weights(scores[..., :M], source.bank_mask).astype(x.dtype)
        of_words = attention_weights(scores[..., M:], source.mask).astype(x.dtype)
        context = jnp.einsum("BnM,BMH->BnH", of_bank, source.bank)
        return context, jnp.einsum("BnS,BSH->BnH", of_words, source.words), of_words

    def _leaf(self, x, context, key) -> Float[Array, "B n 2"]:
        """Return the log-probabilities that nodes are leaves, and that they split."""
        c, H, rate = self.config, self.config.H, self.config.leaf_dropout
        weight = cast(self.leaf, c)
        logits = dropped(x, rate, _fold(key, 2)) @ weight[:H]
        logits += affine(dropped(context, rate, _fold(key, 3)), weight[H:], self.leaf_bias, c)
        return jax.nn.log_softmax(logits.astype(sum_type(logits)))

    def _emitted(self, words: Float[Array, "B n H"], leaf: Float[Array, "B n 2"], key) -> Float[Array, "B n V"]:
        """Return the scores of all words at nodes, from what the nodes get from the source words."""
        c = self.config
        table = jnp.tanh(normalised(cast(self.unembed, c), c.norm_eps))
        logits = jnp.einsum("BnH,VH->BnV", dropped(words, c.output_dropout, _fold(key, 4)), table)
        return jax.nn.log_softmax(logits.astype(leaf.dtype)) + leaf[..., :1]


def _fold(key, index: int):
    return None if key is None else jax.random.fold_in(key, index)
