"""Embedding and cross-entropy, with a vocabulary that the devices of the mesh axis "tensor" may have divided."""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from stickjax.parallel.collectives import first_of, reduce_from_tensor_parallel, size


def _local(ids, count: int):
    """The ids as indices into this device's `count` entries, and which of them are there."""
    ids = ids - first_of("tensor", count)
    here = (ids >= 0) & (ids < count)
    return jnp.where(here, ids, 0), here


def embedded(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The rows of the tokens."""
    if size("tensor") == 1:
        return table[tokens]
    tokens, here = _local(tokens, table.shape[0])
    return reduce_from_tensor_parallel(jnp.where(here[..., None], table[tokens], 0))


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """log(sum_v exp(logits_v)) - logits_target, of logits of which a device may have its own part of V.

    >>> cross_entropy(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), jnp.int32)).tolist() == [[float(jnp.log(4.0))]]
    True
    """
    if size("tensor") == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    largest = lax.pmax(jax.lax.stop_gradient(logits).max(-1), "tensor")
    targets, here = _local(targets, logits.shape[-1])
    wanted = jnp.where(here, jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], 0)
    return (
        jnp.log(reduce_from_tensor_parallel(jnp.exp(logits - largest[..., None]).sum(-1)))
        + largest
        - reduce_from_tensor_parallel(wanted)
    )
