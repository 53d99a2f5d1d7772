"""The top-down decoder: from the vector of the root to the scores of all words at all nodes of a complete tree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.arguments import sum_type
from stickjax.config.latent_tree import TreeConfig
from stickjax.models.latent_tree.encoder import Encoding
from stickjax.models.latent_tree.parts import (
    TreeAttention,
    affine,
    attention_weights,
    centred,
    dropped,
    inverse_deviation,
    split_key,
)
from stickjax.models.layers import LayerNorm, cast, linear_bias, linear_weight, normalised, random_bytes, uniform


class Production(NamedTuple):
    """The output of the model for B sources: the scores of all words at the n nodes of a complete binary tree.

    The children of node i are 2i + 1 and 2i + 2.

    `logits` [B,n,V]: for every node and word, log P(word) + log p + h of `TreeDecoder`. This is the log-probability
      that the node is a leaf with this word, plus h. Here h is the node's share of the log-probability that all
      ancestors of the node have children.
    `attention` [B,n,S]: how much each node attends to each of the S source words to choose its word.
    `slots` [B,S,N]: the distribution of every source word over the N slots of the encoder's memory; None if the encoder
      has no memory.
    """

    logits: jax.Array
    attention: jax.Array
    slots: jax.Array | None


class Source(NamedTuple):
    """The vectors that the nodes of the target tree attend to: M vectors of the bank, and S source words.

    The bank gives the context of a node, and the words give its word. `keys` [B,M+S,H] and `shifts` [B,M+S] are the
    results of `TreeAttention.keys` for the bank and then the words. `bank` [B,M,H] and `words` [B,S,H] are the values.
    `bank_mask` [B,M] and `mask` [B,S] are False for padding.
    """

    keys: jax.Array
    shifts: jax.Array
    bank: jax.Array
    bank_mask: jax.Array
    words: jax.Array
    mask: jax.Array


class Level(NamedTuple):
    """The n nodes of one level: first the left children of all nodes of the level above, then their right children.

    `x` and `context` [B,n,H] are the vectors x and c of `TreeDecoder`. `leaf` [B,n,2] has log p + h and log(1 - p) + h,
    with p and h of `TreeDecoder`. `logits` [B,n,V] and `attention` [B,n,S] are as in `Production`.
    """

    x: jax.Array
    context: jax.Array
    leaf: jax.Array
    logits: jax.Array
    attention: jax.Array


# Indices of the five arrays of random bytes of a level, one array for each dropout mask.
SPLIT, QUERY, LEAF, LEAF_CONTEXT, OUTPUT = range(5)


class TreeDecoder(nnx.Module):
    r"""Computes the vectors and the scores of all nodes of a complete binary tree of depth D, level by level.

    All nodes share the parameters. A node has a vector x and a context c. With act(x) = tanh(LN(x)), and the root
    vector r of the encoder, the root has x = act(r @ root + root_bias) and c = r. The children of a node have the
    vectors y_1, y_2 and the contexts c_1, c_2:

      [a_1, a_2, b_1, b_2] = relu([x; c] @ w_in + in_bias) @ w_out + out_bias
      y_j = sigmoid(a_j) act(b_j) + (1 - sigmoid(a_j)) x,   c_j = Attend(y_j, bank).

    The node is a leaf with probability p, and has children with probability 1 - p, where [log p, log(1 - p)] is
    log_softmax([x; c] @ leaf + leaf_bias). A leaf has the word w with the probability

      P(w) = softmax_w(N(unembed)_w . Attend(x, values)),   N(v) = tanh((v - mean) / standard deviation).

    Attend is `TreeAttention`. The bank is `Encoding.bank`, and the values are N(v) for every vector v in
    `Encoding.values`. The score of a word w at a node is

      log P(w) + log p + h,   where h = (log(1 - p') + h') / 2 for the parent's p' and h', and h = 0 for the root.

    A node with children gives half of log(1 - p) + h to each child, as the h of the child. So in the sum over the
    leaves of a tree, each log(1 - p) of the tree counts exactly once.

    Dropout in training: a node has one query, with one dropout mask, to attend to the bank and to the words. All nodes
    attend to the same keys, with one dropout mask. The original code draws a new mask each time.
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
        c, (B, S, H) = self.config, encoding.keys.shape
        k_nodes, k_keys = split_key(key, 2)
        source = self._source(encoding, random_bytes(k_keys, B, encoding.bank.shape[1] + S, H))
        random = random_bytes(k_nodes, (2 ** (c.depth + 1) - 1) * B * 5 * H)

        def random_of(d: int):
            n = 2**d
            part = None if random is None else random[(n - 1) * B * 5 * H : (2 * n - 1) * B * 5 * H]
            return [None] * 5 if part is None else part.reshape(5, B, n, H)

        # Only some products of matrices are saved for the backward pass. The rest is cheaper to compute again.
        policy = jax.checkpoint_policies.save_only_these_names("product")
        expand = jax.checkpoint(self._expand, policy=policy)
        x = self.activation(affine(encoding.root, self.root, self.root_bias, c))[:, None]
        levels = [self._level(x, encoding.root[:, None], jnp.zeros_like(x[..., :1]), source, random_of(0))]
        for d in range(1, c.depth + 1):
            levels.append(expand(levels[-1], source, random_of(d - 1)[SPLIT], random_of(d)))
        logits, attention = (_by_parent([getattr(level, name) for level in levels]) for name in ("logits", "attention"))
        return Production(logits, attention, encoding.slots)

    def _source(self, e: Encoding, random) -> Source:
        c = self.config
        keys, shifts = self.attention.keys(jnp.concatenate([e.bank, e.keys], 1), random)
        values = jnp.tanh(normalised(e.values, c.norm_eps))
        return Source(keys, shifts, e.bank, e.bank_mask, values, e.mask)

    def _expand(self, parents: Level, source: Source, split_random, random) -> Level:
        """Return the level below `parents`: two children of every node.

        `split_random`: random bytes for the dropout of the vectors of the parents, or None. `random`: a list of the
        five arrays of random bytes of the new level, or of five None.
        """
        c, H = self.config, self.config.H
        x = dropped(parents.x, c.split_dropout, split_random)
        w_in, w_out, out_bias = cast(self.w_in, c), cast(self.w_out, c), cast(self.out_bias, c)
        hidden = jnp.concatenate([x, parents.context], -1) @ w_in
        hidden = checkpoint_name(hidden, "product") + cast(self.in_bias, c)[None, None]
        w_out = jnp.concatenate([w_out[:, : 2 * H], _centred_pair(w_out[:, 2 * H :])], -1)
        out_bias = jnp.concatenate([out_bias[: 2 * H], _centred_pair(out_bias[2 * H :])])
        out = checkpoint_name(jax.nn.relu(hidden) @ w_out, "product") + out_bias[None, None]
        children = []
        for j in (0, 1):
            gate, new = (out[..., i * H : (i + 1) * H] for i in (j, 2 + j))
            new = new * inverse_deviation(new, c.norm_eps) * cast(self.norm.scale, c)[None, None]
            new = jnp.tanh(new + cast(self.norm.bias, c)[None, None])
            children.append(x + jax.nn.sigmoid(gate) * (new - x))
        shared = parents.leaf[..., 1:] / 2
        return self._level(jnp.concatenate(children, 1), None, jnp.concatenate([shared] * 2, 1), source, random)

    def _level(self, x: Float[Array, "B n H"], context, shared: Float[Array, "B n 1"], source: Source, random) -> Level:
        """Return the `Level` of the nodes that have the vectors `x`.

        `shared` is h of these nodes (see `TreeDecoder`). `context` are the contexts of the nodes; None: compute them
        by attention to the bank.
        """
        c, M = self.config, source.bank.shape[1]
        y, deviation = self.attention.queries(dropped(x, c.attention_dropout, random[QUERY]))
        scores = jnp.einsum("BnH,BMH->BnM", checkpoint_name(y, "product"), source.keys)
        scores = checkpoint_name(scores, "product") * deviation + source.shifts[:, None]
        of_words = attention_weights(scores[..., M:], source.mask).astype(x.dtype)
        if context is None:
            of_bank = attention_weights(scores[..., :M], source.bank_mask).astype(x.dtype)
            context = checkpoint_name(jnp.einsum("BnM,BMH->BnH", of_bank, source.bank), "product")
        words = checkpoint_name(jnp.einsum("BnS,BSH->BnH", of_words, source.words), "product")
        leaf = self._leaf(x, context, random) + shared
        table = jnp.tanh(normalised(cast(self.unembed, c), c.norm_eps))
        logits = jnp.einsum("BnH,VH->BnV", dropped(words, c.output_dropout, random[OUTPUT]), table)
        logits = jax.nn.log_softmax(logits.astype(leaf.dtype)) + leaf[..., :1]
        return Level(x, context, leaf, logits, of_words)

    def _leaf(self, x, context, random) -> Float[Array, "B n 2"]:
        """Return [log p, log(1 - p)] of every node: p is the probability that the node is a leaf."""
        c, H, rate = self.config, self.config.H, self.config.leaf_dropout
        weight, bias = cast(self.leaf, c), cast(self.leaf_bias, c)
        weight = weight[:, 0] - weight[:, 1]
        logit = dropped(x, rate, random[LEAF]) @ weight[:H] + dropped(context, rate, random[LEAF_CONTEXT]) @ weight[H:]
        logit = (logit + (bias[0] - bias[1])).astype(sum_type(logit))
        return jax.nn.log_sigmoid(jnp.stack([logit, -logit], -1))


def _centred_pair(weight):
    """Subtract from each half of the last axis the mean of this half, as `parts.centred` does for the whole axis."""
    return jnp.concatenate([centred(half) for half in jnp.split(weight, 2, -1)], -1)


def _by_parent(levels: list[jax.Array]) -> jax.Array:
    """Concatenate the arrays [B,n,...] of all levels into one, in which the children of node i are 2i + 1 and 2i + 2.

    In a `Level`, all left children come before all right children. In the result, the two children of a node are next
    to each other, and they are in the order of their parents.
    """
    order = np.zeros(1, int)
    ordered = [levels[0]]
    for level in levels[1:]:
        n = len(order)
        order = np.stack([order, order + n], 1).reshape(-1)
        ordered.append(level[:, order])
    return jnp.concatenate(ordered, 1)
