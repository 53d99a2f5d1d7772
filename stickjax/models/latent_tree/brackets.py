"""Convert the brackets of a binary tree to the pairs of subtrees that the brackets join."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def joins_of(
    brackets: Int[Array, "B S"], mask: Bool[Array, "B S"]
) -> tuple[Int[Array, "B S-1 2"], Bool[Array, "B S-1"]]:
    """Return which two subtrees each closing bracket of a binary tree joins, for B sentences of up to S words.

    The subtrees have numbers. Word w alone is the subtree w, from 0 to S - 1. Join k, counted from 0, makes the subtree
    S + k. The joins are in the order in which the brackets close.

    Args:
      brackets: the number of brackets that close after each word. Each bracket joins the last two subtrees that are not
        yet part of another subtree.
      mask: False for padding. Brackets at padding have no effect.

    Returns:
      The numbers of the left and the right subtree of every join, and a mask of the joins that exist: a sentence of n
      words has n - 1 joins.

    >>> joins_of(jnp.array([[0, 0, 2, 0]]), jnp.array([[True, True, True, False]]))[0].tolist()  # ( a ( b c ) )
    [[[1, 2], [0, 4], [0, 0]]]
    """
    B, S = brackets.shape
    rows, lengths = jnp.arange(B), mask.sum(1)
    closed = jnp.cumsum(jnp.where(mask, brackets, 0), axis=1)

    def step(_, state):
        """Join the last two subtrees if fewer joins are done than brackets have closed. Else read the next word."""
        stack, size, read, done, pairs = state
        is_join = (done < closed[rows, read - 1]) & (size > 1)
        left, right = stack[rows, size - 2], stack[rows, size - 1]
        pairs = pairs.at[rows, jnp.where(is_join, done, S)].set(jnp.stack([left, right], 1), mode="drop")
        place = jnp.where(is_join, size - 2, size)
        stack = stack.at[rows, place].set(jnp.where(is_join, S + done, read), mode="drop")
        return stack, place + 1, read + ~is_join, done + is_join, pairs

    zeros = jnp.zeros(B, int)
    state = (jnp.zeros((B, S), int), zeros, zeros, zeros, jnp.zeros((B, S - 1, 2), int))
    pairs = jax.lax.fori_loop(0, 2 * S - 1, step, state)[-1]
    is_join = jnp.arange(S - 1)[None] < lengths[:, None] - 1
    return jnp.where(is_join[..., None], pairs, 0), is_join
