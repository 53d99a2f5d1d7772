"""Compute the gradients of a batch: the sum over its microbatches, and over the devices of a mesh.

On a mesh the gradients are computed in one `jax.shard_map`. So on each device, kernels and routers see only the part of
the batch on this device, and all collectives are explicit calls (`stickjax.parallel.collectives`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.arguments import sum_type
from stickjax.config import Config
from stickjax.models.families import family_of
from stickjax.models.parameters import Leaf, map_leaves, partition, specs
from stickjax.parallel.collectives import psum_over_batch
from stickjax.parallel.mesh import BATCH_AXES, batch_spec
from stickjax.training.optimizer import stop_frozen_gradients


def batch_gradients(config: Config) -> Callable:
    """Return a function `f(params, batch, key)` that returns (the gradients of the loss, the metrics) of a batch.

    The model family of `config` defines the loss. f splits the batch into `train.accumulate` microbatches, and adds
    their gradients and their metrics. The loss and the metrics of a microbatch are scaled so that these sums are the
    results for the whole batch. The gradients of frozen parameters are zero.
    """
    loss, accumulate = family_of(config.model).loss, config.train.accumulate
    grad = jax.grad(lambda params, *inputs: loss(stop_frozen_gradients(config, params), *inputs), has_aux=True)

    def accumulated(params, batch, key):
        micro = {name: x.reshape(accumulate, -1, *x.shape[1:]) for name, x in batch.items()}
        scale = 1 / jnp.maximum(psum_over_batch(batch["loss_mask"].astype(jnp.float32).sum()), 1)
        shared = {"loss_scale": scale, "share": jnp.float32(1 / accumulate)}

        def one(total, inputs):  # the totals are float32, because a sum in bfloat16 loses small gradients
            part, k = inputs
            add = lambda total, x: total + x.astype(total.dtype)  # noqa: E731
            return jax.tree.map(add, total, grad(params, part | shared, k)), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(grad, params, first | shared, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, sum_type(s)), shapes)
        return lax.scan(one, zeros, (micro, jax.random.split(key, accumulate)))[0]

    return grad if accumulate == 1 else accumulated


def mesh_gradients(mesh: Mesh | None, gradients: Callable) -> Callable:
    """Return a function that runs the function `gradients` on all devices of a mesh.

    `gradients(params, batch, key)` returns (gradients, metrics). The returned function has the same arguments and
    results. Every device runs `gradients` on its part of the batch. Then the returned function sums the gradients over
    all parts of the batch. The metrics are not summed here: `gradients` itself must sum them over the parts. Without a
    mesh, return `gradients` unchanged.
    """
    if mesh is None:
        return gradients
    parts_of_batch = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)

    def local(params, batch, key):
        # Routers use a different random key on every part of the batch.
        index = lax.axis_index(parts_of_batch) if parts_of_batch else 0
        grads, metrics = gradients(params, batch, jax.random.fold_in(key, index))

        def summed(leaf: Leaf):
            # If the parameter is sharded over an axis, its gradient is already the sum over this axis. "fsdp": the
            # backward pass of its all-gather adds up. "expert": its experts compute the tokens of all these devices.
            axes = tuple(axis for axis in parts_of_batch if axis not in partition(leaf))
            return lax.psum(leaf.value, axes) if axes else leaf.value

        return map_leaves(summed, grads), metrics

    def run(params, batch, key):
        parts = specs(params)
        inputs = parts, jax.tree.map(batch_spec, batch), PartitionSpec()
        f = jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=(parts, PartitionSpec()), check_vma=False)
        return f(params, batch, key)

    return run
