"""The table of parameters: the axes, the partition and the muP label of each parameter of each module class.

The table decides how a parameter is sharded over a mesh, how muP scales its learning rate, and how it is converted
to Hugging Face, frozen and pruned. A parameter that is not in the table is an error. So no parameter is treated by
accident like another parameter of the same name.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stickjax.config.fields import nearest
from stickjax.parallel.collectives import all_gather, size

LABELS = ("matrix", "embedding", "vector", "frozen")


class Parameter(NamedTuple):
    """A row of the table of parameters: the axes, the partition and the muP label of one parameter.

    `axes`: the names of its axes, separated by spaces. "E D KH" has three axes; the last axis has the size K * H. E is
      the axis of the experts, and C the axis of the router columns. An axis may also be a size: "2", or "4D" for 4 * D.
      A parameter of stacked layers has an additional first axis L, which is left out here.
    `partition`: for every axis, the mesh axis over which it is sharded, or "-" if it is not sharded. "-" at the end may
      be left out. With "", every device has the whole parameter.
    `label`: the muP label. "matrix": an internal matrix; its learning rate is divided by m_width, the width multiplier
      of muP. "embedding" and "vector": the learning rate is not divided; a vector has no weight decay. "frozen": the
      parameter has no gradient.
    """

    axes: str
    partition: str = ""
    label: str = "matrix"

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(*(None if axis == "-" else axis for axis in self.partition.split()))

    def axis(self, letter: str) -> int | None:
        """Return the index of the axis `letter` among the `axes`. Return None if the parameter has no such axis."""
        axes = self.axes.split()
        return axes.index(letter) if letter in axes else None


_NORM = {"scale": Parameter("D", label="vector"), "bias": Parameter("D", label="vector")}
_HEADS = Parameter("N H", "tensor", "vector")

PARAMETERS: dict[str, dict[str, Parameter]] = {
    "RMSNorm": _NORM,
    "LayerNorm": _NORM,
    "HeadNorm": {"scale": _HEADS, "bias": _HEADS},
    # The decoder.
    "Transformer": {
        "embed": Parameter("V D", "tensor fsdp", "embedding"),
        "unembed": Parameter("D V", "fsdp tensor", "embedding"),
    },
    "Attention": {
        "query": Parameter("D N H", "fsdp tensor"),
        "key": Parameter("D K H", "fsdp tensor"),
        "value": Parameter("D K H", "fsdp tensor"),
        "output": Parameter("N H D", "tensor - fsdp"),
        "head_bias": _HEADS,
        "query_bias": _HEADS,
        "key_bias": Parameter("K H", "tensor", "vector"),
        "value_bias": Parameter("K H", "tensor", "vector"),
    },
    "QueryKeyNorm": {"scale": Parameter("H", label="vector")},
    "AllQueryNorm": {"scale": _HEADS},
    "AllKeyNorm": {"scale": Parameter("K H", "tensor", "vector")},
    "MixtureOfHeads": {
        "expert_query": Parameter("E D KH", "- fsdp tensor"),
        "expert_output": Parameter("E KH D", "- tensor fsdp"),
        "key": Parameter("D K H", "fsdp tensor"),
        "value": Parameter("D K H", "fsdp tensor"),
        "key_bias": Parameter("K H", "tensor", "vector"),
        "value_bias": Parameter("K H", "tensor", "vector"),
        "output_bias": Parameter("D", label="vector"),
    },
    "FeedForward": {
        "w_in": Parameter("D G F", "fsdp - tensor"),
        "w_out": Parameter("F D", "tensor fsdp"),
    },
    # W is the width of the shared expert, `experts.shared`.
    "SharedExpert": {
        "w_in": Parameter("D G W", "fsdp - tensor"),
        "w_out": Parameter("W D", "tensor fsdp"),
    },
    "SparseExperts": {
        "w_in": Parameter("E D G F", "expert fsdp - tensor"),
        "w_out": Parameter("E F D", "expert tensor fsdp"),
        "output_bias": Parameter("D", label="vector"),
    },
    # R is the width of the router's hidden layer. A linear router has no hidden layer, and R is D.
    "Router": {
        "hidden": Parameter("D R", "fsdp"),
        "hidden_bias": Parameter("R", label="vector"),
        "log_scale": Parameter("1", label="vector"),
        "weight": Parameter("R C", "fsdp"),
        "selection_bias": Parameter("C", label="frozen"),  # updated by `bias_rate`, not by a gradient
        "slot": Parameter("C", label="frozen"),  # says which columns were pruned
    },
    # Every device has all parameters of the Universal Transformer.
    "LanguageModel": {"embed": Parameter("V D", label="embedding")},
    "SparseUniversalTransformer": {"embed": Parameter("V D", label="embedding")},
    "PairClassifier": {
        "embed": Parameter("V D", label="embedding"),
        "w_in": Parameter("4D 4D"),
        "in_bias": Parameter("4D", label="vector"),
        "w_out": Parameter("4D classes"),
        "out_bias": Parameter("classes", label="vector"),
    },
    "SharedHeads": {
        "expert_query": Parameter("E D KH"),
        "expert_output": Parameter("E KH D"),
        "key": Parameter("D K H"),
        "value": Parameter("D K H"),
        "relative": Parameter("K H P", label="embedding"),
    },
    "BiasedExperts": {
        "w_in": Parameter("E D F"),
        "in_bias": Parameter("E F", label="vector"),
        "w_out": Parameter("E F D"),
        "out_bias": Parameter("E D", label="vector"),
    },
    "TanhRouter": {
        "w_in": Parameter("D D"),
        "bias": Parameter("D", label="vector"),
        "weight": Parameter("D C"),
    },
    "HaltingGate": {
        "w_in": Parameter("D D"),
        "bias": Parameter("D", label="vector"),
        "w_out": Parameter("D 2"),
    },
}


class Leaf(NamedTuple):
    """An array of a model or of a training state: its value, the names on its path, and the class that owns it.

    `names`: the field names and keys from the root of the tree to the array, such as ("blocks", "ffn", "w_in").
    `owner`: the class of the Flax module that contains the array. None for an array outside of Flax modules, such as an
      array in a dictionary, or a counter in a training state.
    """

    value: Any
    names: tuple[str, ...]
    owner: type | None

    @property
    def name(self) -> str:
        return ".".join(self.names)


def leaves_of(tree, owner: type | None = None, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Yield a `Leaf` for every array of a tree, in the order of `jax.tree.leaves`.

    `owner`: the module class of the arrays, if the tree is a dictionary with parameters of one module. `path`: only for
    the calls that this function makes itself. It has the names from the root of the whole tree to `tree`.
    """
    inside = lambda node: node is not tree and isinstance(node, nnx.Module | nnx.Variable)  # noqa: E731
    owner = type(tree) if isinstance(tree, nnx.Module) else owner
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=inside):
        names = path + tuple(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in keys)
        if isinstance(node, nnx.Module):
            yield from leaves_of(node, path=names)
        else:  # an nnx.Variable or an array; the key of the array inside the variable is not a part of the names
            yield from (Leaf(array, names, owner) for array in jax.tree.leaves(node))


def map_leaves(function: Callable[[Leaf], Any], tree, owner: type | None = None):
    """Return a tree like `tree` in which `function(leaf)` replaces every array. `leaf` is the `Leaf` of the array.

    `owner`: the module class of the arrays, if the tree is a dictionary with parameters of one module.
    """
    return jax.tree.unflatten(jax.tree.structure(tree), [function(leaf) for leaf in leaves_of(tree, owner)])


def parameter(leaf: Leaf) -> Parameter:
    """Return the row of the table of parameters for a parameter of a Flax module.

    A module class also has the rows of its base classes. If experts were added to a trained model, their parameter
    `new_<name>` has the same row as `<name>`.

    Raises:
      ValueError: the table has no row for this module class and this name, or the number of axes in the row does not
        fit the parameter.
    """
    last, rows = leaf.names[-1], {}
    for cls in reversed(leaf.owner.__mro__):
        rows |= PARAMETERS.get(cls.__name__, {})
    row = rows.get(last, rows.get(last.removeprefix("new_")))  # added experts share the row of the old ones
    if row is None:
        raise ValueError(
            f"{leaf.name} ({leaf.owner.__name__}.{last}) is not in the table of parameters{nearest(last, rows)}: "
            "add a row to `parameters` of the Family class, or to PARAMETERS in stickjax.models.parameters"
        )
    dims, axes = np.ndim(leaf.value), len(row.axes.split())
    if dims not in (axes, axes + 1):
        raise ValueError(
            f"{leaf.name} has {dims} axes, but in the table of parameters its axes are {row.axes!r} (stacked "
            f"layers have an axis L before these); correct the row {last!r} of the class {leaf.owner.__name__}"
        )
    return row


def label(leaf: Leaf) -> str:
    """Return the muP label of a parameter: "matrix", "embedding", "vector" or "frozen" (see `Parameter`).

    For an array outside of Flax modules, such as an array in a dictionary, the function looks up the last name of its
    path in PARAMETERS. It raises ValueError if PARAMETERS has no row for this name, or has rows with different labels.
    """
    if leaf.owner is not None:
        return parameter(leaf).label
    last = leaf.names[-1] if leaf.names else ""
    labels = {row.label for rows in PARAMETERS.values() for name, row in rows.items() if name == last}
    if not labels:
        known = dict.fromkeys(name for rows in PARAMETERS.values() for name in rows)
        raise ValueError(
            f"no muP label for {leaf.name!r}{nearest(last, known)}: PARAMETERS in stickjax.models.parameters has no "
            f"row with the name {last!r}; use a name of the table, or add a row"
        )
    if len(labels) > 1:
        raise ValueError(
            f"no muP label for {leaf.name!r}: it is outside of a Flax module, and PARAMETERS in "
            f"stickjax.models.parameters has rows with the name {last!r} and different labels: "
            f"{', '.join(sorted(labels))}. Make the array an attribute of a Flax module"
        )
    return labels.pop()


def partition(leaf: Leaf) -> PartitionSpec:
    """Return the partition of an array of a model or of a training state: over which mesh axis each axis is sharded.

    An array outside of Flax modules, such as a counter in a training state, is not sharded. It must have fewer than two
    axes; else the function raises ValueError.
    """
    dims = np.ndim(leaf.value)
    if leaf.owner is None:
        if dims >= 2:
            raise ValueError(
                f"{leaf.name!r} has {dims} axes, but it is outside of a Flax module, so the table of parameters does "
                "not say how to shard it; make it an attribute of a Flax module, and add a row to the table"
            )
        return PartitionSpec()
    row = parameter(leaf)
    stacked = dims == len(row.axes.split()) + 1  # the axis of the layers comes first
    return PartitionSpec(None, *row.spec) if stacked and row.spec else row.spec


def specs(tree):
    """Return a tree like `tree`, with a `PartitionSpec` in place of every array.

    `tree` is a model or a whole training state. The function `partition` computes the spec of every array from the
    table of parameters.
    """
    return map_leaves(partition, tree)


def shardings(mesh: Mesh, tree):
    """Return a tree like `tree`, with a `NamedSharding` in place of every array: its partition on `mesh`.

    `tree` is a model or a whole training state.
    """
    return map_leaves(lambda leaf: NamedSharding(mesh, partition(leaf)), tree)


def axes_by_name(tree) -> Mapping[str, str]:
    """Return {name: axes} for all parameters of a model, such as {"embed": "V D"}. The axis L is left out."""
    return {leaf.name: parameter(leaf).axes for leaf in leaves_of(tree)}


def gather(tree, dtype, owner: type | None = None):
    """All-gather the parameters that are sharded over the mesh axis "fsdp". Return `tree` with the gathered parameters.

    A gathered parameter may still be sharded over other mesh axes, such as "tensor".

    `tree` is a module, or a dictionary with parameters of the module class `owner`. A parameter is first converted to
    `dtype`, the type of the computation, and then gathered. Parameters of routers are not converted, because rounding
    changes which experts a router chooses. If the axis "fsdp" has one device, `tree` is returned unchanged.
    """
    if size("fsdp") == 1:
        return tree

    def whole(leaf: Leaf):
        spec = partition(leaf)
        if "fsdp" not in spec:
            return leaf.value
        sent = leaf.value.dtype if "router" in leaf.names else jnp.dtype(dtype)
        return all_gather(leaf.value, "fsdp", spec.index("fsdp"), sent)

    return map_leaves(whole, tree, owner)
