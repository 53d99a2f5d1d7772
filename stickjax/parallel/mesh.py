"""The mesh of devices, and how a batch is divided over it. On a single device there is no mesh.

How the parameters are divided stands in the table of `stickjax.models.parameters`.
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stickjax.config import Config

# Devices that are neighbours along the last axis are neighbours in the machine. So the axis with the most communication
# comes last.
AXES = ("data", "fsdp", "expert", "context", "tensor")
ROW_AXES = ("data", "fsdp", "expert")  # axes that divide the sequences of a batch
BATCH_AXES = (*ROW_AXES, "context")  # axes that divide the tokens of a batch
BATCH = PartitionSpec(ROW_AXES, "context")


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
    d, accumulate = config.data, config.train.accumulate
    rows = math.prod(sizes[axis] for axis in ROW_AXES)
    if d.B % (rows * accumulate):
        parts = " x ".join(f"{axis}={sizes[axis]}" for axis in ROW_AXES if sizes[axis] > 1)
        raise ValueError(
            f"{d.B // accumulate} sequences (B / accumulate) must be a multiple of {parts}; "
            f"B={max(d.B // (rows * accumulate), 1) * rows * accumulate} would do"
        )
    config.model.check_mesh(sizes, d.T)


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


def abstract_batch(mesh: Mesh | None, shapes: dict) -> dict:
    """The shapes of a batch, each with its sharding on the mesh."""
    if mesh is None:
        return shapes
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, batch_spec(x)))  # noqa: E731
    return jax.tree.map(placed, shapes)


def shard_batch(mesh: Mesh | None, batch: dict, accumulate: int = 1) -> dict:
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
