"""The communication of a model across devices, inside the shard_map of `stickjax.training.gradients`.

On a single device there is none.

Gradients are computed as if every device had its own loss and the whole loss were their sum. So where an axis that
divides the batch gathers an array, the transpose sums its gradients. Along "tensor" all devices hold the same
activations and the same loss. A layer calls `copy_to_tensor_parallel` before it computes its part of the heads
or hidden units, and `reduce_from_tensor_parallel` after it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arguments import sum_type
from stickjax.parallel.mesh import BATCH_AXES


def size(axis: str) -> int:
    """The size of a mesh axis under which this code runs; 1 for any other axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def several(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes that have more than one device, so that no program has a collective over a single device."""
    return tuple(axis for axis in axes if size(axis) > 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def all_gather(x, name: str, axis: int, dtype):
    """All-gather x over the mesh axis `name` along its own `axis`, sent as `dtype`; gradients are summed in fp32."""
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
    """The psum of arrays over the batch. The gradient is of this device's part alone: see the module's docstring."""
    axes = several(BATCH_AXES)
    return _sum(tree, axes) if axes else tree


def copy_to_tensor_parallel(tree):
    """Copy to tensor parallel: the arrays themselves, whose gradients are summed over the devices of "tensor"."""
    return tree if size("tensor") == 1 else _sum_gradients(tree, "tensor")


def reduce_from_tensor_parallel(x):
    """Reduce from tensor parallel: the sum of the parts that the devices of "tensor" have computed."""
    return x if size("tensor") == 1 else _sum(x, "tensor")


def first_of(axis: str, count: int):
    """Index of the first of the `count` experts, or entries of the vocabulary, that this device holds along an axis."""
    return lax.axis_index(axis) * count if size(axis) > 1 else 0


def to_experts(tokens, expert_indices, gates, count: int):
    """Tokens [T,D] and their choices [T,k] of all devices of "expert", as this device's `count` experts see them.

    All other experts get the index `count`, which means no expert. Every token is sent to all P devices of the axis:
    P - 1 rows. An exchange of the routed rows alone would send k (P - 1) / P rows, which is more if P is below k.
    """
    if size("expert") == 1:
        return tokens, expert_indices, gates
    tokens, gates = (all_gather(x, "expert", 0, x.dtype) for x in (tokens, gates))
    indices = lax.all_gather(expert_indices, "expert", tiled=True) - first_of("expert", count)
    return tokens, jnp.where((indices >= 0) & (indices < count), indices, count), gates


def from_experts(outputs):
    """The sum over all experts for this device's own tokens [T,D], from what every device has of all tokens."""
    return outputs if size("expert") == 1 else lax.psum_scatter(outputs, "expert", scatter_dimension=0, tiled=True)
