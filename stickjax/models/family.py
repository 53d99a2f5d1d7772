"""The protocol of a family of models: the methods that the rest of the project calls."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from stickjax.config import Config
from stickjax.config.family import FamilyConfig
from stickjax.models.parameters import Parameter


class Family(ABC):
    """A family of models. A subclass must have `config`, `init`, `apply` and `loss`; the rest has defaults.

    A model is a Flax module. Its field `config` is an instance of the class `Family.config`. The families are listed in
    `stickjax.models.families`.
    """

    config: ClassVar[type[FamilyConfig]]
    # {class of module: {name: Parameter}}, the rows that this family adds to the table of
    # `stickjax.models.parameters`.
    parameters: ClassVar[Mapping[str, Mapping[str, Parameter]]] = {}

    @abstractmethod
    def init(self, config, key: jax.Array):
        """Return a new model, which is also the pytree of its parameters."""

    @abstractmethod
    def apply(self, model, batch: dict[str, jax.Array], key: jax.Array | None = None):
        """Run a model on a batch.

        With a key, the model runs in training mode. The output has `logits`, in float32. A model that halts tokens also
        returns `depth`.
        """

    @abstractmethod
    def loss(self, model, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, dict[str, Any]]:
        """Return the loss of a batch, and its metrics: `loss` (the cross-entropy alone) and other values for the log.

        With gradient accumulation, the caller sets `batch["loss_scale"]` to 1 / (number of targets in the whole batch)
        and `batch["share"]` to 1 / (number of microbatches). Multiply sums over targets by `loss_scale`, and means by
        `share`. Then the sum over the microbatches is the value of the whole batch. On a mesh, sum over the devices
        with `stickjax.parallel.collectives.psum_over_batch`.
        """

    def scalars(self, model, metrics: dict[str, Any]) -> dict[str, jax.Array]:
        """Return the metrics of a whole batch as scalars for the log."""
        del model
        return metrics

    def gradient_free_update(self, model, metrics: dict[str, Any], trainable: Callable[[str], bool]):
        """Update the parameters that have an update rule instead of a gradient, and return the model.

        `metrics` are what `loss` returned; `trainable(name)` says whether a parameter may move.
        """
        del metrics, trainable
        return model

    def example_batch(self, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of the largest batch of a step. The default is a batch of text."""
        types = dict(tokens=jnp.int32, targets=jnp.int32, segment_ids=jnp.int32, loss_mask=jnp.bool_)
        shape = (config.data.B, config.data.T)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}

    def parameter_counts(self, config) -> tuple[int, int]:
        """Return the number of all parameters, and of the active ones.

        Active parameters are the ones that one token uses, without the embedding. The default counts all parameters as
        active: override it if the family has an embedding, or experts that a token does not use.
        """
        shapes = jax.eval_shape(lambda: self.init(config, jax.random.key(0)))
        total = sum(x.size for x in jax.tree.leaves(shapes))
        return total, total

    def flops_per_token(self, config, T: int) -> float:
        """Return the floating-point operations of a training step per token, in sequences of T tokens.

        The forward and the backward pass both count.
        """
        del T
        return 6 * self.parameter_counts(config)[1]

    def empty_cache(self, config, batch: int, size: int):
        """Return an empty cache for `decode_step`, for up to `size` tokens of `batch` sequences."""
        del batch, size
        raise ValueError(f"a model of family={config.family!r} generates no text")

    def decode_step(self, model, tokens, segment_ids, cache):
        """Read `tokens` [B,T] into the cache. Return (logits [B,V] after the last token, the cache).

        Padding has a negative segment id.
        """
        del tokens, segment_ids, cache
        raise ValueError(f"a model of family={model.config.family!r} generates no text")
