"""Top-down production with latent trees: a translation is a binary tree, and its probability a sum over all trees."""

from stickjax.models.latent_tree.chart import log_likelihood
from stickjax.models.latent_tree.decoder import Production
from stickjax.models.latent_tree.family import LatentTree, apply, decode, init, loss
from stickjax.models.latent_tree.model import LatentTreeModel, sentence_log_likelihood
from stickjax.models.latent_tree.viterbi import Derivation, viterbi

__all__ = [
    "Derivation", "LatentTree", "LatentTreeModel", "Production", "apply", "decode", "init", "log_likelihood", "loss",
    "sentence_log_likelihood", "viterbi",
]  # fmt: skip
