"""Ordered trees over the words of a sentence: read them, print them, draw them, and compare them by unlabelled F1.

A tree is the index of a word, or a tuple of trees, which are the children of a node. For example, the tree (0, (1, 2))
has a node with the children word 1 and word 2. The children of its root are word 0 and this node.
"""

from collections.abc import Callable, Iterable, Sequence

from stickjax.evaluation.plots import save
from stickjax.models.ordered_memory.parse import Tree


def from_brackets(words: Sequence[str], opening: str = "(", closing: str = ")") -> tuple[Tree, list[str]]:
    """Return (the tree that the brackets of a sentence describe, the words of the sentence without the brackets).

    `words` are the words and brackets of the sentence, in order. `opening` and `closing` are the opening and
    the closing bracket.

    Raises ValueError if the brackets do not match, or if the sentence has no word.

    >>> from_brackets("( a ( and b ) )".split())
    ((0, (1, 2)), ['a', 'and', 'b'])
    """
    stack: list[list] = [[]]
    kept: list[str] = []
    for word in words:
        if word == opening:
            stack.append([])
        elif word == closing:
            if len(stack) == 1:
                raise ValueError(f"a bracket {closing!r} closes no bracket in: {' '.join(words)}")
            node = stack.pop()
            stack[-1].append(_node(node))
        else:
            stack[-1].append(len(kept))
            kept.append(word)
    if len(stack) > 1:
        raise ValueError(f"a bracket {opening!r} is not closed in: {' '.join(words)}")
    if not kept:
        raise ValueError(f"there is no word besides the brackets in: {' '.join(words)}")
    return _node(stack[0]), kept


def _node(children: list) -> Tree:
    return children[0] if len(children) == 1 else tuple(children)


def restricted(tree: Tree, keep: Callable[[int], bool]) -> Tree | None:
    """Return the tree without the words for which `keep(index)` is False; None if no word remains.

    The remaining words get new indices, from 0. A node with only one remaining child is replaced by this child.

    >>> restricted(((0, 1), (2, 3)), lambda i: i != 1)
    (0, (1, 2))
    """
    number = {old: new for new, old in enumerate(i for i in leaves(tree) if keep(i))}

    def reduced(node: Tree) -> Tree | None:
        if isinstance(node, int):
            return number.get(node)
        children = [child for part in node if (child := reduced(part)) is not None]
        return _node(children) if children else None

    return reduced(tree)


def leaves(tree: Tree) -> list[int]:
    """Return the indices of the words of a tree, from left to right."""
    return [tree] if isinstance(tree, int) else [i for part in tree for i in leaves(part)]


def spans(tree: Tree) -> set[tuple[int, int]]:
    """Return the set of spans of a tree: (index of the first word, index of the last word) for every inner node.

    >>> sorted(spans((0, (1, 2))))
    [(0, 2), (1, 2)]
    """
    if isinstance(tree, int):
        return set()
    words = leaves(tree)
    return {(words[0], words[-1])}.union(*map(spans, tree))


def f1(pairs: Iterable[tuple[Tree, Tree]]) -> float:
    """Return the unlabelled F1 of predicted trees: 2 * matches / (spans of the predictions + spans of the true trees).

    A match is a span that is in both trees of a pair. `pairs` are (predicted tree, true tree) of the same words. The
    spans are counted over all pairs together. The span of a whole sentence counts too, as in the usual evaluation of
    parsers. If there are no spans, the result is 1.

    >>> f1([(((0, 1), 2), (0, (1, 2)))])  # of two spans each, only the whole sentence matches
    0.5
    """
    matches = total = 0
    for predicted, true in pairs:
        a, b = spans(predicted), spans(true)
        matches, total = matches + 2 * len(a & b), total + len(a) + len(b)
    return matches / total if total else 1.0


def bracketed(tree: Tree, words: Sequence[str]) -> str:
    """Return a tree as text: its words, with brackets around every inner node.

    >>> bracketed((0, (1, 2)), ["a", "and", "b"])
    '(a (and b))'
    """
    return words[tree] if isinstance(tree, int) else f"({' '.join(bracketed(part, words) for part in tree)})"


def height(tree: Tree) -> int:
    """Return the number of nodes above the deepest word: 0 for a tree that is a single word."""
    return 0 if isinstance(tree, int) else 1 + max(map(height, tree))


def plot_trees(trees: Sequence[tuple[Tree, Sequence[str], str]], path) -> None:
    """Draw trees below each other, and write the picture to `path`. `trees` is a list of (tree, words, title)."""
    from matplotlib.figure import Figure

    sizes = [0.35 * height(tree) + 0.9 for tree, *_ in trees]
    width = max(3.0, 0.6 * max(len(words) for _, words, _ in trees))
    page = Figure(figsize=(width, sum(sizes)), dpi=150, layout="constrained")
    panels = page.subplots(len(trees), 1, height_ratios=sizes, squeeze=False)[:, 0]
    for axes, (tree, words, title) in zip(panels, trees, strict=True):
        _draw(axes, tree)
        for i in leaves(tree):
            axes.text(i, -0.25, words[i], ha="center", va="top", fontsize=9)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set(xlim=(-0.6, len(words) - 0.4), ylim=(-1.1, height(tree) + 0.3))
        axes.set_axis_off()
    save(page, path)


def _draw(axes, tree: Tree) -> tuple[float, int]:
    """Draw the lines of a tree, and return the position of its top: (x, height). Words stand at height 0."""
    if isinstance(tree, int):
        return tree, 0
    tops = [_draw(axes, part) for part in tree]
    x, y = sum(x for x, _ in tops) / len(tops), height(tree)
    for child_x, child_y in tops:
        axes.plot([x, child_x], [y, child_y], color="tab:blue", linewidth=1.2)
    return x, y
