"""The mesh of devices, and how a batch is sharded over its axes. With a single device, the mesh is None.

The table of `stickjax.models.parameters` says how the parameters are sharded.
"""

import math
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stickjax.config import Config
from stickjax.config.command import say_error

# Devices that are neighbours along the last axis are also neighbours in the machine. So the axis with the most
# communication is last.
AXES = ("data", "fsdp", "expert", "context", "tensor")
ROW_AXES = ("data", "fsdp", "expert")  # mesh axes over which the sequences of a batch are sharded
BATCH_AXES = (*ROW_AXES, "context")  # mesh axes over which the tokens of a batch are sharded
BATCH = PartitionSpec(ROW_AXES, "context")


def make_mesh(config: Config, devices=None, *, training: bool = True) -> Mesh | None:
    """Make the mesh that a config describes. Return None if all mesh axes have size 1.

    Args:
      config: its section `mesh` has the sizes of the mesh axes. The size of one axis may be -1. Its size is then the
        number of devices divided by the product of the other sizes.
      devices: the devices to use; None: all devices.
      training: whether the mesh is for batches of `data.B` sequences. Evaluation chooses its own number of sequences.

    Raises:
      ValueError: the mesh needs more devices than there are; an axis of size -1 cannot use all devices; with several
        processes, the mesh does not use all devices; the model cannot be divided over the mesh; or, with `training`, a
        batch cannot be divided over the mesh.

    >>> make_mesh(Config()) is None
    True
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, devices)
    count, axes = math.prod(sizes.values()), " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)
    if count > len(devices):
        hint = "; JAX_NUM_CPU_DEVICES=N makes N devices from one CPU" if devices[0].platform == "cpu" else ""
        raise ValueError(
            f"the mesh {axes} needs {count} devices, but there "
            f"{'is' if len(devices) == 1 else 'are'} {len(devices)}{hint}"
        )
    if jax.process_count() > 1 and count != len(devices):
        found = f"{count}: {axes}" if axes else "one"
        raise ValueError(
            f"with several processes, the mesh must have all {len(devices)} devices, but it has only {found}; add "
            "--mesh.data=-1"
        )
    if training:
        _check_batch(config, sizes)
    config.model.check_mesh(sizes, config.data.T)
    if count == 1:
        return None
    return jax.make_mesh(tuple(sizes.values()), AXES, devices=devices[:count])


def mesh_for_evaluation(config: Config, changed: Iterable[str] = ()) -> Mesh | None:
    """Make the mesh on which a trained model is evaluated or generates text: the mesh of its config.

    The result is None, which means one device, in three cases: all axes of the mesh have size 1; the model is not a
    language model, but reads examples, as a classifier does; or the mesh of the run cannot be made here, for example
    because it needs more devices. In the last case, the reason is printed on stderr.

    Args:
      config: the config of the run, with the changes of the user.
      changed: the names of the config fields that the user has changed, such as "mesh.fsdp".

    Raises:
      ValueError: the mesh cannot be made, or the model reads examples. Both are errors only if the user has changed a
        field of the mesh, or if there are several processes. Otherwise the result is None.

    >>> mesh_for_evaluation(Config()) is None
    True
    """
    required = jax.process_count() > 1 or any(name.startswith("mesh.") for name in changed)
    try:
        if config.model.reads == "text":
            return make_mesh(config, training=False)
        if required:
            raise ValueError(
                "a model that reads examples and not text, such as a classifier, is evaluated on one device; leave out "
                "--mesh.* and --processes"
            )
    except ValueError as error:
        if required:
            raise
        say_error(f"one device is used, because the mesh of the run cannot be made here: {error}")
    return None


def mesh_of(model) -> Mesh | None:
    """Return the mesh on which the parameters of a model are placed. Return None if they are on a single device.

    >>> mesh_of({"w": jax.numpy.zeros(2)}) is None
    True
    """
    mesh = getattr(getattr(jax.tree.leaves(model)[0], "sharding", None), "mesh", None)
    return mesh if mesh is not None and mesh.size > 1 else None


def on_one_device(model):
    """Return a copy of a model on the first device of this process, for code that does not run on a mesh.

    The whole model must fit on this device. With several processes, every parameter must be replicated.
    """

    def one(x: jax.Array) -> jax.Array:
        return x.addressable_data(0) if x.is_fully_replicated else jax.device_put(x, jax.local_devices()[0])

    return jax.tree.map(one, model)


def mesh_sizes(config: Config, devices=None) -> dict[str, int]:
    """Return {name of a mesh axis: its size} for a config. All sizes are positive.

    A size of -1 in the config is replaced by the number of devices divided by the product of the other sizes. Raise
    ValueError if this quotient is not a whole number. `devices`: the devices to use; None: all devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    for axis, size in sizes.items():
        if size == -1:
            if len(devices) % known:
                raise ValueError(
                    f"{axis}=-1: the number of devices, {len(devices)}, must be a multiple of {known}, the product of "
                    "the other mesh axes"
                )
            sizes[axis] = len(devices) // known
    return sizes


def _check_batch(config: Config, sizes: dict[str, int]) -> None:
    d, accumulate = config.data, config.train.accumulate
    rows = math.prod(sizes[axis] for axis in ROW_AXES)
    if d.B % (rows * accumulate):
        parts = " x ".join(f"{axis}={sizes[axis]}" for axis in ROW_AXES if sizes[axis] > 1)
        raise ValueError(
            f"B / accumulate = {d.B // accumulate} sequences must be a multiple of the mesh size {parts}; "
            f"B={max(d.B // (rows * accumulate), 1) * rows * accumulate} would do"
        )


def row_parts(mesh: Mesh | None) -> int:
    """Return into how many parts a mesh divides the B sequences of a batch. If `mesh` is None, return 1.

    >>> row_parts(None)
    1
    """
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROW_AXES)


def rows_of_process(mesh: Mesh | None) -> tuple[int, int]:
    """Return which part of every batch this process loads, as (index of the part, number of parts).

    The parts have the same size, and consist of whole sequences. If the devices along the mesh axis "context" or
    "tensor" belong to several processes, these processes load the same part. Without a mesh, return (0, 1).
    """
    if mesh is None:
        return 0, 1
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = owners.reshape(row_parts(mesh), -1)
    mine = np.flatnonzero((owners == jax.process_index()).any(axis=1))
    return int(mine[0]) // len(mine), len(owners) // len(mine)


def batch_spec(x) -> PartitionSpec:
    """Return the PartitionSpec of an array x [B,T] or [B] of a batch: the mesh axes over which B and T are sharded."""
    return PartitionSpec(*BATCH[: np.ndim(x)])


def abstract_batch(mesh: Mesh | None, shapes: dict) -> dict:
    """Return {name: ShapeDtypeStruct} for the arrays of a batch, with the sharding of each array on the mesh.

    `shapes` has the same structs without a sharding. The result is enough to compile a program: no data are needed.
    Without a mesh, return `shapes` unchanged.
    """
    if mesh is None:
        return shapes
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, batch_spec(x)))  # noqa: E731
    return jax.tree.map(placed, shapes)


def shard_batch(mesh: Mesh | None, batch: dict, accumulate: int = 1) -> dict:
    """Shard the arrays of a batch over the mesh, and return them. Without a mesh, return the batch unchanged.

    `batch` is {name: array [B,T] or [B]}, with the B sequences that this process loads (see `rows_of_process`).
    `accumulate` is the number of microbatches. The sequences are ordered so that the i-th microbatches of all devices
    together are the i-th microbatch of the whole batch. If T is sharded over the mesh axis "context", the n-th device
    along this axis gets two pieces of each of its sequences: the n-th piece from the beginning of the sequence, and the
    n-th piece from its end. So all devices compute the same number of (query, key) pairs.
    """
    if mesh is None:
        return batch
    index, count = rows_of_process(mesh)
    context = mesh.shape["context"]
    shards = row_parts(mesh) // count
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
