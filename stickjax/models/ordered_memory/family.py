"""The family of Ordered Memory classifiers: the methods that training, planning and evaluation call."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stickjax.config import Config, OrderedMemoryConfig
from stickjax.models.family import Family
from stickjax.models.ordered_memory.model import ClassifierOutput, OrderedMemoryClassifier
from stickjax.models.ordered_memory.parse import Tree, induced_tree
from stickjax.models.parameters import Parameter
from stickjax.parallel.collectives import psum_over_batch


@jax.jit
def _distributions(model: OrderedMemoryClassifier, batch: dict[str, jax.Array]) -> jax.Array:
    return model(batch).p


class OrderedMemory(Family):
    """The family of classifiers with an Ordered Memory encoder. They classify a sentence or a pair of sentences."""

    config = OrderedMemoryConfig
    parameters = {
        "OrderedMemoryClassifier": {"embed": Parameter("V D", label="embedding")},
        "Encoder": {"w_in": Parameter("D H"), "in_bias": Parameter("H", label="vector")},
        "Distribution": {
            "query": Parameter("H H"),
            "query_bias": Parameter("H", label="vector"),
            "key": Parameter("H H"),
            "key_bias": Parameter("H", label="vector"),
            "weight": Parameter("H 1"),
            "bias": Parameter("1", label="vector"),
        },
        "Cell": {
            "w_in": Parameter("2H 4H"),
            "in_bias": Parameter("4H", label="vector"),
            "w_out": Parameter("4H 4H"),
            "out_bias": Parameter("4H", label="vector"),
        },
        "Classifier": {
            "w_in": Parameter("D F"),
            "in_bias": Parameter("F", label="vector"),
            "w_out": Parameter("F classes"),
            "out_bias": Parameter("classes", label="vector"),
        },
    }

    def init(self, config: OrderedMemoryConfig, key) -> OrderedMemoryClassifier:
        return OrderedMemoryClassifier(config, key)

    def apply(self, model: OrderedMemoryClassifier, batch, key=None) -> ClassifierOutput:
        return model(batch, key)

    def loss(self, model: OrderedMemoryClassifier, batch, key):
        """Return the mean cross-entropy of the labels, and the metrics `loss` (the same value) and `accuracy`."""
        logits, labels = model(batch, key).logits, batch["label"]
        count = psum_over_batch(jnp.float32(len(labels)))
        nll = psum_over_batch(optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()) / count
        right = psum_over_batch((logits.argmax(-1) == labels).astype(jnp.float32).sum())
        return nll, {"loss": nll, "accuracy": right / count}

    def induced_trees(self, model: OrderedMemoryClassifier, batch) -> dict[str, list[Tree]]:
        names = ("left", "right") if model.config.sentences == 2 else ("tokens",)
        p = jax.device_get(_distributions(model, batch)).reshape(len(names), *batch[names[0]].shape, -1)
        masks = [np.asarray(batch[name]) != 0 for name in names]
        return {
            name: [induced_tree(one[keep]) for one, keep in zip(own, mask, strict=True)]
            for name, own, mask in zip(names, p, masks, strict=True)
        }

    def example_batch(self, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        names = ("left", "right") if config.model.sentences == 2 else ("tokens",)
        sentence = jax.ShapeDtypeStruct((config.data.B, config.data.T), jnp.int32)
        return dict.fromkeys(names, sentence) | {"label": jax.ShapeDtypeStruct((config.data.B,), jnp.int32)}

    def parameter_counts(self, config: OrderedMemoryConfig) -> tuple[int, int]:
        """Return (the number of all parameters, the number of active parameters).

        All parameters are active, except the embedding.
        """
        total, _ = super().parameter_counts(config)
        return total, total - config.vocabulary * config.D

    def flops_per_token(self, config: OrderedMemoryConfig, T: int) -> float:
        """Return the floating-point operations of a training step per token.

        The matrices of the cell have 24 H^2 parameters, and the key matrix in `Distribution` has H^2 parameters. All
        these parameters are used N times for every token. A batch of B pairs of sentences counts as B T tokens. So for
        pairs, the result is the work for two tokens together: one of the left and one of the right sentence.
        """
        del T
        c = config
        per_token = c.D * c.H + c.H * c.H + c.N * (24 * c.H * c.H + c.H * c.H)
        return 6.0 * per_token * c.directions * c.sentences
