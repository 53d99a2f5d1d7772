"""Trees as text and as nested tuples: of the best derivation, of the source, and the brackets that a batch needs."""

from collections.abc import Sequence

import numpy as np

from stickjax.models.latent_tree.viterbi import Derivation

# A word, or a pair of the left and the right part.
Tree = str | tuple["Tree", "Tree"]


def derivation_tree(derivation: Derivation, row: int, words: Sequence[str]) -> Tree:
    """Return the best tree of one sentence of a batch.

    Args:
      derivation: the output of `decode`.
      row: the index of the sentence in the batch.
      words: the target words by their ids; words[0] is padding.

    >>> found = Derivation(np.array([[1, 2, 1, 0]]), np.array([[1, 5, 6, -1]]), np.array([3]), np.array([-1.0]))
    >>> derivation_tree(found, 0, ["", "walk", "turn"])
    ('walk', ('turn', 'walk'))
    """
    length = int(derivation.lengths[row])
    parts = {
        int(node): words[int(word)]
        for node, word in zip(derivation.nodes[row][:length], derivation.words[row][:length], strict=True)
    }
    for node in range(max(parts), 0, -2):  # an even node is a right child, and the node before it is its sibling
        node += node % 2
        if node in parts:
            parts[node // 2 - 1] = (parts.pop(node - 1), parts.pop(node))
    return parts[0]


def slot_tree(slots, words: Sequence[str]) -> Tree:
    """Return the tree of the source that the memory of the encoder induces.

    Let d_t be the slot with the highest probability at the word t, and N for the first word. Before the word t is
    added, the last two parts are joined d_t - d_(t-1) + 1 times, as long as there are two. At the end, all parts are
    joined, the last two first.

    Args:
      slots: the distributions [S,N] of the words over the slots (`Production.slots`), for this sentence.
      words: the words of the sentence.

    >>> slot_tree(np.array([[0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]), ["jump", "twice", "and", "walk"])
    (('jump', 'twice'), ('and', 'walk'))
    """
    slots = np.asarray(slots)
    depths = slots[: len(words)].argmax(-1)
    before, stack = slots.shape[-1] - 1, [words[0]]
    for word, depth in zip(words[1:], depths[1:].tolist(), strict=True):
        for _ in range(depth - before + 1):
            if len(stack) > 1:
                _join(stack)
        stack.append(word)
        before = depth
    while len(stack) > 1:
        _join(stack)
    return stack[0]


def _join(stack: list) -> None:
    right = stack.pop()
    stack[-1] = (stack[-1], right)


def bracketed(tree: Tree) -> str:
    """Return a tree as text with a pair of brackets around every two parts.

    >>> bracketed(("walk", ("turn", "walk")))
    '( walk ( turn walk ) )'
    """
    return tree if isinstance(tree, str) else f"( {bracketed(tree[0])} {bracketed(tree[1])} )"


def leaves(tree: Tree) -> list[str]:
    """Return the words of a tree, from left to right.

    >>> leaves(("walk", ("turn", "walk")))
    ['walk', 'turn', 'walk']
    """
    return [tree] if isinstance(tree, str) else leaves(tree[0]) + leaves(tree[1])


def read_brackets(text: str) -> tuple[list[str], list[int]]:
    """Return the words of a bracketed binary tree, and the number of brackets that close after each word.

    The numbers are a row of the array `brackets` in a batch for encoder="tree".

    Raises:
      ValueError: the brackets are not those of a binary tree.

    >>> read_brackets("( walk ( turn left ) )")
    (['walk', 'turn', 'left'], [0, 0, 2])
    """
    stack, words, closing = [], [], []
    for token in text.split():
        if token == ")":
            if len(stack) < 3 or stack[-3:] != ["(", "part", "part"]:
                raise ValueError(f"a bracket of {text!r} does not have exactly two parts")
            stack[-3:] = ["part"]
            closing[-1] += 1
        elif token == "(":
            stack.append(token)
        else:
            stack.append("part")
            words.append(token)
            closing.append(0)
    if stack != ["part"]:
        raise ValueError(f"{text!r} is not one binary tree: a pair of brackets must enclose every two parts")
    return words, closing
