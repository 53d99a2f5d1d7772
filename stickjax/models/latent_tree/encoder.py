"""The encoders, which read the source of a translation.

An encoder returns a vector for the root of the target tree, and vectors to which the nodes of the target tree attend.
`OrderedMemoryEncoder` induces a tree over the source, `TreeEncoder` uses the brackets of the batch, and
`RecurrentEncoder` is a GRU without trees.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from stickjax.config.latent_tree import TreeConfig
from stickjax.models.latent_tree.brackets import joins_of
from stickjax.models.latent_tree.gru import BidirectionalGRU
from stickjax.models.latent_tree.memory import OrderedMemory
from stickjax.models.latent_tree.parts import affine, dropped, split_key
from stickjax.models.layers import cast, linear_bias, linear_weight, normal, random_bytes


class Encoding(NamedTuple):
    """The output of an encoder for B sources of up to S words. The vectors of a word do not depend on padding.

    `root` [B,H]: the vector of the root of the target tree.
    `bank` [B,M,H] and `bank_mask` [B,M]: M vectors that the nodes attend to for their context. The mask is False for
      vectors that do not exist.
    `keys` [B,S,H], `values` [B,S,H] and `mask` [B,S]: to choose its word, a node attends to the source words. It scores
      the keys, and sums the values. The mask is False for padding.
    `slots` [B,S,N]: the distribution of every word over the N memory slots, from which `induced_tree` makes a tree over
      the source; None for encoders without memory.
    """

    root: jax.Array
    bank: jax.Array
    bank_mask: jax.Array
    keys: jax.Array
    values: jax.Array
    mask: jax.Array
    slots: jax.Array | None = None


def _at(x, index: Int[Array, " B"]):
    """Return the vectors x[b, index[b]] of all sentences b, as [B,H], for x [B,S,H]. A negative index counts as 0."""
    return jnp.take_along_axis(x, jnp.maximum(index, 0)[:, None, None], axis=1)[:, 0]


def _table(config: TreeConfig, key) -> nnx.Param:
    return normal(key, (config.vocabulary, config.H), 1.0, config)


class OrderedMemoryEncoder(nnx.Module):
    """A bidirectional GRU, and an `OrderedMemory` that reads its outputs. The memory induces a tree over the source.

    At every word, the memory computes a candidate for each of its N slots: a new vector for this slot. Nodes attend to
    the candidates for all slots at all words. The root vector is the candidate for the highest slot at the last word.
    If `early_root` is set in the config, the root vector is the candidate at the second-to-last word, or zero if the
    source has one word. The source words have two embeddings. The GRU reads `embed`. To choose the word of a node, the
    attention of the decoder sums `values`.
    """

    def __init__(self, config: TreeConfig, key):
        self.config = c = config
        keys = jax.random.split(key, 4)
        self.embed, self.values = _table(c, keys[0]), _table(c, keys[1])
        self.gru = BidirectionalGRU(c, keys[2])
        self.memory = OrderedMemory(c, keys[3])

    def __call__(self, batch, key=None) -> Encoding:
        c, source = self.config, batch["source"]
        mask, lengths = source != 0, (source != 0).sum(1)
        hidden, _ = self.gru(cast(self.embed, c)[source], lengths)
        x, candidates, slots = self.memory(hidden, key)
        root = _at(candidates[:, :, -1], lengths - 1 - int(c.early_root))
        if c.early_root:  # as in the original code: its memory is empty before the first word
            root = jnp.where((lengths > 1)[:, None], root, 0)
        bank = candidates.reshape(len(source), -1, c.H)
        return Encoding(root, bank, jnp.repeat(mask, c.N, 1), x, cast(self.values, c)[source], mask, slots)


class TreeEncoder(nnx.Module):
    """A binary TreeLSTM that joins the words of the source in the order of its brackets.

    For a single word, h is its embedding, and the cell state c is 0. Subtrees (h, c) and (h', c') are joined with

      [i, f, f', o, u] = [h; h'] @ join + join_bias
      c'' = sigmoid(i) tanh(u) + sigmoid(f) c + sigmoid(f') c',   h'' = sigmoid(o) tanh(c'').

    A batch has `brackets` [B,S]: how many brackets close after each word of the source
    (see `stickjax.data.tasks.encoding.closing_brackets`).
    The root vector is the h of the whole source. Nodes attend to the h of all words and joined subtrees.
    """

    def __init__(self, config: TreeConfig, key):
        self.config = c = config
        keys = jax.random.split(key, 4)
        self.embed, self.values = _table(c, keys[0]), _table(c, keys[1])
        self.join = linear_weight(keys[2], 2 * c.H, 5 * c.H, c)
        self.join_bias = linear_bias(keys[3], 2 * c.H, 5 * c.H, c)

    def __call__(self, batch, key=None) -> Encoding:
        del key  # no dropout
        if "brackets" not in batch:
            raise ValueError(
                "encoder='tree' needs the array 'brackets' [B,S] in every batch: how many brackets close after each "
                "source word"
            )
        c, source = self.config, batch["source"]
        (B, S), mask = source.shape, source != 0
        words = cast(self.embed, c)[source]
        parts = jnp.concatenate([words, jnp.zeros((B, S - 1, c.H), words.dtype)], axis=1)
        children, is_join = joins_of(batch["brackets"], mask)

        def step(state, inputs):
            h, cell = state
            k, pair = inputs
            both = lambda x: jnp.take_along_axis(x, pair[..., None], axis=1)  # noqa: E731
            one = self._joined(both(h).reshape(B, -1), both(cell))
            put = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, S + k, 1)  # noqa: E731
            return (put(h, one[0]), put(cell, one[1])), None

        inputs = (jnp.arange(S - 1), children.swapaxes(0, 1))
        (h, _), _ = jax.lax.scan(step, (parts, jnp.zeros_like(parts)), inputs)
        lengths = mask.sum(1)
        root = _at(h, jnp.where(lengths > 1, S + lengths - 2, 0))
        return Encoding(root, h, jnp.concatenate([mask, is_join], 1), words, cast(self.values, c)[source], mask)

    def _joined(self, pair, cells):
        i, f, g, o, u = jnp.split(affine(pair, self.join, self.join_bias, self.config), 5, axis=-1)
        forget = jax.nn.sigmoid(f) * cells[:, 0] + jax.nn.sigmoid(g) * cells[:, 1]
        cell = jax.nn.sigmoid(i) * jnp.tanh(u) + forget
        return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


class RecurrentEncoder(nnx.Module):
    """A bidirectional GRU of N layers. Nodes attend to the outputs of its last layer.

    The root vector is tanh(l w_root + root_bias), where l [B, N H] has the final states of all layers and both
    directions.
    """

    def __init__(self, config: TreeConfig, key):
        self.config = c = config
        keys = jax.random.split(key, 4 + c.N)
        self.embed, self.values = _table(c, keys[0]), _table(c, keys[1])
        self.layers = nnx.List([BidirectionalGRU(c, k) for k in keys[4:]])
        self.w_root, self.root_bias = linear_weight(keys[2], c.N * c.H, c.H, c), linear_bias(keys[3], c.N * c.H, c.H, c)

    def __call__(self, batch, key=None) -> Encoding:
        c, source = self.config, batch["source"]
        mask, keys = source != 0, split_key(key, c.N)
        x, last = cast(self.embed, c)[source], []
        for i, layer in enumerate(self.layers):
            x, end = layer(dropped(x, c.memory_dropout, random_bytes(keys[i], *x.shape)) if i else x, mask.sum(1))
            last.append(end)
        root = jnp.tanh(affine(jnp.concatenate(last, -1), self.w_root, self.root_bias, c))
        root = dropped(root, c.encoder_dropout, random_bytes(keys[0], *root.shape))
        return Encoding(root, x, mask, x, cast(self.values, c)[source], mask)


ENCODERS = {"ordered_memory": OrderedMemoryEncoder, "tree": TreeEncoder, "gru": RecurrentEncoder}
