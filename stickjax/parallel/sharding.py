"""How arrays are divided over several devices: the mesh, one table of partitions, and the gradients of a step.

The gradients of a step are computed in one `jax.shard_map`: kernels and routers see the rows of their own device, and
every communication is written out (`stickjax.parallel.collectives`). On a single device there is no mesh and no
shard_map.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stickjax.config import Config

# Devices that are neighbours along the last axis are neighbours in the machine. So the axis with the most communication
# comes last.
AXES = ("data", "fsdp", "expert", "context", "tensor")
ROW_AXES = ("data", "fsdp", "expert")  # axes that divide the sequences of a batch
BATCH_AXES = (*ROW_AXES, "context")  # axes that divide the tokens of a batch
BATCH = PartitionSpec(ROW_AXES, "context")


@dataclasses.dataclass(frozen=True)
class Table:
    """How parameters are divided, by their name and the letters of their axes. All others lie whole on every device."""

    embed_vd: PartitionSpec = PartitionSpec("tensor", "fsdp")
    unembed_dv: PartitionSpec = PartitionSpec("fsdp", "tensor")
    query_dnh: PartitionSpec = PartitionSpec("fsdp", "tensor")
    key_dkh: PartitionSpec = PartitionSpec("fsdp", "tensor")
    value_dkh: PartitionSpec = PartitionSpec("fsdp", "tensor")
    output_nhd: PartitionSpec = PartitionSpec("tensor", None, "fsdp")
    head_bias_nh: PartitionSpec = PartitionSpec("tensor")
    scale_nh: PartitionSpec = PartitionSpec("tensor")
    bias_nh: PartitionSpec = PartitionSpec("tensor")
    expert_query_edh: PartitionSpec = PartitionSpec(None, "fsdp", "tensor")
    expert_output_ehd: PartitionSpec = PartitionSpec(None, "tensor", "fsdp")
    key_bias_kh: PartitionSpec = PartitionSpec("tensor")
    value_bias_kh: PartitionSpec = PartitionSpec("tensor")
    hidden_dr: PartitionSpec = PartitionSpec("fsdp")  # of a router, divided like its weight
    weight_re: PartitionSpec = PartitionSpec("fsdp")
    w_in_dgf: PartitionSpec = PartitionSpec("fsdp", None, "tensor")
    w_out_fd: PartitionSpec = PartitionSpec("tensor", "fsdp")
    w_in_df: PartitionSpec = PartitionSpec()
    w_in_edf: PartitionSpec = PartitionSpec()
    relative_khp: PartitionSpec = PartitionSpec()
    w_in_edgf: PartitionSpec = PartitionSpec("expert", "fsdp", None, "tensor")
    w_out_efd: PartitionSpec = PartitionSpec("expert", "tensor", "fsdp")

    def find(self, name: str, ndim: int) -> PartitionSpec:
        """The partition of the parameter `name`; ValueError for a matrix that is not in the table.

        >>> Table().find("w_out", 2) == PartitionSpec("tensor", "fsdp"), Table().find("scale", 1) == PartitionSpec()
        (True, True)
        """
        name = name.removeprefix("new_")  # divided like the parameter that it extends
        for field in dataclasses.fields(self):
            known, _, letters = field.name.rpartition("_")
            if (known, len(letters)) == (name, ndim):
                return getattr(self, field.name)
        if ndim >= 2 and not name.endswith(("scale", "bias")):
            raise ValueError(f"no partition for {name!r} with {ndim} axes")
        return PartitionSpec()


TABLE = Table()


def make_mesh(config: Config, devices=None) -> Mesh | None:
    """The mesh of a config, None for a single device.

    Args:
      config: its mesh section, in which one axis may be -1 for the devices that the others leave; and the sizes of the
        model and the batch, which the mesh must divide.
      devices: the devices to use; None: all.

    Raises:
      ValueError: more devices than there are, or a size that does not divide.

    >>> make_mesh(Config()) is None
    True
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, devices)
    count, axes = math.prod(sizes.values()), " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)
    if count > len(devices):
        raise ValueError(f"{axes} needs {count} devices, there are {len(devices)}")
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(f"{axes or 'a single device'} must be all {len(devices)} devices of the processes")
    _check_sizes(config, sizes)
    if count == 1:
        return None
    return jax.make_mesh(tuple(sizes.values()), AXES, devices=devices[:count])


def mesh_sizes(config: Config, devices=None) -> dict[str, int]:
    """The size of each axis of the mesh; ValueError if the other axes leave no whole number for -1."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    for axis, size in sizes.items():
        if size == -1:
            if len(devices) % known:
                raise ValueError(
                    f"{axis}=-1: the other axes make {known} parts, which do not divide {len(devices)} devices"
                )
            sizes[axis] = len(devices) // known
    return sizes


def _check_sizes(config: Config, sizes: dict[str, int]) -> None:
    m, d, accumulate = config.model, config.data, config.train.accumulate
    if m.family == "sut" and (other := [f"{axis}={n}" for axis, n in sizes.items() if axis != "data" and n > 1]):
        raise ValueError(f"{' and '.join(other)} divide decoders; a Universal Transformer lies whole on every device")
    rows = math.prod(sizes[axis] for axis in ROW_AXES)
    if d.B % (rows * accumulate):
        parts = " x ".join(f"{axis}={sizes[axis]}" for axis in ROW_AXES if sizes[axis] > 1)
        raise ValueError(
            f"{d.B // accumulate} sequences (B / accumulate) must be a multiple of {parts}; "
            f"B={max(d.B // (rows * accumulate), 1) * rows * accumulate} would do"
        )
    if m.family == "decoder":
        _check_decoder(config, sizes)


def _check_decoder(config: Config, sizes: dict[str, int]) -> None:
    m, d = config.model, config.data
    if sizes["expert"] > 1 and not m.E:
        raise ValueError(f"expert={sizes['expert']} divides the experts, but E=0")
    if sizes["expert"] > 1 and m.new_experts:
        raise ValueError(f"expert={sizes['expert']} cannot divide new_experts={m.new_experts} from E={m.E} old ones")
    if sizes["context"] > 1 and m.attention != "stick_breaking":
        raise ValueError(f"context={sizes['context']} needs attention='stick_breaking'")
    tensor, context = sizes["tensor"], sizes["context"]
    divided = [
        ("T", d.T, context > 1 and 2 * context, f"2 x context={context}, because every device takes two pieces"),
        ("D", m.D, sizes["fsdp"], f"fsdp={sizes['fsdp']}"),
        ("E", m.E, sizes["expert"], f"expert={sizes['expert']}"),
        ("router_hidden", m.router_hidden, m.router_network != "linear" and sizes["fsdp"], f"fsdp={sizes['fsdp']}"),
        *((letter, getattr(m, letter), tensor, f"tensor={tensor}") for letter in "NKF"),
        ("V", m.V or tensor, tensor, f"tensor={tensor}"),  # if V is None, it will become a multiple
    ]
    for letter, size, parts, divisor in divided:
        if parts and size % parts:
            near = -(-size // parts) * parts
            raise ValueError(f"{letter}={size} must be a multiple of {divisor}; {letter}={near} would do")


def by_name(function: Callable, tree):
    """The tree with `function(names on its path, leaf)` for every leaf.

    The path ends at a Flax variable, without its `.value`; so a variable named "value" keeps its name.
    """

    def variable(path, leaf):
        names = tuple(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)
        return jax.tree.map(lambda array: function(names, array), leaf)

    return jax.tree_util.tree_map_with_path(variable, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def spec_of(names: tuple[str, ...], leaf) -> PartitionSpec:
    """The partition of one array of a model or of a training state, by the names on its path."""
    stacked = "blocks" in names  # the axis of the layers comes first
    spec = TABLE.find(names[-1] if names else "", np.ndim(leaf) - stacked)
    return PartitionSpec(None, *spec) if stacked and spec else spec


def specs(tree):
    """A tree like `tree`, of parameters or of a whole training state, with the partition of every array."""
    return by_name(spec_of, tree)


def shardings(mesh: Mesh, tree):
    """`specs` as shardings of a mesh."""
    return by_name(lambda names, leaf: NamedSharding(mesh, spec_of(names, leaf)), tree)


def rows_of_process(mesh: Mesh | None) -> tuple[int, int]:
    """(index, count): this process loads part `index` of `count` of the sequences of every batch.

    If "context" or "tensor" reaches across processes, these processes share their sequences and load the same ones.
    """
    if mesh is None:
        return 0, 1
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = owners.reshape(math.prod(mesh.shape[axis] for axis in ROW_AXES), -1)
    mine = np.flatnonzero((owners == jax.process_index()).any(axis=1))
    return int(mine[0]) // len(mine), len(owners) // len(mine)


def batch_spec(x) -> PartitionSpec:
    """The partition of an array of a batch, [B,T] or [B]."""
    return PartitionSpec(*BATCH[: np.ndim(x)])


def place(mesh: Mesh | None, batch: dict, accumulate: int = 1) -> dict:
    """The sequences that `rows_of_process` names, as a batch on the devices of the mesh.

    The rows are ordered so that the i-th microbatches of all devices together are the i-th microbatch of the batch.
    Along "context" a device takes one piece from the beginning of a sequence and one from its end, so that every device
    has the same number of (query, key) pairs.
    """
    if mesh is None:
        return batch
    index, count = rows_of_process(mesh)
    context = mesh.shape["context"]
    shards = math.prod(mesh.shape[axis] for axis in ROW_AXES) // count
    pieces = np.stack([np.arange(context), 2 * context - 1 - np.arange(context)], axis=1).reshape(-1)

    def one(x):
        rows, *tokens = x.shape
        x = np.asarray(x).reshape(accumulate, shards, -1, *tokens).swapaxes(0, 1).reshape(rows, *tokens)
        if context > 1 and tokens:
            x = x.reshape(rows, 2 * context, -1)[:, pieces].reshape(rows, *tokens)

        def part(where):
            first = (where[0].start or 0) - index * rows
            return x[first : first + rows // shards, *where[1:]]

        return jax.make_array_from_callback((rows * count, *tokens), NamedSharding(mesh, batch_spec(x)), part)

    return {name: one(x) for name, x in batch.items()}


def shard_gradients(mesh: Mesh | None, gradients: Callable) -> Callable:
    """`gradients(params, batch, key) -> (gradients, metrics)` on every device for its part of the batch."""
    if mesh is None:
        return gradients
    parts_of_batch = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)

    def local(params, batch, key):
        # The routers of different parts of the batch draw different numbers.
        index = lax.axis_index(parts_of_batch) if parts_of_batch else 0
        grads, metrics = gradients(params, batch, jax.random.fold_in(key, index))

        def summed(names, grad):  # an axis that divides it has summed it already, in the transpose of a gather
            axes = tuple(axis for axis in parts_of_batch if axis not in spec_of(names, grad))
            return lax.psum(grad, axes) if axes else grad

        return by_name(summed, grads), metrics

    def run(params, batch, key):
        parts = specs(params)
        inputs = parts, jax.tree.map(batch_spec, batch), PartitionSpec()
        f = jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=(parts, PartitionSpec()), check_vma=False)
        return f(params, batch, key)

    return run
