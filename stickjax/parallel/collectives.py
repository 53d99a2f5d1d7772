"""The collectives that models call, with their gradients. They run inside the shard_map of `training/gradients.py`.

On a single device there is no communication. On a mesh, gradients follow two rules.

Mesh axes that shard the batch ("data", "fsdp", "expert" and "context"): every device has its own tokens. The devices
compute sums over the batch by a psum, so they all get the same loss. In the backward pass, a device computes the
gradient of this loss with respect to its own summand. This needs no communication, so `psum_over_batch` has no psum in
its backward pass. `all_gather` is different: after it, all devices compute with the array of every device. So the
gradient of an array is the sum of the gradients from all devices, and the backward pass of `all_gather` computes it.

Mesh axis "tensor": every device has the same tokens and the same loss, but only a part of the heads and hidden units. A
layer calls `copy_to_tensor_parallel` on its input, computes its part, and calls `reduce_from_tensor_parallel` on its
output. The backward pass of `reduce_from_tensor_parallel` has no psum, because all devices compute the gradient of the
same loss: a psum would count this gradient once per device.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arguments import sum_type
from stickjax.parallel.mesh import BATCH_AXES, ROW_AXES


def size(axis: str) -> int:
    """Return the number of devices along the mesh axis `axis`. Outside of a shard_map over this axis, return 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def several(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the mesh axes among `axes` that have more than one device. Only these axes need a collective."""
    return tuple(axis for axis in axes if size(axis) > 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def all_gather(x, name: str, axis: int, dtype):
    """All-gather x over the mesh axis `name`: concatenate the arrays x of all devices along the array axis `axis`.

    x is first converted to `dtype`. The backward pass is a reduce-scatter: it sums the gradients from all devices in
    fp32. Every device gets the part of the sum that is the gradient of its own x, in the dtype of x before conversion.
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


def rows_of_device(x):
    """Return the rows of x that this device works on. Every device must have the complete array x.

    The rows are sharded over the same mesh axes as the sequences of a batch. `all_rows` is the reverse.
    """
    axes = several(ROW_AXES)
    if not axes:
        return x
    rows = len(x) // math.prod(map(size, axes))
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * rows, rows)


def all_rows(logits):
    """All-gather `logits`: this device has a part of the B rows and of the V columns. Return the whole array [B,V]."""
    if size("tensor") > 1:
        logits = lax.all_gather(logits, "tensor", axis=1, tiled=True)
    axes = several(ROW_AXES)
    return lax.all_gather(logits, axes, tiled=True) if axes else logits


def sums_of_all_rows(x):
    """Sum x [B,T] over the T tokens of each row. Return the sums [B] of the rows of all devices.

    Every device has some rows of x. The tokens of a row may be sharded over the mesh axis "context".
    """
    found = x.sum(1)
    if size("context") > 1:
        found = lax.psum(found, "context")
    axes = several(ROW_AXES)
    return lax.all_gather(found, axes, tiled=True) if axes else found


def psum_over_batch(tree):
    """Return the psum of every array in a pytree, over all mesh axes that shard the batch.

    The backward pass returns the gradient unchanged, without a second psum: every device computes only the gradient
    with respect to its own summand. `stickjax.training.gradients` adds the gradients of all devices at the end.
    """
    axes = several(BATCH_AXES)
    return _sum(tree, axes) if axes else tree


def copy_to_tensor_parallel(tree):
    """Return the arrays of a pytree unchanged; in the backward pass, psum their gradients over the mesh axis "tensor".

    A layer calls this function on its input. Then every device along "tensor" computes a part of the heads or hidden
    units from this input. So the gradient of the input is the sum of the gradients from all devices.
    """
    return tree if size("tensor") == 1 else _sum_gradients(tree, "tensor")


def reduce_from_tensor_parallel(x):
    """Compute the psum of x over the mesh axis "tensor"; in the backward pass, return the gradient unchanged.

    Every device along "tensor" computes a part of the heads or hidden units of a layer. x is the contribution of this
    part to the output of the layer. So the psum of x is the output.
    """
    return x if size("tensor") == 1 else _sum(x, "tensor")


def first_of(axis: str, count: int):
    """Return the index of the first expert that this device has, among the experts of all devices.

    Every device along the mesh axis `axis` has `count` experts. Device 0 has the experts 0 to `count` - 1, device 1 has
    the next `count` experts, and so on. A vocabulary can be divided in the same way. Then `count` is the number of
    token ids of a device, and the result is the first token id of this device.
    """
    return lax.axis_index(axis) * count if size(axis) > 1 else 0


def all_gather_for_experts(tokens, expert_indices, gates, count: int):
    """All-gather the tokens and their routing over the mesh axis "expert". Return (tokens, expert_indices, gates).

    With P devices along the axis, every device gets the P * T tokens of all these devices. Then it can compute its own
    experts for all of them.

    Args:
      tokens: [T,D], the tokens of this device.
      expert_indices: [T,k], for every token the indices of its k experts, among the experts of all devices.
      gates: [T,k], the weights of these experts.
      count: the number of experts on each device.

    Returns:
      tokens [P*T,D], expert_indices [P*T,k] and gates [P*T,k]. In this result, an index from 0 to `count` - 1 is an
      expert of this device. The index `count` stands for an expert of another device, or for no expert.

    The all-gather sends every token to the P - 1 other devices. An all-to-all of the (token, choice) pairs would send
    every token k * (P - 1) / P times on average. This is more than P - 1 if k is larger than P.
    """
    if size("expert") == 1:
        return tokens, expert_indices, gates
    tokens, gates = (all_gather(x, "expert", 0, x.dtype) for x in (tokens, gates))
    indices = lax.all_gather(expert_indices, "expert", tiled=True) - first_of("expert", count)
    return tokens, jnp.where((indices >= 0) & (indices < count), indices, count), gates


def reduce_scatter_from_experts(outputs):
    """Sum the outputs of all experts for every token of this device, by a reduce-scatter over the mesh axis "expert".

    `outputs` [P*T,D] has the outputs of this device's experts, for the tokens of all P devices along the axis. The
    result [T,D] has the sums over the experts of all devices, for the T tokens of this device.
    """
    return outputs if size("expert") == 1 else lax.psum_scatter(outputs, "expert", scatter_dimension=0, tiled=True)
