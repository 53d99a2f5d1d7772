"""Find the binary tree with the highest score inside a complete binary tree. The score is a sum over the leaves.

`stickjax.models.latent_tree.chart` explains the terms: the complete tree and its nodes, a binary tree inside it, and
the line from place 0 to place 2^D, which the leaves of a tree cover from left to right.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from stickjax.models.latent_tree.chart import (
    depth_of,
    intervals,
    levels_of,
    reduced_at_ends,
    shifted,
    starts_of,
)


class Derivation(NamedTuple):
    """The best binary tree for every sentence of a batch, with up to T leaves, and the word at every leaf.

    `words` [B,T]: the word of every leaf, from left to right; 0 after the last leaf.
    `nodes` [B,T]: the number of every leaf as a node of the complete tree; -1 after the last leaf.
    `lengths` [B]: the number of leaves.
    `scores` [B]: the sum of the scores of the leaves.
    """

    words: jax.Array
    nodes: jax.Array
    lengths: jax.Array
    scores: jax.Array


@partial(jax.jit, static_argnames="limit")
def viterbi(scores: Float[Array, "B n V"], limit: int) -> Derivation:
    """Find the tree and the words with the highest score, among all trees with at most `limit` leaves.

    Every leaf i gets the word w with the highest scores[i, w]. Word 0 is padding, and is never chosen. If several words
    of a leaf have the same score, the smallest word id is chosen. If several trees have the same score, the tree with
    the fewest leaves is chosen, and among these the tree whose last leaf is nearest to the root.

    Args:
      scores: the score of every node i for every word.
      limit: the largest number of leaves.

    Returns:
      A `Derivation` with T = min(limit, 2^D).

    Raises:
      ValueError: n is not 2^(D+1) - 1 for any D, V is below 2, or `limit` is below 1.

    >>> found = viterbi(jnp.log(jnp.array([[[0, 0.1, 0.2], [0, 0.9, 0.0], [0, 0.3, 0.7]]])), limit=4)
    >>> found.words.tolist(), found.nodes.tolist(), round(float(jnp.exp(found.scores[0])), 2)
    ([[1, 2]], [[1, 2]], 0.63)
    """
    B, n, V = scores.shape
    depth = depth_of(n)
    if V < 2:
        raise ValueError(f"V={V} must be at least 2, because word 0 is padding")
    if limit < 1:
        raise ValueError(f"limit={limit}, the largest number of leaves of a tree, must be at least 1")
    T = min(limit, 2**depth)
    best_words = scores[..., 1:].argmax(-1).astype(jnp.int32) + 1
    own = scores[..., 1:].max(-1).T
    nodes = jnp.broadcast_to(jnp.arange(n)[:, None], (n, B))

    def step(before, _):
        levels = [start + score for start, score in zip(starts_of(before), levels_of(own), strict=True)]
        after, last = reduced_at_ends(_better, list(zip(levels, levels_of(nodes), strict=True)))
        return shifted(after, -jnp.inf), (after[-1], last)

    first = jnp.full((2**depth, B), -jnp.inf, scores.dtype).at[0].set(0)
    _, (totals, last) = jax.lax.scan(step, first, None, T)
    lengths = totals.argmax(0) + 1
    leaves = _leaves(last, lengths, depth)
    words = jnp.take_along_axis(best_words, jnp.maximum(leaves, 0), axis=1)
    return Derivation(jnp.where(leaves >= 0, words, 0), leaves, lengths, totals.max(0))


def _better(one, other):
    """Return (scores, nodes), in each element from the argument with the higher score, or from `one` if both are equal.

    Both arguments are pairs (scores, nodes).
    """
    is_other = other[0] > one[0]
    return jnp.where(is_other, other[0], one[0]), jnp.where(is_other, other[1], one[1])


def _leaves(last: Int[Array, "T P B"], lengths: Int[Array, " B"], depth: int) -> Int[Array, "B T"]:
    """Return the leaves of the best trees, from left to right; -1 after the last leaf.

    `last[t, p]` is the last leaf of the best sequence of t + 1 leaves that ends at the place p + 1. This function finds
    the leaves from right to left, beginning at the end of the line.
    """
    starts = jnp.asarray(intervals(depth)[0])

    def step(end, inputs):
        t, last = inputs
        node = jnp.take_along_axis(last, end[None] - 1, axis=0)[0]
        is_leaf = t < lengths
        return jnp.where(is_leaf, starts[node], end), jnp.where(is_leaf, node, -1)

    end = jnp.full(lengths.shape, 2**depth)
    return jax.lax.scan(step, end, (jnp.arange(len(last)), last), reverse=True)[1].T
