"""The sum of exp(score) over all binary trees with T leaves inside a complete binary tree.

A complete binary tree of depth D has n = 2^(D+1) - 1 nodes. They are numbered level by level: the root is 0, and the
children of node i are 2i + 1 and 2i + 2. A binary tree inside it has the same root. Its leaves are nodes n_0 .. n_(T-1)
from left to right, and every other node of the tree has both its children in the tree. The score of a tree for a
sentence is the sum of scores[n_t, t] over the words t of the sentence.

The leaves of the complete tree divide a line of length 2^D. A node i at depth d covers the interval
[start(i), end(i)) of length 2^(D-d). The leaves of a tree cover the line without gaps: start(n_0) = 0,
start(n_(t+1)) = end(n_t), end(n_(T-1)) = 2^D. Every sequence of nodes that covers the line in this way is the leaves of
exactly one tree: the root alone, or two subtrees whose leaves cover one half of the line each. So the sum over trees is
a sum over sequences of nodes, which a forward algorithm computes. Let a_t(p) be the log of the sum of exp(score) over
all sequences of t nodes, for the first t words, that cover the line from place 0 to place p. Then a_0(0) = 0, all other
a_0(p) are -inf, and

  a_(t+1)(p) = logsumexp over the nodes i with end(i) = p of a_t(start(i)) + scores[i, t],
  log_likelihood = a_T(2^D).

The work is n operations for each word. The original code uses a matrix over pairs of nodes instead. The module
`viterbi` finds the tree with the highest score in the same way.

Tan et al., `Recursive Top-Down Production for Sentence Generation with Latent Trees
<https://arxiv.org/abs/2010.04704>`_.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def depth_of(nodes: int) -> int:
    """Return the depth D of the complete binary tree that has `nodes` nodes.

    Raises ValueError if `nodes` is not 2^(D+1) - 1 for any D.

    >>> depth_of(31)
    4
    """
    if nodes < 1 or nodes & (nodes + 1):
        raise ValueError(
            f"{nodes} nodes are not a complete binary tree: the number must be 2^(D+1) - 1 for some D, such as 7 or 15"
        )
    return nodes.bit_length() - 1


def in_order(depth: int) -> np.ndarray:
    """Return the numbers of all nodes of a complete binary tree in order: left subtree, node, right subtree.

    >>> in_order(2).tolist()
    [3, 1, 4, 0, 5, 2, 6]
    """
    levels = [2**d - 1 + np.arange(2**d) for d in range(depth + 1)]
    middles = [(2 * np.arange(2**d) + 1) / 2**d for d in range(depth + 1)]
    return np.concatenate(levels)[np.argsort(np.concatenate(middles))]


def intervals(depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays, start and end: node i covers the leaves start[i] .. end[i] - 1 of the complete tree.

    The complete tree of this depth D has 2^D leaves, which are counted from the left, from 0.

    >>> [x.tolist() for x in intervals(1)]
    [[0, 0, 1], [2, 1, 2]]
    """
    widths = np.concatenate([np.full(2**d, 2 ** (depth - d)) for d in range(depth + 1)])
    starts = np.concatenate([np.arange(2**d) * 2 ** (depth - d) for d in range(depth + 1)])
    return starts, starts + widths


def edges(depth: int) -> list[tuple[int, int]]:
    """Return all pairs of nodes (i, j) where leaf j can follow leaf i in a tree: end(i) = start(j).

    Their number is the sum of 2^(D-h) h^2 over h = 1 .. D, where D is `depth`. `intervals` defines start and end.

    >>> len(edges(3)), len(edges(8))
    (21, 1434)
    """
    starts, ends = intervals(depth)
    return [(int(i), int(j)) for i, j in zip(*np.nonzero(ends[:, None] == starts[None]), strict=True)]


def trees(depth: int, leaves: int, root: int = 0) -> Iterator[tuple[int, ...]]:
    """Yield all binary trees that have the root `root`, `leaves` leaves, and at most `depth` levels below the root.

    Each tree is the tuple of the numbers of its leaves, from left to right. The number of trees grows
    exponentially with `leaves`, so this is for tests with few leaves.

    >>> list(trees(2, 3))
    [(1, 5, 6), (3, 4, 2)]
    """
    if leaves == 1:
        yield (root,)
    elif 1 < leaves <= 2**depth:
        for left in range(1, leaves):
            parts = (trees(depth - 1, k, 2 * root + b) for k, b in ((left, 1), (leaves - left, 2)))
            yield from (one + other for one, other in itertools.product(*parts))


def log_likelihood_reference(scores: Float[Array, "n T"]) -> Float[Array, ""]:
    """Compute `log_likelihood` of one sentence of T words slowly, from a list of all trees with T leaves.

    `scores` has the score of every node for every word. For tests.
    """
    n, T = scores.shape
    paths = np.array(list(trees(depth_of(n), T)), int).reshape(-1, T)
    return jax.scipy.special.logsumexp(scores[paths, np.arange(T)[None]].sum(1))


def log_likelihood(scores: Float[Array, "B n T"], lengths: Int[Array, " B"]) -> Float[Array, " B"]:
    r"""Compute the log of the sum of exp(score) over all binary trees whose T leaves are the T words of a sentence.

    The score of a tree whose leaves are the nodes n_0 .. n_(T-1) is the sum over t of scores[n_t, t]. In
    `TreeDecoder`, scores[i, t] is the log-probability that the node i is a leaf with word t, plus a number h_i. Over
    the leaves of any tree, these numbers add up to the log-probability that all other nodes of the tree have children.
    So the result is the log-probability of the sentence.

    The gradient is the posterior: d log_likelihood / d scores[i, t] is the probability, given the sentence, that word t
    is at the leaf i. A backward recursion computes it from the values a_t of the forward algorithm (see the module
    docstring). With g_T(2^D) = 1 and all other g_T(p) = 0,

      posterior[i, t] = g_(t+1)(end(i)) exp(a_t(start(i)) + scores[i, t] - a_(t+1)(end(i))),
      g_t(p) = sum over the nodes i with start(i) = p of posterior[i, t].

    Args:
      scores: the score of every node for every word. -inf is allowed.
      lengths: the number of words T of each sentence. Scores of later words have no effect.

    Returns:
      The log-likelihoods, in the type of `scores`. A sentence without words, or with more than 2^D words, has -inf, and
      the gradient 0.

    Raises:
      ValueError: n is not 2^(D+1) - 1 for any D.

    >>> scores = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.125], [0.125, 0.25]]]))
    >>> float(jnp.exp(log_likelihood(scores, jnp.array([2])))[0])  # the left child has word 0, the right child word 1
    0.0625
    """
    depth_of(scores.shape[1])
    return _log_likelihood(scores.transpose(2, 1, 0), lengths)


# In the functions below, the batch is the last axis, so the values of one node or place are contiguous in memory.


def levels_of(values) -> list[jax.Array]:
    """Split an array whose first axis has the n nodes of a complete tree into one array per level, from the root on."""
    depth = depth_of(values.shape[0])
    return [values[2**d - 1 : 2 ** (d + 1) - 1] for d in range(depth + 1)]


def starts_of(places) -> list[jax.Array]:
    """Return, for every node, the value at the place where its interval starts: one array per level, from the root on.

    `places` has the values at the places 0 .. 2^D - 1. `intervals` defines the intervals.
    """
    size = places.shape[0]
    return [places[:: size >> d] for d in range(size.bit_length())]


def ends_of(places) -> list[jax.Array]:
    """Return, for every node, the value at the place where its interval ends: one array per level, from the root on.

    `places` has the values at the places 1 .. 2^D. `intervals` defines the intervals.
    """
    size = places.shape[0]
    return [places[(size >> d) - 1 :: size >> d] for d in range(size.bit_length())]


def reduced_at_ends(reduce: Callable, levels: list):
    """Combine the values of all nodes that have the same end (`intervals`). Return an array over the places 1 .. 2^D.

    `levels` has an array of the values of the nodes for each level, from the root on, or a tuple of arrays for each
    level. `reduce(above, below)` combines two arrays (or tuples) of equal shape, such as `jnp.add`; `above` comes from
    the levels nearer to the root.

    The levels are combined one after the other, from the root on. A right child ends where its parent ends, so its
    value is combined with the result so far at this place. Where a left child ends, no other node of its level or of a
    level above ends, so its value is the result at this place.
    """
    total = levels[0]
    for level in levels[1:]:
        left, right = (jax.tree.map(lambda x, child=child: x[child::2], level) for child in (0, 1))
        total = jax.tree.map(_interleaved, left, reduce(total, right))
    return total


def _interleaved(left, right):
    return jnp.stack([left, right], 1).reshape(-1, *left.shape[1:])


def _summed_at_starts(levels: list[jax.Array]) -> jax.Array:
    """Add up the values of all nodes with the same start. Return an array over the places 0 .. 2^D - 1."""
    total = levels[0]
    for level in levels[1:]:
        total = _interleaved(total + level[::2], level[1::2])
    return total


def shifted(ends, at_start: float):
    """Put `at_start` in front of `ends`, and drop the last value of `ends`.

    `ends` has a value for each of the places 1 .. 2^D, and the result for each of the places 0 .. 2^D - 1.
    """
    return jnp.concatenate([jnp.full_like(ends[:1], at_start), ends[:-1]])


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)


def _places_before(B: int, depth: int, dtype) -> jax.Array:
    """Return a_0 [2^D,B], the initial values of the forward algorithm: 0 at place 0, and -inf at all other places."""
    return jnp.full((2**depth, B), -jnp.inf, dtype).at[0].set(0)


def _forward(scores, lengths):
    """Return the log-likelihoods [B], and a_1 .. a_T of the forward algorithm at the places 1 .. 2^D, [T,2^D,B]."""
    T, n, B = scores.shape
    depth = depth_of(n)

    def step(before, own):
        levels = [start + score for start, score in zip(starts_of(before), levels_of(own), strict=True)]
        largest = _finite(reduced_at_ends(jnp.maximum, levels))
        weights = [jnp.exp(x - m) for x, m in zip(levels, ends_of(largest), strict=True)]
        after = largest + jnp.log(reduced_at_ends(jnp.add, weights))
        return shifted(after, -jnp.inf), after

    _, places = jax.lax.scan(step, _places_before(B, depth, scores.dtype), scores)
    result = jnp.take_along_axis(places[:, -1], jnp.clip(lengths - 1, 0, T - 1)[None], axis=0)[0]
    return jnp.where((lengths > 0) & (lengths <= T), result, -jnp.inf), places


@jax.custom_vjp
def _log_likelihood(scores: Float[Array, "T n B"], lengths: Int[Array, " B"]) -> Float[Array, " B"]:
    return _forward(scores, lengths)[0]


def _log_likelihood_forward(scores, lengths):
    result, places = _forward(scores, lengths)
    return result, (scores, lengths, places, result)


def _log_likelihood_backward(saved, cotangent):
    scores, lengths, places, result = saved
    T, n, B = scores.shape
    cotangent = jnp.where(jnp.isfinite(result), cotangent, 0)

    def step(gradients, inputs):
        t, before, own, after = inputs
        is_last = (t == lengths - 1)[None]
        gradients = jnp.concatenate([gradients[:-1], jnp.where(is_last, cotangent[None], gradients[-1:])])
        of_places = zip(starts_of(before), levels_of(own), ends_of(_finite(after)), ends_of(gradients), strict=True)
        posteriors = [jnp.exp(start + score - end) * g for start, score, end, g in of_places]
        starts = _summed_at_starts(posteriors)
        return jnp.concatenate([starts[1:], jnp.zeros_like(starts[:1])]), jnp.concatenate(posteriors)

    first = _places_before(B, depth_of(n), scores.dtype)[None]
    before = jnp.concatenate([first, jax.vmap(partial(shifted, at_start=-jnp.inf))(places[:-1])])
    inputs = (jnp.arange(T), before, scores, places)
    _, posteriors = jax.lax.scan(step, jnp.zeros_like(places[0]), inputs, reverse=True)
    return posteriors, None


_log_likelihood.defvjp(_log_likelihood_forward, _log_likelihood_backward)
