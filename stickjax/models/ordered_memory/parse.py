"""The binary tree that an Ordered Memory encoder induces over the tokens of a sentence."""

from collections.abc import Sequence

import numpy as np

Tree = int | tuple["Tree", ...]


def induced_depths(p: np.ndarray) -> list[int]:
    """Return for each of the T tokens of a sentence the number, 1 .. N, of the memory slot that the token used most.

    `p` [T,N] has the distribution of every token over the N slots, without rows for padding. The first token has the
    number N, whatever its distribution is: the memory is empty before it.
    """
    return [p.shape[1], *(1 + int(i) for i in p[1:].argmax(1))]


def tree_of_depths(depths: Sequence[int]) -> Tree:
    """Return the binary tree over the words 0 .. T-1. A tree is the index of a word, or a pair of trees.

    `depths` has the number of the memory slot that each word used, as `induced_depths` returns it.

    The words are pushed onto a stack, one after the other. Let d be the slot of a word, and d' the slot of the previous
    word. Before the word is pushed, the two topmost phrases of the stack are joined d - d' + 1 times, or until the
    stack has only one phrase. After the last word, all phrases are joined, from the top of the stack down.

    For d = d' - 1, nothing is joined. So if the slot decreases by one from word to word, the tree branches to the
    right. If all slots are equal, the tree branches to the left.

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
    """Return the binary tree over the T tokens of a sentence. `p` [T,N] has each token's distribution over N slots."""
    return tree_of_depths(induced_depths(p))
