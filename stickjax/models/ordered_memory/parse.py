"""The binary tree that an Ordered Memory encoder induces over the tokens of a sentence."""

from collections.abc import Sequence

import numpy as np

Tree = int | tuple["Tree", ...]


def induced_depths(p: np.ndarray) -> list[int]:
    """Return the slot that each token of a sentence used most, counted from 1, from its distributions `p` [T,N].

    The first token counts as one that used the highest slot, N. `p` must not contain padding.
    """
    return [p.shape[1], *(1 + int(i) for i in p[1:].argmax(1))]


def tree_of_depths(depths: Sequence[int]) -> Tree:
    """Return the binary tree over the words 0 .. T-1 for the slots that they used (`induced_depths`).

    The words are pushed onto a stack, one after the other. A word that uses slot d first joins the phrases below d: if
    the word before it used slot d', the two topmost phrases of the stack are joined d - d' + 1 times, as long as there
    are two. After the last word, all phrases are joined, from the top.

    A word that goes one slot down joins nothing. So slots that fall by one give a tree that branches to the right, and
    equal slots give a tree that branches to the left.

    >>> tree_of_depths([4, 3, 2]), tree_of_depths([4, 4, 4])
    ((0, (1, 2)), ((0, 1), 2))
    """
    stack: list[Tree] = [0]

    def join():
        right = stack.pop()
        stack.append((stack.pop(), right))

    for word, (before, depth) in enumerate(zip(depths, depths[1:], strict=False), 1):
        for _ in range(depth - before + 1):
            if len(stack) > 1:
                join()
        stack.append(word)
    while len(stack) > 1:
        join()
    return stack[0]


def induced_tree(p: np.ndarray) -> Tree:
    """Return the binary tree of a sentence from the distributions `p` [T,N] of its tokens, without padding."""
    return tree_of_depths(induced_depths(p))
