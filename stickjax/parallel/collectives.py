"""The collectives that models call, with their gradients. They run inside the shard_map of `training/gradients.py`.

On a single device there is no communication. On a mesh, gradients follow two rules.

Along the mesh axes that divide the batch ("data", "fsdp", "expert" and "context"), every device computes the terms of
the loss that come from its own tokens, and the loss is computed from psums of these terms. In the backward pass, every
device differentiates only its own terms. So the backward pass of `psum_over_batch` does not communicate. The backward
pass of `all_gather` sums the gradients of all devices, because the terms of all devices depend on the gathered array.

Along the mesh axis "tensor", every device has the same tokens and the same loss, but only a part of the heads and
hidden units. A layer calls `copy_to_tensor_parallel` on its input, computes its part, and then calls
`reduce_from_tensor_parallel` on its output. So the loss counts once, and not once per device.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arguments import sum_type
from stickjax.parallel.mesh import BATCH_AXES


def size(axis: str) -> int:
    """Return the number of devices along the mesh axis `axis`. Outside of a shard_map over this axis, return 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def several(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the mesh axes among `axes` that have more than one device. The other axes need no collective."""
    return tuple(axis for axis in axes if size(axis) > 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def all_gather(x, name: str, axis: int, dtype):
    """All-gather x over the mesh axis `name`: concatenate the x of all devices along the array axis `axis`.

    x is first converted to `dtype`. The backward pass is a reduce-scatter: it sums the gradients of all devices in
    fp32, and every device gets the part of the sum that belongs to its x, in the type of x.
    """
    return lax.all_gather(x.astype(dtype), name, axis=axis, tiled=True)


def _gather_forward(x, name, axis, dtype):
    return all_gather(x, name, axis, dtype), jnp.zeros((), x.dtype)


def _gather_backward(name, axis, dtype, like, gradient):
    del dtype
    exact = gradient.astype(sum_type(like))
    return (lax.psum_scatter(exact, name, scatter_dimension=axis, tiled=True).astype(like.dtype),)


all_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum(tree, axes):
    return lax.psum(tree, axes)


_sum.defvjp(lambda tree, axes: (_sum(tree, axes), None), lambda axes, _, gradients: (gradients,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_gradients(tree, axes):
    return tree


_sum_gradients.defvjp(lambda tree, axes: (tree, None), lambda axes, _, gradients: (lax.psum(gradients, axes),))


def psum_over_batch(tree):
    """Compute the psum of every array of a pytree over all mesh axes that divide the batch.

    The backward pass returns the gradient unchanged, without a second psum: every device computes the gradient of its
    own summand only. `stickjax.training.gradients` adds the gradients of all devices at the end.
    """
    axes = several(BATCH_AXES)
    return _sum(tree, axes) if axes else tree


def copy_to_tensor_parallel(tree):
    """Return the arrays of a pytree unchanged; in the backward pass, psum their gradients over the mesh axis "tensor".

    A layer calls this function on its input, before every device computes its part of the heads or hidden units. The
    psum adds the gradients from the parts of all devices.
    """
    return tree if size("tensor") == 1 else _sum_gradients(tree, "tensor")


def reduce_from_tensor_parallel(x):
    """Compute the psum of x over the mesh axis "tensor"; in the backward pass, return the gradient unchanged.

    x is what the heads or hidden units of this device add to the output of a layer. The psum is the output.
    """
    return x if size("tensor") == 1 else _sum(x, "tensor")


def first_of(axis: str, count: int):
    """Return the index of the first item of this device, if each device along the mesh axis `axis` has `count` items.

    The items are the experts of a model, or the token ids of its vocabulary. Device 0 has the items from 0 to
    `count` - 1, device 1 has the next `count` items, and so on.
    """
    return lax.axis_index(axis) * count if size(axis) > 1 else 0


def all_gather_for_experts(tokens, expert_indices, gates, count: int):
    """All-gather the tokens and their routing over the mesh axis "expert". Return (tokens, expert_indices, gates).

    With P devices along the axis, every device gets the P * T tokens of all of them, and can apply its own experts.

    Args:
      tokens: [T,D], the tokens of this device.
      expert_indices: [T,k], the indices of the k experts of every token, among the experts of all devices.
      gates: [T,k], the weights of these experts.
      count: the number of experts on each device.

    Returns:
      tokens [P*T,D], expert_indices [P*T,k] and gates [P*T,k]. Here an index from 0 to `count` - 1 is an expert of this
      device. The index `count` stands for an expert of another device, which this device does not compute.

    The all-gather sends every token to the P - 1 other devices. An all-to-all of the (token, choice) pairs would send
    every token k (P - 1) / P times on average, which is more if P is below k.
    """
    if size("expert") == 1:
        return tokens, expert_indices, gates
    tokens, gates = (all_gather(x, "expert", 0, x.dtype) for x in (tokens, gates))
    indices = lax.all_gather(expert_indices, "expert", tiled=True) - first_of("expert", count)
    return tokens, jnp.where((indices >= 0) & (indices < count), indices, count), gates


def reduce_scatter_from_experts(outputs):
    """Reduce-scatter over the mesh axis "expert": sum the outputs of all experts for every token of this device.

    `outputs` [P*T,D] has the outputs of the experts of this device, for the tokens of all P devices. The result [T,D]
    has, for the T tokens of this device, the sum of the outputs of the experts of all devices.
    """
    return outputs if size("expert") == 1 else lax.psum_scatter(outputs, "expert", scatter_dimension=0, tiled=True)
