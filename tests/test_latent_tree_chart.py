"""Test `log_likelihood` (the sum over binary trees) and `viterbi` (the best tree) against lists of all trees.

Another test adds up the probabilities of all sentences of a random grammar. The sum must be the probability that a
derivation of the grammar fits into the complete tree.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stickjax.models.latent_tree.chart import (
    edges,
    in_order,
    intervals,
    log_likelihood,
    log_likelihood_reference,
    trees,
)
from stickjax.models.latent_tree.viterbi import viterbi


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def drawn(*shape, scale=3.0, seed=0):
    return scale * jax.random.normal(jax.random.key(seed), shape, jax.dtypes.canonicalize_dtype(float))


def test_the_trees_with_four_leaves():
    """`trees` finds the same five trees as the test in the code of the paper (arXiv 2010.04704).

    That test numbers the nodes from left to right.
    """
    number = np.argsort(in_order(3))
    found = [tuple(number[list(tree)].tolist()) for tree in trees(3, 4)]
    assert sorted(found) == [(0, 2, 5, 11), (1, 4, 6, 11), (1, 5, 9, 13), (3, 8, 10, 13), (3, 9, 12, 14)]


@pytest.mark.parametrize("depth, count", [(1, 1), (3, 21), (8, 1434)])
def test_the_edges(depth, count):
    """`edges` returns all pairs of nodes whose intervals are next to each other.

    In each pair, the first node is on the right edge of the left subtree of an inner node, and the second node is on
    the left edge of its right subtree.
    """

    def spine(node, child):
        while node < 2 ** (depth + 1) - 1:
            yield node
            node = 2 * node + child

    expected = [
        pair
        for node in range(2**depth - 1)
        for pair in itertools.product(spine(2 * node + 1, 2), spine(2 * node + 2, 1))
    ]
    assert sorted(edges(depth)) == sorted(expected) and len(expected) == count


@pytest.mark.parametrize("depth", [pytest.param(3, marks=pytest.mark.exhaustive), 4])
def test_the_sum_over_trees_and_its_gradient(depth, x64):
    """For sentences of different lengths in one batch, the sum and its gradient equal `log_likelihood_reference`.

    The scores after the end of a sentence have no effect.
    """
    n, lengths = 2 ** (depth + 1) - 1, jnp.array([3, 1, 6, 2, 5, 4])
    scores, weights = drawn(6, n, 6), drawn(6, seed=1)

    @partial(jax.value_and_grad, has_aux=True)
    def weighted(scores):
        values = log_likelihood(scores, lengths)
        return (weights * values).sum(), values

    (found, values), gradient = jax.device_get(jax.jit(weighted)(scores))
    for b, T in enumerate(lengths.tolist()):
        value, expected = jax.value_and_grad(log_likelihood_reference)(scores[b, :, :T])
        np.testing.assert_allclose(values[b], value, rtol=1e-12)
        np.testing.assert_allclose(gradient[b, :, :T], weights[b] * np.asarray(expected), atol=1e-12)
        assert not gradient[b, :, T:].any()
    np.testing.assert_allclose(found, (weights * values).sum(), rtol=1e-12)


def test_the_gradient_is_that_of_finite_differences(x64):
    scores, lengths, step = drawn(2, 15, 5), jnp.array([5, 3]), 1e-5
    direction = drawn(2, 15, 5, seed=1)
    f = lambda s: log_likelihood(s, lengths).sum()  # noqa: E731
    difference = (f(scores + step * direction) - f(scores - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(jax.grad(f)(scores), direction), difference, rtol=1e-8)


@pytest.mark.parametrize("T", [48, 256])
def test_extreme_scores_stay_finite(T):
    """Scores of +-50 give a finite log-likelihood and gradient in float32 at depth 8.

    A tree of depth 8 has at most 256 leaves. So a sentence of 256 words has only one tree, the complete one. Its leaves
    are all nodes of the last level.
    """
    scores = 50 * jnp.sign(drawn(3, 511, T))
    lengths = jnp.array([T, T - 1, 1])
    values, gradient = jax.value_and_grad(lambda s: log_likelihood(s, lengths).sum())(scores)
    assert jnp.isfinite(values) and jnp.isfinite(gradient).all()
    np.testing.assert_allclose(gradient.sum(1), jnp.arange(T)[None] < lengths[:, None], atol=1e-3)
    if T == 256:
        only = log_likelihood(scores, lengths)[0]
        np.testing.assert_allclose(only, scores[0, 255:].diagonal().sum(), rtol=1e-6)


def test_sentences_without_a_tree_have_no_likelihood_and_no_gradient():
    scores = drawn(3, 7, 5).at[2].set(-jnp.inf)
    lengths = jnp.array([0, 5, 2])  # five words do not fit in four leaves
    assert (log_likelihood(scores, lengths) == -jnp.inf).all()
    assert not jax.grad(lambda s: log_likelihood(s, lengths).sum())(scores).any()
    with pytest.raises(ValueError, match="8 nodes are not a complete binary tree"):
        log_likelihood(drawn(1, 8, 2), jnp.array([2]))


def grammar(depth, V, seed):
    """Return random scores [n,V] of a tree-shaped grammar, and the probability that a derivation fits in the depth.

    Every node is a leaf with its own probability; otherwise it splits into two children. A derivation fits if no node
    of the last level splits. The score of a tree is the sum of the scores of its leaves. So the log-probability of a
    split must be added to the scores of the leaves below it: each child takes half of the parent's log-probability to
    split, and half of what the parent itself took.
    """
    n = 2 ** (depth + 1) - 1
    rng = np.random.default_rng(seed)
    leaf, words = rng.uniform(0.1, 0.9, n), np.log(rng.dirichlet(np.ones(V), n))
    shared, mass = np.zeros(n), leaf.copy()
    for i in range(1, n):
        parent = (i - 1) // 2
        shared[i] = (shared[parent] + np.log1p(-leaf[parent])) / 2
    for i in reversed(range(n // 2)):
        mass[i] += (1 - leaf[i]) * mass[2 * i + 1] * mass[2 * i + 2]
    return jnp.asarray(words + (np.log(leaf) + shared)[:, None]), mass[0]


@pytest.mark.parametrize("depth, V, seed", [(1, 3, 0), (2, 3, 1), (3, 2, 2), (3, 2, 3)])
def test_all_sentences_have_the_mass_of_the_derivations_that_fit(depth, V, seed, x64):
    scores, mass = grammar(depth, V, seed)
    longest = 2**depth
    sentences = [own for T in range(1, longest + 1) for own in itertools.product(range(V), repeat=T)]
    padded = np.array([own + (0,) * (longest - len(own)) for own in sentences])
    values = log_likelihood(np.asarray(scores)[:, padded].swapaxes(0, 1), np.array([len(own) for own in sentences]))
    np.testing.assert_allclose(np.exp(values).sum(), mass, rtol=1e-12)
    assert mass < 1


@pytest.mark.parametrize("limit", [1, 3, 5, 99])
def test_the_best_tree_is_the_best_of_all_trees(limit, x64):
    depth, V = 3, 4
    scores = drawn(5, 15, V) - 1
    found = viterbi(scores, limit)
    T = min(limit, 2**depth)
    assert found.words.shape == found.nodes.shape == (5, T)
    own = scores[..., 1:].max(-1)
    everything = [tree for t in range(1, T + 1) for tree in trees(depth, t)]
    for b in range(5):
        best = max(everything, key=lambda tree, b=b: float(own[b, jnp.array(tree)].sum()))
        assert found.lengths[b] == len(best)
        assert tuple(found.nodes[b].tolist()) == best + (-1,) * (T - len(best))
        words = (scores[b, jnp.array(best), 1:].argmax(-1) + 1).tolist()
        assert found.words[b].tolist() == words + [0] * (T - len(best))
        np.testing.assert_allclose(found.scores[b], own[b, jnp.array(best)].sum(), rtol=1e-12)


def test_ties_have_one_winner():
    """If scores are equal, `viterbi` chooses the smallest word id other than 0, and the tree with the fewest leaves."""
    scores = jnp.zeros((1, 15, 3))
    found = viterbi(scores, 8)
    assert found.words[0].tolist() == [1] + [0] * 7 and found.nodes[0].tolist() == [0] + [-1] * 7
    found = viterbi(scores.at[:, 0].set(-1), 8)
    assert found.nodes[0, :3].tolist() == [1, 2, -1]
    with pytest.raises(ValueError, match="V=1 must be at least 2"):
        viterbi(scores[..., :1], 8)


def test_the_intervals_tile_the_line_in_every_tree():
    starts, ends = intervals(4)
    for tree in itertools.chain.from_iterable(trees(4, T) for T in range(1, 7)):
        assert starts[tree[0]] == 0 and ends[tree[-1]] == 16
        assert (ends[list(tree[:-1])] == starts[list(tree[1:])]).all()
    counts = np.zeros(17, int)
    counts[0] = 1
    for _ in range(5):  # there are as many paths of 5 nodes as trees with 5 leaves
        new = np.zeros_like(counts)
        np.add.at(new, ends, counts[starts])
        counts = new
    assert counts[16] == len(list(trees(4, 5))) == 14
