"""Convert the tensors of a Hugging Face folder to the parameters of stickjax and back: their names and their axes.

In this file, a tensor is an array of a Hugging Face folder, and a leaf is a parameter of the stickjax model. A tensor
inside a layer belongs to one layer; its leaf has the values of all layers, with a leading axis L. Every supported
`model_type` has a table, and every row of a table maps a tensor to a leaf. `theirs` is the name of the tensor, where {}
stands for the index of the layer. `ours` is the name of the leaf. `axes` are the axes of the tensor; the module
`stickjax.models.parameters` has the axes of the leaf.

Axes are written as in "NH D": spaces separate the axes, and every letter is a size. Several letters together are one
axis, whose last letter varies fastest. For example, a tensor with the axes "NH D" becomes a leaf with the axes "D N H".
Most letters are fields of ModelConfig. These are not:

E: the number of feed-forward experts.
A: the number of attention experts.
R: the hidden width of the router of the feed-forward experts (`experts.hidden`).
S: the hidden width of the router of the attention experts (`attention_experts.hidden`).
W: the width of the shared expert (`experts.shared`).

A digit is also a size. For example, the axis "2F" of a gated feed-forward network has 2 * F entries: F values of the
gate, then the F values that the gate multiplies. If only the tensor or only the leaf has the digit 2, then a row of the
table maps one of the two halves: `part` is 0 for the first half, and 1 for the second. Some model types have one tensor
for each feed-forward expert. Then `expert` is the index of the expert, and only the leaf has the axis E.

Three more letters occur only in the tables of the type stickbreaking:

P and Q: a tensor with the axis "KPH" has P = N / K + 2 heads for each of the K key heads: first Q = N / K query heads,
  then the key head and the value head. A row maps one of these P heads, and `part` is its index on the axis P. In the
  leaf of the queries, the axis N is written as "KQ", and `part` is also the index on the axis Q.
U: the size 2. The tensor has the two halves of the leaf in the opposite order. So the index on U is 1 - `part`.
"""

import functools
import operator

import jax
import numpy as np

from stickjax.config import ModelConfig
from stickjax.config.fields import nearest, one_of
from stickjax.models.layers import gates
from stickjax.models.parameters import axes_by_name
from stickjax.models.transformer import init
from stickjax.storage.hugging_face.files import Lazy
from stickjax.storage.hugging_face.tables import TABLES, Row


def table(model_type: str, c: ModelConfig) -> list[Row]:
    """Return the table that converts a Hugging Face model to a stickjax model: each row maps a tensor to a leaf.

    A tensor is an array of a Hugging Face folder, and a leaf is a parameter of the stickjax model. Several rows can map
    parts of one tensor to different leaves, and several tensors can fill parts of one leaf. In the rows that
    are returned, `axes` also has the axes of the leaf in one layer: "NH D" becomes "NH D -> D N H".

    Raises:
      ValueError: there is no table for the model type; a row names a leaf that the model does not have; or the axes of
        the tensor and the axes of the leaf in a row have different letters.
    """
    one_of("model_type", model_type, tuple(TABLES))
    model = jax.eval_shape(lambda: init(c, jax.random.key(0)))
    known = {name.replace(".", "/"): _sizes(c, name, axes) for name, axes in axes_by_name(model).items()}
    return [row._replace(axes=f"{row.axes} -> {_checked(row, known)}") for row in TABLES[model_type](c)]


def _checked(row: Row, known: dict[str, str]) -> str:
    """Check a row of a table, and return the axes of its leaf, the stickjax parameter.

    `known` is {name of a leaf: its axes} for all leaves of the model. Raise ValueError if the model does not have the
    leaf of the row, or if the axes of the tensor and the axes of the leaf have different letters.
    """
    if row.ours not in known:
        raise ValueError(
            f"the table row for the tensor {row.theirs} has an unknown parameter {row.ours!r}{nearest(row.ours, known)}"
        )
    own = row.axes if row.expert is None else f"E {row.axes}"
    leaf = known[row.ours].replace("N", "KQ") if "P" in row.axes else known[row.ours]
    theirs, ours = (sorted(x for x in axes if x.isalpha() and x not in "PQU") for axes in (own, leaf))
    if theirs != ours:
        raise ValueError(
            f"the table row for the tensor {row.theirs} has the axes {row.axes!r}, but the parameter {row.ours} has "
            f"the axes {leaf!r}; both must consist of the same letters"
        )
    return leaf


def _sizes(c: ModelConfig, name: str, axes: str) -> str:
    """Return the axes of a leaf (stickjax parameter) in the letters of this file.

    `name` is the name of the leaf, and `axes` are its axes in the letters of `stickjax.models.parameters`. The
    following letters are replaced:

    `E`, `C`: the axis of the experts, and the axis of the router columns. Both become A in an attention layer, and E in
      a feed-forward network.
    `G`: the number of inputs of the activation. It becomes a digit: 2 for a gated activation, otherwise 1.
    `R`: the number of inputs of the router's last matrix. A linear router has only this matrix, so R becomes D, the
      model width. For any other router, R becomes S in an attention layer, and stays R in a feed-forward network.
    """
    in_attention = name.startswith("blocks.attention.")
    experts, hidden, mixture = ("A", "S", c.attention_experts) if in_attention else ("E", "R", c.experts)
    sizes = {"E": experts, "C": experts, "G": str(gates(c)), "R": "D" if mixture.network == "linear" else hidden}
    return " ".join(sizes.get(axis, axis) for axis in axes.split())


# {end of a name that transformers 5 writes: end of the published name} for the experts and routers of granitemoe.
# Versions 4 and 5 of transformers both read the published names.
_RENAMED = {
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
}


def published(name: str) -> str:
    """Return the published name of a tensor: its name in the Hugging Face folder of the model's authors.

    `name` is the published name, or the name that transformers 5 writes. For most tensors, the two names are equal.

    >>> published("model.layers.3.block_sparse_moe.experts.down_proj")
    'model.layers.3.block_sparse_moe.output_linear.weight'
    """
    for new, old in _RENAMED.items():
        name = name.removesuffix(new) + old if name.endswith(new) else name
    return name


def axes(row: Row) -> tuple[str, str]:
    """Return (axes of the tensor, axes of the leaf in one layer) for a row of a table.

    The function `table` returns the table. A tensor is an array of a Hugging Face folder, and a leaf is a parameter of
    the stickjax model.
    """
    theirs, ours = row.axes.split(" -> ")
    return theirs, ours


def shape(config: ModelConfig, layout: str) -> tuple[int, ...]:
    """Return the shape of an array with the axes `layout`, such as "2KH D", in a model with the config `config`.

    The size of an axis is the product of the sizes of its letters and digits: 2 * K * H for the axis "2KH".

    >>> shape(ModelConfig(D=24, K=2, H=8), "2KH D")
    (32, 24)
    """
    return tuple(int(np.prod([_size(config, letter) for letter in axis])) for axis in layout.split())


def _size(config: ModelConfig, letter: str) -> int:
    if letter.isdigit():
        return int(letter)
    if letter in "PQU":
        return {"P": config.N // config.K + 2, "Q": config.N // config.K, "U": 2}[letter]
    names = {
        "A": "attention_experts.E", "E": "experts.E", "R": "experts.hidden", "S": "attention_experts.hidden",
        "W": "experts.shared", "V": "vocabulary",
    }  # fmt: skip
    return operator.attrgetter(names.get(letter, letter))(config)


def _place(config: ModelConfig, target: np.ndarray, to: str, source: np.ndarray, of: str, row: Row) -> None:
    """Copy the array `source` into the array `target`, with the axes in the order of `target`.

    `of` are the axes of `source`, and `to` are the axes of `target`, as in "NH D". Here every letter and every digit is
    an axis of its own. An axis of both arrays is copied whole. If only one array has an axis, only one index of this
    axis is read or written: `row.expert` for E, 1 - `row.part` for U, and `row.part` for any other axis.
    """
    to, of = to.replace(" ", ""), of.replace(" ", "")

    def common(array: np.ndarray, own: str, other: str) -> np.ndarray:
        """Return a view of `array` with one axis for every letter or digit that is in both `own` and `other`.

        `own` are the letters and digits of `array`, and `other` are the letters and digits of the other array. An axis
        that is only in `own` is left out: the view has only the index that `_place` explains.
        """
        view = array.reshape([_size(config, letter) for letter in own])
        index = {"E": row.expert, "U": 1 - row.part}
        return view[tuple(slice(None) if letter in other else index.get(letter, row.part) for letter in own)]

    if target.dtype == source.dtype:  # copied as integers, because NumPy copies bfloat16 slowly
        target, source = (x.view(f"u{x.itemsize}") for x in (target, source))
    order = [letter for letter in of if letter in to]
    source = common(source, of, to).transpose([order.index(letter) for letter in to if letter in of])
    common(target, to, of)[...] = source


def _numbered(table: list[Row], config: ModelConfig) -> dict[str, tuple[int | None, list[Row]]]:
    """Return {name of a tensor: (index of its layer, its rows in `table`)}, in the order of the layers.

    A tensor is an array of a Hugging Face folder. The index is None for a tensor that belongs to no layer, such as the
    embedding. A tensor has several rows if it contains several stickjax parameters.
    """
    found: dict[str, tuple[int | None, list[Row]]] = {}
    for i in range(config.L):
        for row in table:
            number = i if "{}" in row.theirs else None
            if i == 0 or number is not None:
                found.setdefault(row.theirs.format(i), (number, []))[1].append(row)
    return found


def tensor_shapes(table: list[Row], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of all tensors that a Hugging Face folder must have for a model with this config.

    `table` is the result of the function `table` for the model type.
    """
    return {name: shape(config, axes(rows[0])[0]) for name, (_, rows) in _numbered(table, config).items()}


def leaves_from_tensors(table: list[Row], config: ModelConfig, tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """Convert the tensors of a Hugging Face folder to the parameters of the stickjax model: {name: parameter}.

    `tensors` is {name: tensor}. `table` is the result of the function `table`. A tensor is read only when its parameter
    is read.
    """

    def leaf(rows: list[Row]) -> Lazy:
        own, dtype = shape(config, axes(rows[0])[1]), np.dtype(config.param_dtype)

        def layer(i: int | None) -> np.ndarray:
            out = np.empty(own, dtype)
            for row in rows:
                theirs, ours = axes(row)
                _place(config, out, ours, tensors[row.theirs.format(i)].read(None), theirs, row)
            return out

        if "{}" not in rows[0].theirs:
            return Lazy(own, dtype, layer)

        def read(i: int | None) -> np.ndarray:
            if i is not None:
                return layer(i)
            out = np.empty((config.L, *own), dtype)
            for i in range(config.L):
                out[i] = layer(i)
            return out

        return Lazy((config.L, *own), dtype, read, stacked=True)

    return {name: leaf([row for row in table if row.ours == name]) for name in dict.fromkeys(r.ours for r in table)}


def tensors_from_leaves(table: list[Row], config: ModelConfig, leaves: dict[str, Lazy]) -> dict[str, Lazy]:
    """Convert the parameters of a stickjax model to the tensors of a Hugging Face folder: {name: tensor}.

    `leaves` is {name: parameter}. The tensors are in the order of the layers. `table` is the result of the function
    `table`. A parameter is read only when one of its tensors is read.
    """

    @functools.lru_cache(maxsize=1)  # a layer of experts is read once, not once for each expert
    def leaf(name: str, number: int | None) -> np.ndarray:
        return leaves[name].read(number)

    def tensor(number: int | None, rows: list[Row]) -> Lazy:
        own, dtype = shape(config, axes(rows[0])[0]), leaves[rows[0].ours].dtype

        def read(_: None) -> np.ndarray:
            out = np.empty(own, dtype)
            for row in rows:
                theirs, ours = axes(row)
                whole = leaves[row.ours].read(number) if row.expert is None else leaf(row.ours, number)
                _place(config, out, theirs, whole, ours, row)
            return out

        return Lazy(own, dtype, read)

    return {name: tensor(*entry) for name, entry in _numbered(table, config).items()}
