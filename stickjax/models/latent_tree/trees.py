"""Convert the leaves of a derivation to a tree.

A tree is the index of a word, or a tuple of trees, such as (0, (1, 2)). `stickjax.evaluation.trees` reads trees from
text, and writes them as text.
"""

from collections.abc import Iterable

from stickjax.models.ordered_memory.parse import Tree


def derivation_tree(nodes: Iterable[int]) -> Tree:
    """Return the tree over the words 0 .. T-1 of a sentence, from its leaves.

    The leaves are nodes of a complete binary tree, in which the children of node i are 2i + 1 and 2i + 2. `nodes` has
    the numbers of the leaves from left to right, as in one row of `Derivation.nodes`. Values of -1 after
    the last leaf are padding, and are ignored.

    >>> derivation_tree([1, 5, 6, -1])
    (0, (1, 2))
    """
    parts: dict[int, Tree] = {int(node): word for word, node in enumerate(nodes) if node >= 0}
    while len(parts) > 1:
        right = max(parts)  # the last node of the deepest level is a right child, so its sibling is in `parts` too
        parts[right // 2 - 1] = (parts.pop(right - 1), parts.pop(right))
    return parts[0]
