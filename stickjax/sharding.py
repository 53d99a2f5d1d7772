"""Where arrays lie on several devices: the mesh, one table of partitions, and what a model does under it.

The gradients of a step run in one `jax.shard_map`: kernels and routers see the rows of their own device. Three things
leave it: the parts of a parameter are gathered where a layer uses them (`gather`; the transpose sums their gradients
and leaves each device its part), sums over the batch are `total`, and gradients of whole parameters are summed at the
end. On a single device there is no mesh, and none of this exists.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stickjax.config import MeshConfig

AXES = ("data", "fsdp")  # both divide the batch; "fsdp" divides parameters and the optimizer's state as well
BATCH = PartitionSpec(AXES)


@dataclasses.dataclass(frozen=True)
class Table:
    """How parameters are divided, by their name and the letters of their axes. All others are whole everywhere.

    Every matrix is divided along D, so that one size has to divide.
    """

    embed_vd: PartitionSpec = PartitionSpec(None, "fsdp")
    unembed_dv: PartitionSpec = PartitionSpec("fsdp")
    query_dnh: PartitionSpec = PartitionSpec("fsdp")
    key_dkh: PartitionSpec = PartitionSpec("fsdp")
    value_dkh: PartitionSpec = PartitionSpec("fsdp")
    output_nhd: PartitionSpec = PartitionSpec(None, None, "fsdp")
    expert_query_edh: PartitionSpec = PartitionSpec(None, "fsdp")
    expert_output_ehd: PartitionSpec = PartitionSpec(None, None, "fsdp")
    router_de: PartitionSpec = PartitionSpec("fsdp")
    w_in_df: PartitionSpec = PartitionSpec("fsdp")
    w_out_fd: PartitionSpec = PartitionSpec(None, "fsdp")
    w_in_edf: PartitionSpec = PartitionSpec(None, "fsdp")
    w_out_efd: PartitionSpec = PartitionSpec(None, None, "fsdp")

    def find(self, name: str, ndim: int) -> PartitionSpec:
        """Of the parameter `name`; ValueError for a matrix that the table does not know.

        >>> Table().find("w_in", 3) == PartitionSpec(None, "fsdp"), Table().find("scale", 1) == PartitionSpec()
        (True, True)
        """
        for field in dataclasses.fields(self):
            known, _, letters = field.name.rpartition("_")
            if (known, len(letters)) == (name, ndim):
                return getattr(self, field.name)
        if ndim >= 2 and not name.endswith(("scale", "bias")):
            raise ValueError(f"no partition for {name!r} with {ndim} axes")
        return PartitionSpec()


TABLE = Table()


def make_mesh(config: MeshConfig, *, D: int, rows: int, devices=None) -> Mesh | None:
    """The mesh of a config, None for a single device.

    Args:
      config: sizes of the axes, of which one may be -1: what the others leave of the devices.
      D: width of the model; a multiple of fsdp.
      rows: sequences of one microbatch; a multiple of data * fsdp.
      devices: those to use; None: all.

    Raises:
      ValueError: more devices than there are, or a size that does not divide.

    >>> make_mesh(MeshConfig(), D=128, rows=16) is None
    True
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size > 0)
    if -1 in sizes:
        if len(devices) % known:
            raise ValueError(f"{AXES[1 - sizes.index(-1)]}={known} does not divide the {len(devices)} devices")
        sizes[sizes.index(-1)] = len(devices) // known
    data, fsdp = sizes
    if data * fsdp > len(devices):
        raise ValueError(f"data={data} x fsdp={fsdp} needs {data * fsdp} devices, there are {len(devices)}")
    if rows % (data * fsdp):
        raise ValueError(
            f"{rows} sequences (B / accumulate) must be a multiple of data={data} x fsdp={fsdp}; "
            f"B={rows // (data * fsdp) * data * fsdp or data * fsdp} per microbatch would do"
        )
    if D % fsdp:
        raise ValueError(f"D={D} must be a multiple of fsdp={fsdp}")
    if jax.process_count() > 1 and data * fsdp != len(devices):
        raise ValueError(f"data={data} x fsdp={fsdp} must be all {len(devices)} devices of the processes")
    if data * fsdp == 1:
        return None
    return jax.make_mesh((data, fsdp), AXES, devices=devices[: data * fsdp])


def by_name(function: Callable, tree):
    """The tree with `function(names on its path, leaf)` for every leaf.

    The path ends at a Flax variable: without its own `.value`, attention.value keeps its name.
    """

    def variable(path, leaf):
        names = tuple(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)
        return jax.tree.map(lambda array: function(names, array), leaf)

    return jax.tree_util.tree_map_with_path(variable, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def specs(tree):
    """A tree like `tree`, of parameters or of a whole training state, with the partition of every array."""

    def one(names, leaf):
        stacked = "blocks" in names  # the layers' axis comes first
        spec = TABLE.find(names[-1] if names else "", np.ndim(leaf) - stacked)
        return PartitionSpec(None, *spec) if stacked and spec else spec

    return by_name(one, tree)


def shardings(mesh: Mesh, tree):
    """`specs` as shardings of a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree), is_leaf=_is_spec)


def _is_spec(leaf) -> bool:
    return isinstance(leaf, PartitionSpec)


def place(mesh: Mesh | None, batch: dict, accumulate: int = 1) -> dict:
    """This process' share of a batch, on its devices.

    Rows are dealt so that the i-th microbatches of all devices are together the i-th of the batch.
    """
    if mesh is None:
        return batch
    sharding, devices = NamedSharding(mesh, BATCH), len(mesh.local_devices)

    def one(x):
        dealt = np.asarray(x).reshape(accumulate, devices, -1, *x.shape[1:]).swapaxes(0, 1)
        return jax.make_array_from_process_local_data(sharding, dealt.reshape(x.shape))

    return {name: one(x) for name, x in batch.items()}


# Inside of the shard_map.


def _axes() -> tuple[str, ...]:
    """Those of AXES that this code runs under."""
    return tuple(axis for axis in AXES if axis in jax.sharding.get_abstract_mesh().manual_axes)


def gather(module):
    """The module with whole parameters: each device had a part. The same module where nothing is divided."""
    if "fsdp" not in _axes():
        return module

    def whole(spec, leaf):
        axes = [i for i, axis in enumerate(spec) if axis == "fsdp"]
        return lax.all_gather(leaf, "fsdp", axis=axes[0], tiled=True) if axes else leaf

    return jax.tree.map(whole, specs(module), module, is_leaf=_is_spec)


def total(x):
    """The sum of x over all devices, with the gradient of this device's x: gradients are summed in the end."""
    if not (axes := _axes()):
        return x
    return lax.stop_gradient(lax.psum(x, axes)) + (x - lax.stop_gradient(x))


def over(mesh: Mesh | None, gradients: Callable) -> Callable:
    """`gradients(params, batch, key) -> (gradients, metrics)` on every device for its part of the batch."""
    if mesh is None:
        return gradients

    def local(params, batch, key):
        # What routers draw differs between devices, as between the rows of one.
        grads, metrics = gradients(params, batch, jax.random.fold_in(key, lax.axis_index(AXES)))

        def summed(spec, grad):  # what was gathered is summed over "fsdp" by the transpose
            axes = tuple(axis for axis in AXES if axis not in spec)
            return lax.psum(grad, axes) if axes else grad

        return jax.tree.map(summed, specs(grads), grads, is_leaf=_is_spec), metrics

    def run(params, batch, key):
        parts = specs(params)
        inputs = parts, {name: BATCH for name in batch}, PartitionSpec()
        f = jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=(parts, PartitionSpec()), check_vma=False)
        return f(params, batch, key)

    return run
