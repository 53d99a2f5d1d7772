"""The trees of a translation as nested indices of words: of its best derivation, and the brackets that a batch needs.

The form of the trees is that of `stickjax.models.ordered_memory.parse`. `stickjax.evaluation.trees` reads them from
text, and writes them as text.
"""

from collections.abc import Iterable

from stickjax.models.ordered_memory.parse import Tree


def derivation_tree(nodes: Iterable[int]) -> Tree:
    """Return the tree of a sentence from its leaves in the complete tree. The words are numbered from left to right.

    `nodes` are the leaves, as in one row of `Derivation.nodes`: the children of node i are 2i + 1 and 2i + 2, and -1
    comes after the last leaf.

    >>> derivation_tree([1, 5, 6, -1])
    (0, (1, 2))
    """
    parts: dict[int, Tree] = {int(node): word for word, node in enumerate(nodes) if node >= 0}
    while len(parts) > 1:
        right = max(parts)  # the last node of the deepest level: its sibling is there too
        parts[right // 2 - 1] = (parts.pop(right - 1), parts.pop(right))
    return parts[0]


def closing_brackets(tree: Tree) -> list[int]:
    """Return the number of brackets that close after each word of a binary tree.

    The numbers are a row of the array `brackets` in a batch for encoder="tree".

    Raises:
      ValueError: a part of the tree has more than two parts.

    >>> closing_brackets((0, (1, 2)))
    [0, 0, 2]
    """
    if isinstance(tree, int):
        return [0]
    if len(tree) != 2:
        raise ValueError(f"a binary tree has two parts in every pair of brackets, not {len(tree)}: {tree}")
    left, right = map(closing_brackets, tree)
    right[-1] += 1
    return left + right
