"""The latent-tree model: an encoder of the source sentence, and a top-down decoder of the target sentence."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from stickjax.config.latent_tree import TreeConfig
from stickjax.models.latent_tree.chart import log_likelihood
from stickjax.models.latent_tree.decoder import Production, TreeDecoder
from stickjax.models.latent_tree.encoder import ENCODERS


class LatentTreeModel(nnx.Module):
    """A model of the probability of a target sentence, given a source sentence.

    This probability is the sum of the probabilities of all binary trees that have the target words at their leaves.
    Tan et al., `Recursive Top-Down Production for Sentence Generation with Latent Trees
    <https://arxiv.org/abs/2010.04704>`_.
    """

    def __init__(self, config: TreeConfig, key):
        self.config = config
        k_encoder, k_decoder = jax.random.split(key)
        self.encoder = ENCODERS[config.encoder](config, k_encoder)
        self.decoder = TreeDecoder(config, k_decoder)

    def __call__(self, batch: dict[str, jax.Array], key=None) -> Production:
        """Return the scores of all words at all nodes of the tree, for the sources of a batch.

        `batch` has `source` [B,S], padded with 0 on the right. For encoder="tree" it also has `brackets` [B,S]: how
        many brackets close after each word. With a random key, the model runs in training mode, with dropout.
        """
        k_encoder, k_decoder = (None, None) if key is None else jax.random.split(key)
        return self.decoder(self.encoder(batch, k_encoder), k_decoder)


def sentence_log_likelihood(logits: Float[Array, "B n V"], target: Int[Array, "B T"]) -> Float[Array, " B"]:
    """Compute the log-probability of every target sentence, from the scores of all words at all nodes.

    `logits` are these scores, as in `Production`. `target` has word ids, padded with 0 on the right. The result is -inf
    for a target without words, or with more words than the complete tree has leaves.

    >>> logits = jnp.log(jnp.array([[[0.0, 0.3, 0.2], [0.0, 0.2, 0.4], [0.0, 0.4, 0.2]]]))
    >>> round(float(jnp.exp(sentence_log_likelihood(logits, jnp.array([[2, 1]])))[0]), 4)  # 0.4 * 0.4
    0.16
    """
    # Multiply by a one-hot array instead of indexing: the derivative is then a matrix product, and not a scatter.
    is_word = jax.nn.one_hot(target, logits.shape[-1], dtype=logits.dtype)
    finite = jnp.maximum(logits, jnp.finfo(logits.dtype).min / 2)  # 0 * -inf would be NaN
    scores = jnp.einsum("BnV,BTV->BnT", finite, is_word, precision=jax.lax.Precision.HIGHEST)
    return log_likelihood(scores, (target != 0).sum(1))
