"""The family of latent-tree models: the methods that training, planning and evaluation call."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from stickjax.config import Config
from stickjax.config.latent_tree import TreeConfig
from stickjax.models.family import Family
from stickjax.models.latent_tree.decoder import Production
from stickjax.models.latent_tree.model import LatentTreeModel, sentence_log_likelihood
from stickjax.models.latent_tree.viterbi import Derivation, viterbi
from stickjax.models.ordered_memory.parse import Tree, induced_tree
from stickjax.models.parameters import Parameter
from stickjax.parallel.collectives import psum_over_batch


def init(config: TreeConfig, key: jax.Array) -> LatentTreeModel:
    """Return a new model with random parameters. The model is a pytree of its parameters.

    >>> model = init(TreeConfig(V=14, V_target=7, H=8, N=1, depth=2, encoder="gru"), jax.random.key(0))
    >>> model.decoder.w_out.shape
    (16, 32)
    """
    return LatentTreeModel(config, key)


def apply(model: LatentTreeModel, batch: dict[str, jax.Array], key: jax.Array | None = None) -> Production:
    """Return the scores of all words at all nodes of the tree, for the sources of a batch, as a `Production`.

    `batch` has `source` [B,S], padded with 0 on the right. For encoder="tree" it also has `brackets` [B,S]: how many
    brackets close after each word. With a random key, the model runs in training mode, with dropout.

    >>> model = init(TreeConfig(V=14, V_target=7, H=8, N=1, depth=2, encoder="gru"), jax.random.key(0))
    >>> output = jax.jit(apply)(model, {"source": jnp.array([[3, 4, 0]])})
    >>> output.logits.shape, output.attention.shape
    ((1, 7, 7), (1, 7, 3))
    """
    return model(batch, key)


def loss(
    model: LatentTreeModel, batch: dict[str, jax.Array], key: jax.Array | None
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """Return the loss of a batch, and its metrics.

    The loss of one pair of a source and a target is -log p(target | source) divided by the number of target words. Here
    p is the sum of the probabilities of all trees that have the target words at their leaves. The loss of a pair does
    not depend on the other pairs of the batch. The loss of the batch is the mean over all pairs whose target has at
    least one word.

    Args:
      model: a latent-tree model.
      batch: as in `apply`, and also `target` [B,T], padded with 0 on the right.
      key: the random key of a training step (for dropout); None for inference.

    Returns:
      The loss, and the metrics `loss` (the same value) and `sentence_nll` (the mean of -log p(target | source)).

    Raises:
      ValueError: T, the length of the padded targets, is larger than 2^depth, the number of leaves of a complete tree.

    >>> model = init(TreeConfig(V=14, V_target=7, H=8, N=1, depth=2, encoder="gru"), jax.random.key(0))
    >>> batch = {"source": jnp.array([[3, 4, 0]]), "target": jnp.array([[2, 6, 0, 0]])}
    >>> value, metrics = jax.jit(loss)(model, batch, None)
    >>> sorted(metrics)
    ['loss', 'sentence_nll']
    """
    target = batch["target"]
    model.config.check_words(target.shape[1])
    lengths = (target != 0).sum(1)
    nll = -sentence_log_likelihood(apply(model, batch, key).logits, target)
    nll = jnp.where(lengths > 0, nll, 0)
    sums = jnp.stack([(nll / jnp.maximum(lengths, 1)).sum(), nll.sum(), (lengths > 0).sum().astype(nll.dtype)])
    per_word, per_sentence, count = psum_over_batch(sums)
    mean = per_word / jnp.maximum(count, 1)
    return mean, {"loss": mean, "sentence_nll": per_sentence / jnp.maximum(count, 1)}


@partial(jax.jit, static_argnames="limit")
def decode(model: LatentTreeModel, batch: dict[str, jax.Array], limit: int | None = None) -> Derivation:
    """Return the most probable derivation of a target for every source of a batch: a tree with a word at every leaf.

    The words of this derivation are not always the most probable sentence, because the probability of a sentence is a
    sum over all its derivations.

    Args:
      model: a latent-tree model.
      batch: as in `apply`.
      limit: the largest number of words; None: 2^depth, the number of leaves of the complete tree.

    >>> model = init(TreeConfig(V=14, V_target=7, H=8, N=1, depth=2, encoder="gru"), jax.random.key(0))
    >>> decode(model, {"source": jnp.array([[3, 4, 0]])}, limit=3).words.shape
    (1, 3)
    """
    return viterbi(apply(model, batch).logits, 2**model.config.depth if limit is None else limit)


@jax.jit
def _slots(model: LatentTreeModel, batch) -> jax.Array:
    return model.encoder(batch).slots


_vector = lambda axes: Parameter(axes, label="vector")  # noqa: E731
_TABLES = {"embed": Parameter("V D", label="embedding"), "values": Parameter("V D", label="embedding")}
_PARAMETERS = {
    "OrderedMemoryEncoder": _TABLES,
    "TreeEncoder": _TABLES | {"join": Parameter("2D 5D"), "join_bias": _vector("5D")},
    "RecurrentEncoder": _TABLES | {"w_root": Parameter("ND D"), "root_bias": _vector("D")},
    # The axis P has the two directions. U is 3 H / 2: each direction has three gates with H/2 units.
    "BidirectionalGRU": {
        "input": Parameter("P D U"),
        "input_bias": _vector("P U"),
        "recurrent": Parameter("P D/2 U"),
        "recurrent_bias": _vector("P U"),
    },
    "OrderedMemory": {
        "w_project": Parameter("D D"),
        "project_bias": _vector("D"),
        "w_in": Parameter("2D 4D"),
        "in_bias": _vector("4D"),
        "w_out": Parameter("4D 4 D"),
        "out_bias": _vector("4 D"),
    },
    "SlotDistribution": {
        "query": Parameter("D D"),
        "query_bias": _vector("D"),
        "key": Parameter("D D"),
        "key_bias": _vector("D"),
        "weight": Parameter("D 1"),
        "bias": _vector("1"),
    },
    "TreeAttention": {
        "query": Parameter("D D"),
        "query_bias": _vector("D"),
        "key": Parameter("D D"),
        "key_bias": _vector("D"),
    },
    "TreeDecoder": {
        "root": Parameter("D D"),
        "root_bias": _vector("D"),
        "w_in": Parameter("2D 2D"),
        "in_bias": _vector("2D"),
        "w_out": Parameter("2D 4D"),
        "out_bias": _vector("4D"),
        "leaf": Parameter("2D 2"),
        "leaf_bias": _vector("2"),
        "unembed": Parameter("V D", label="embedding"),
    },
}


class LatentTree(Family):
    """The family of latent-tree models, which translate a source into a target by building a binary tree."""

    config = TreeConfig
    parameters = _PARAMETERS

    def init(self, config: TreeConfig, key) -> LatentTreeModel:
        return init(config, key)

    def apply(self, model, batch, key=None) -> Production:
        return apply(model, batch, key)

    def loss(self, model, batch, key):
        return loss(model, batch, key)

    def predict(self, model, batch) -> jax.Array:
        return decode(model, batch).words

    def induced_trees(self, model, batch) -> dict[str, list[Tree]] | None:
        """Return {"source": a list of B trees}: the tree that the encoder induces over each of the B sources.

        Only the encoder "ordered_memory" induces trees. Return None for the other encoders.
        """
        if model.config.encoder != "ordered_memory":
            return None
        slots, source = jax.device_get((_slots(model, batch), batch["source"]))
        return {"source": [induced_tree(p[ids != 0]) for p, ids in zip(slots, source, strict=True)]}

    def example_batch(self, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        sentences = jax.ShapeDtypeStruct((config.data.B, config.data.T), jnp.int32)
        names = ("source", "target", *(["brackets"] if config.model.encoder == "tree" else []))
        return dict.fromkeys(names, sentences)

    def parameter_counts(self, config: TreeConfig) -> tuple[int, int]:
        """Return (the number of all parameters, the number of active parameters).

        All parameters are active, except the two embeddings of the source words.
        """
        total, _ = super().parameter_counts(config)
        return total, total - 2 * config.vocabulary * config.H

    def flops_per_token(self, config: TreeConfig, T: int) -> float:
        """Return the floating-point operations of a training step per word, for sources and targets of T words.

        Only matrix products count. Their backward pass counts as twice the forward pass. The decoder always computes
        all nodes of the complete tree, for targets of any length.
        """
        H, N, n = config.H, config.N, 2 ** (config.depth + 1) - 1
        bank, of_word = {
            # the GRU, the projection, the distribution, the cells
            "ordered_memory": (N * T, 3 * H**2 + 3 * H**2 / 2 + 2 * H**2 + N * H**2 + N * 24 * H**2),
            "tree": (2 * T, 10 * H**2),
            "gru": (T, N * (3 * H**2 + 3 * H**2 / 2)),
        }[config.encoder]
        of_node = H**2 + 2 * bank * H + 2 * T * H + H * config.target_vocabulary + 4 * H
        of_parent = 4 * H**2 + 8 * H**2
        keys = (bank + T) * H**2
        return 6 * (of_word + (n * of_node + n // 2 * of_parent + keys) / T)
