"""The latent-tree model for translation (arXiv 2010.04704): a target's probability is a sum over all binary trees."""

from stickjax.models.latent_tree.chart import log_likelihood
from stickjax.models.latent_tree.decoder import Production
from stickjax.models.latent_tree.family import LatentTree, apply, decode, init, loss
from stickjax.models.latent_tree.model import LatentTreeModel, sentence_log_likelihood
from stickjax.models.latent_tree.viterbi import Derivation, viterbi

__all__ = [
    "Derivation", "LatentTree", "LatentTreeModel", "Production", "apply", "decode", "init", "log_likelihood", "loss",
    "sentence_log_likelihood", "viterbi",
]  # fmt: skip
