"""The protocol of a family of models: all that the rest of the project asks of a model."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from stickjax.config import Config
from stickjax.config.family import FamilyConfig
from stickjax.models.parameters import Parameter


class Family:
    """A family of models. A subclass must have `config`, `init`, `apply` and `loss`; the rest has defaults.

    A model is a Flax module whose field `config` is an instance of the class `config`. `stickjax.models.families`
    lists the families.
    """

    config: ClassVar[type[FamilyConfig]]
    # {class of module: {name: Parameter}}, what the family adds to the table of `stickjax.models.parameters`.
    parameters: ClassVar[Mapping[str, Mapping[str, Parameter]]] = {}

    def init(self, config, key: jax.Array):
        """The parameters of a new model, as a pytree that is also the model."""
        raise NotImplementedError

    def apply(self, model, batch: dict[str, jax.Array], key: jax.Array | None = None):
        """Run a model on a batch.

        With a key it is a step of training. The output has `logits`, in float32; one that halts tokens has `depth`.
        """
        raise NotImplementedError

    def loss(self, model, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, dict[str, Any]]:
        """The loss of a batch, and metrics: `loss` (the cross-entropy alone) and what else the run logs.

        For a microbatch, `batch["loss_scale"]` stands for 1 / (targets of the whole batch), and `batch["share"]` for
        1 / (number of microbatches): the losses and the metrics of all microbatches add up to those of the batch.
        """
        raise NotImplementedError

    def scalars(self, model, metrics: dict[str, Any]) -> dict[str, jax.Array]:
        """The metrics of a whole batch as scalars for the log."""
        del model
        return metrics

    def moved_without_gradient(self, model, metrics: dict[str, Any], trainable: Callable[[str], bool]):
        """The model after the parameters moved that have a rule instead of a gradient.

        `metrics` are what `loss` returned; `trainable(name)` says whether a parameter may move.
        """
        del metrics, trainable
        return model

    def example_batch(self, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of the largest batch of a step; by default of a text."""
        types = dict(tokens=jnp.int32, targets=jnp.int32, segment_ids=jnp.int32, loss_mask=jnp.bool_)
        shape = (config.data.B, config.data.T)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}

    def parameter_counts(self, config) -> tuple[int, int]:
        """The number of all parameters, and of the active ones: those that work on one token, without the embedding."""
        shapes = jax.eval_shape(lambda: self.init(config, jax.random.key(0)))
        total = sum(x.size for x in jax.tree.leaves(shapes))
        return total, total

    def flops_per_token(self, config, T: int) -> float:
        """Floating-point operations of a training step, forward and backward, per token of a sequence of T tokens."""
        del T
        return 6 * self.parameter_counts(config)[1]

    def empty_cache(self, config, batch: int, size: int):
        """For `decode_step`: what a language model keeps of up to `size` tokens of `batch` sequences."""
        del batch, size
        raise ValueError(f"a model of family={config.family!r} generates no text")

    def decode_step(self, model, tokens, segment_ids, cache):
        """(logits [B,V] after the last of `tokens` [B,T], the cache with them); a negative segment id is padding."""
        del tokens, segment_ids, cache
        raise ValueError(f"a model of family={model.config.family!r} generates no text")
