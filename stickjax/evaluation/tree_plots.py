"""Draw the latent tree of a generated sentence, and the attention of its leaves to the words of the source."""

from collections.abc import Sequence

import numpy as np

from stickjax.evaluation.plots import label, save


def plot_derivation(nodes: Sequence[int], words: Sequence[str], path, *, source=(), attention=None) -> None:
    """Draw the tree of the best derivation of a sentence, and the attention of the leaves to the words of the source.

    Args:
      nodes: the index of each leaf in the complete binary tree, from left to right. The root has the index 0, and node
        i has the children 2i + 1 and 2i + 2.
      words: the word of every leaf.
      path: where to write the picture.
      source: the words of the source, for the attention.
      attention: the attention weights [n,S] of the n nodes of the complete tree to the S source words, drawn below the
        tree. They are the field `attention` of `latent_tree.Production` for one sentence. None: they are not drawn.

    Raises ValueError if `nodes` and `words` differ in length.
    """
    from matplotlib.figure import Figure

    nodes = [int(node) for node in nodes]
    if len(nodes) != len(words):
        raise ValueError(f"there are {len(nodes)} leaves but {len(words)} words; give one word for each leaf")
    places = _places(nodes)
    depth = max((node + 1).bit_length() for node in nodes)
    rows = 1 if attention is None else 2
    height = 1.0 + 0.35 * depth + (0 if attention is None else 0.6 + 0.25 * len(source))
    page = Figure(figsize=(1.5 + 0.6 * len(nodes), height), dpi=150, layout="constrained")
    ratios = [1.0 + 0.35 * depth] if rows == 1 else [1.0 + 0.35 * depth, 0.6 + 0.25 * len(source)]
    panels = page.subplots(rows, 1, squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
    for node, (x, y) in places.items():
        if node:
            above = places[(node - 1) // 2]
            panels[0].plot([above[0], x], [above[1], y], color="C0", linewidth=1)
    for (x, y), word in zip((places[node] for node in nodes), words, strict=True):
        panels[0].plot([x, x], [y, -depth], ":", color="C0", linewidth=0.8)
        panels[0].text(x, -depth - 0.1, label(word), rotation=45, ha="right", va="top", fontsize="small")
    panels[0].set(xlim=(-0.7, len(nodes) - 0.3), ylim=(-depth - 2.5, 0.3))
    panels[0].axis("off")
    if attention is not None:
        weights = np.asarray(attention)[nodes, : len(source)].T
        panels[1].imshow(weights, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panels[1].set_yticks(range(len(source)), [label(word) for word in source], fontsize="small")
        panels[1].set_xticks([])
        panels[1].set_ylabel("attention to the source")
    save(page, path)


def _places(leaves: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Return {node: (x, y)}, the position at which each node of a tree is drawn. The root has y = 0, and its
    descendants at depth d have y = -d.

    `leaves` are the indices of the leaves in the complete binary tree. Leaf number i from the left, counted from 0, has
    x = i. The x of any other node is the mean of the x of its two children.

    >>> _places([1, 5, 6])[0]
    (0.75, 0.0)
    """
    places = {node: (float(x), 1.0 - (node + 1).bit_length()) for x, node in enumerate(leaves)}
    for node in sorted(
        {(leaf + 1 >> k) - 1 for leaf in leaves for k in range(1, (leaf + 1).bit_length())}, reverse=True
    ):
        x = (places[2 * node + 1][0] + places[2 * node + 2][0]) / 2
        places[node] = (x, 1.0 - (node + 1).bit_length())
    return places
