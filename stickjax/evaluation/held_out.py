"""The compiled evaluation of a language model: the loss of the targets in windows of held-out text."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from stickjax.models.families import family_of


@jax.jit
def target_sums(model: nnx.Module, windows: jax.Array, target_mask: jax.Array) -> dict[str, jax.Array]:
    """Predict each token of a batch of texts from the previous tokens, and return sums over the batch.

    Args:
      model: the module with the parameters.
      windows: token ids [B,T+1]. In each row, the first T tokens are inputs, and the last T tokens are targets.
      target_mask: [B,T], True for the targets that count, and False for padding.

    Returns:
      {"nll": the sum of the negative log-likelihoods of the targets, in nats}. For a model that halts tokens, such
      as a Universal Transformer, also "depth": the sum of the depths of the input tokens whose targets count. The depth
      of a token is the expected number of blocks that are applied to it, given its halting probabilities.
    """
    output = family_of(model.config).apply(model, {"tokens": windows[:, :-1]})
    by_token = {"nll": optax.softmax_cross_entropy_with_integer_labels(output.logits, windows[:, 1:])}
    if (depth := getattr(output, "depth", None)) is not None:
        by_token["depth"] = depth
    return {name: jnp.where(target_mask, values, 0).sum() for name, values in by_token.items()}
