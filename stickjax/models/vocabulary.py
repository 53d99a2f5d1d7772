"""The embedding of tokens, and the scores of target tokens.

The functions also work if the vocabulary is sharded over the mesh axis "tensor".
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from stickjax.parallel.collectives import first_of, reduce_from_tensor_parallel, size

LARGEST_LOGITS = 2**27  # the largest number of logits that a device computes at once: 512 MiB of float32


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


class TargetScores(NamedTuple):
    """Numbers that say how well a model predicts each target of a batch. Each field is an array [B,T].

    `nll`: the negative log-likelihood (cross-entropy) in nats, log(sum_v exp(logits_v)) - logits_target.
    `log_z`: log(sum_v exp(logits_v)), whose mean square is the z-loss of the logits.
    `is_most_likely`: bool, whether the target is the argmax of the logits. Of equal logits, the smallest id counts.
    """

    nll: jax.Array
    log_z: jax.Array
    is_most_likely: jax.Array


def target_scores(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> TargetScores:
    """Compute the `TargetScores` of `targets` from the logits.

    If the V logits are sharded over the mesh axis "tensor", every device has a part of the logits, and gets the whole
    result.

    >>> scores = target_scores(jnp.array([[[0.0, 2.0, 2.0]]]), jnp.array([[1]]))
    >>> round(scores.nll.item(), 4), round(scores.log_z.item(), 4), scores.is_most_likely.item()
    (0.7586, 2.7586, True)
    """
    sharded = size("tensor") > 1
    ids, own, here = lax.broadcasted_iota(jnp.int32, logits.shape, 2), targets, True
    largest = lax.stop_gradient(logits).max(-1)
    if sharded:
        ids += first_of("tensor", logits.shape[-1])
        own, here = _local(targets, logits.shape[-1])
        largest = lax.pmax(largest, "tensor")
    total = reduce_from_tensor_parallel if sharded else lambda x: x
    wanted = total(jnp.where(here, jnp.take_along_axis(logits, own[..., None], axis=-1)[..., 0], 0))
    log_sum = jnp.log(total(jnp.exp(logits - largest[..., None]).sum(-1)))
    worse = logits < wanted[..., None]  # False for NaN
    worse |= (logits == wanted[..., None]) & (ids >= targets[..., None])
    missed = total((~worse).any(-1).astype(jnp.int32))
    return TargetScores(log_sum - (wanted - largest), log_sum + largest, missed == 0)


def scores_in_pieces(
    logits: Callable[[Float[Array, "B t D"]], Float[Array, "B t V"]],
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    V: int,
) -> TargetScores:
    """Return `target_scores(logits(x), targets)`. If there are many logits, compute them in pieces.

    If B * T * V is above LARGEST_LOGITS, the T positions are cut into equal pieces, and one piece is computed after the
    other. Then no array has the logits of all positions. The backward pass computes the logits of each piece again, so
    it needs no such array either. A step then takes 8 B T D V operations for the output matrix instead of 6. The
    results are the same, except for rounding.

    Args:
      logits: a function that computes the logits of any positions from their final states.
      x: the final states of all positions.
      targets: the token id that follows each position.
      V: the number of logits of a position on this device.
    """
    B, T = targets.shape
    pieces = min(T, -(-B * T * V // LARGEST_LOGITS))
    if pieces <= 1:
        return target_scores(logits(x), targets)
    t = -(-T // pieces)

    def cut(a):  # [B,T,..] to [pieces,B,t,..]
        a = jnp.pad(a, [(0, 0), (0, -T % t)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, -1, t, *a.shape[2:]), 1, 0)

    @partial(jax.checkpoint, prevent_cse=False)  # inside a loop, XLA cannot merge the two computations of the logits
    def piece(arrays):
        return target_scores(logits(arrays[0]), arrays[1])

    scores = lax.map(piece, (cut(x), cut(targets)))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B, -1)[:, :T], scores)
