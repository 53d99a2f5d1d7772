"""Embedding, cross-entropy and argmax, also for a vocabulary that is sharded over the mesh axis "tensor"."""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from stickjax.parallel.collectives import first_of, reduce_from_tensor_parallel, size


def _local(ids, count: int):
    """Convert token ids to indices into the part of the vocabulary on this device, which has `count` token ids.

    Return the indices, and a mask that is True for the token ids in this part. All other token ids get the index 0.
    """
    ids = ids - first_of("tensor", count)
    here = (ids >= 0) & (ids < count)
    return jnp.where(here, ids, 0), here


def embedded(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Return the row of the embedding `table` for every token id.

    If the V rows are sharded over the mesh axis "tensor", every device has a part of the rows, and gets the whole
    result.
    """
    if size("tensor") == 1:
        return table[tokens]
    tokens, here = _local(tokens, table.shape[0])
    return reduce_from_tensor_parallel(jnp.where(here[..., None], table[tokens], 0))


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Compute the cross-entropy of every target: log(sum_v exp(logits_v)) - logits_target.

    If the V logits are sharded over the mesh axis "tensor", every device has a part of the logits, and gets the whole
    result.

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


def is_most_likely(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Return True for every target that is the argmax of its logits. Of equal logits, the smallest token id counts.

    If the V logits are sharded over the mesh axis "tensor", every device has a part of the logits, and gets the whole
    result.

    >>> is_most_likely(jnp.array([[[0.0, 2.0, 2.0]]]), jnp.array([[1]])).item()
    True
    """
    ids, own, here = lax.broadcasted_iota(jnp.int32, logits.shape, 2), targets, True
    if size("tensor") > 1:
        ids += first_of("tensor", logits.shape[-1])
        own, here = _local(targets, logits.shape[-1])
    wanted = jnp.where(here, jnp.take_along_axis(logits, own[..., None], axis=-1)[..., 0], 0)
    wanted = (reduce_from_tensor_parallel(wanted) if size("tensor") > 1 else wanted)[..., None]
    worse = (logits < wanted) | ((logits == wanted) & (ids >= targets[..., None]))  # False for NaN
    return reduce_from_tensor_parallel((~worse).any(-1).astype(jnp.int32)) == 0
