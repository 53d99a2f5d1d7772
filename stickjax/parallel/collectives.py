"""The collectives of a model. They are called inside the shard_map of `stickjax.training.gradients`.

On a single device there is no communication.

Gradients are computed as if every device had a separate loss, and the whole loss were the sum of these losses. So if an
array is all-gathered along an axis that divides the batch, the backward pass sums the gradients of all devices. Along
the mesh axis "tensor", all devices have the same activations and the same loss. A layer calls `copy_to_tensor_parallel`
before it computes its part of the heads or hidden units, and `reduce_from_tensor_parallel` after that.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arguments import sum_type
from stickjax.parallel.mesh import BATCH_AXES


def size(axis: str) -> int:
    """Return the number of devices along a mesh axis. Return 1 outside of a shard_map over this axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def several(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the mesh axes in `axes` that have more than one device. A collective over one device is not needed."""
    return tuple(axis for axis in axes if size(axis) > 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def all_gather(x, name: str, axis: int, dtype):
    """All-gather x over the mesh axis `name`: concatenate the x of all devices along the array axis `axis`.

    x is first converted to `dtype`. In the backward pass, the gradients are summed in fp32.
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
    """Compute the psum of the arrays of a pytree over all mesh axes that divide the batch.

    In the backward pass, each device keeps its own gradient, without a sum over the devices. The top of this file
    explains why.
    """
    axes = several(BATCH_AXES)
    return _sum(tree, axes) if axes else tree


def copy_to_tensor_parallel(tree):
    """Return the arrays of a pytree unchanged; in the backward pass, psum their gradients over the mesh axis "tensor".

    A layer calls this on its input before it computes its part of the heads or hidden units.
    """
    return tree if size("tensor") == 1 else _sum_gradients(tree, "tensor")


def reduce_from_tensor_parallel(x):
    """Compute the psum of x over the mesh axis "tensor"; in the backward pass, return the gradient unchanged.

    x is the part of a layer's output that comes from the heads or hidden units of this device.
    """
    return x if size("tensor") == 1 else _sum(x, "tensor")


def first_of(axis: str, count: int):
    """Return the index of the first expert of this device, if each device along the mesh axis has `count` experts.

    It is also the first id of this device, if each device has `count` ids of a vocabulary.
    """
    return lax.axis_index(axis) * count if size(axis) > 1 else 0


def all_gather_for_experts(tokens, expert_indices, gates, count: int):
    """All-gather the tokens and their routing over the mesh axis "expert", so that a device has all tokens.

    The arguments are the T tokens of this device, [T,D], and the indices of their k experts with the gates, [T,k].
    `count` is the number of experts on each device. The results have the P T tokens of P devices. In the results,
    indices count from the first expert of this device, and experts of other devices have the index `count`, which means
    no expert.

    The all-gather copies every token to the P - 1 other devices of the axis. An all-to-all of the routed rows would
    send k (P - 1) / P rows per token, which is more if P is below k.
    """
    if size("expert") == 1:
        return tokens, expert_indices, gates
    tokens, gates = (all_gather(x, "expert", 0, x.dtype) for x in (tokens, gates))
    indices = lax.all_gather(expert_indices, "expert", tiled=True) - first_of("expert", count)
    return tokens, jnp.where((indices >= 0) & (indices < count), indices, count), gates


def reduce_scatter_from_experts(outputs):
    """Reduce-scatter over the mesh axis "expert": sum the experts' outputs, and return every token to its device.

    `outputs` [P T,D] has the outputs of this device's experts for the tokens of all P devices. The result [T,D] has
    the sum over all devices, for the tokens of this device.
    """
    return outputs if size("expert") == 1 else lax.psum_scatter(outputs, "expert", scatter_dimension=0, tiled=True)
