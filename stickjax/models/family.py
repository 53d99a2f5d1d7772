"""The base class of all model families: the methods that training, evaluation, planning and generation call."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from stickjax.config import Config
from stickjax.config.family import FamilyConfig
from stickjax.models.parameters import Parameter
from stickjax.models.vocabulary import target_scores
from stickjax.parallel.mesh import ROW_AXES


class Family(ABC):
    """A family of models, such as decoders. A subclass must define `config`, `init`, `apply` and `loss`.

    All other methods have defaults. `config` is the class of the family's model configs. A model is a Flax module,
    whose field `config` is an instance of that class. `stickjax.models.families` lists the families.
    """

    config: ClassVar[type[FamilyConfig]]
    # {name of a module class: {name of a parameter: Parameter}}, the rows that this family adds to the table of
    # parameters in `stickjax.models.parameters`.
    parameters: ClassVar[Mapping[str, Mapping[str, Parameter]]] = {}

    @abstractmethod
    def init(self, config, key: jax.Array):
        """Return a new model for a model config, with random parameters. The model is a pytree of its parameters."""

    @abstractmethod
    def apply(self, model, batch: dict[str, jax.Array], key: jax.Array | None = None):
        """Run a model on a batch. With a random key, the model runs in training mode, for example with dropout.

        The result is an object with the field `logits`, in float32. If the number of blocks can differ from token to
        token, as in a Universal Transformer, the object also has `depth`: for every token, the mean number of blocks
        that were applied to it, weighted by the halting probabilities of the token.
        """

    @abstractmethod
    def loss(self, model, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, dict[str, Any]]:
        """Return the loss of a batch, and its metrics: `loss` (the cross-entropy alone) and other values for the log.

        `key` is a random key for a training step; None for inference. On a mesh, every device has only a part of the
        batch. So an implementation must add the sums of all devices with
        `stickjax.parallel.collectives.psum_over_batch`.

        With gradient accumulation, this method runs once per microbatch, and the caller adds the losses and the metrics
        of all microbatches. The batch then also has `loss_scale`, which is 1 / (number of targets in the whole batch),
        and `share`, which is 1 / (number of microbatches). An implementation must multiply its sums over targets by
        `loss_scale`, and its means by `share`. Then the results of all microbatches add up to the result for the whole
        batch.
        """

    def scalars(self, model, metrics: dict[str, Any]) -> dict[str, jax.Array]:
        """Convert the metrics of a whole batch, as `loss` returned them, to scalars for the log.

        The default returns them unchanged.
        """
        del model
        return metrics

    def gradient_free_update(self, model, metrics: dict[str, Any], trainable: Callable[[str], bool]):
        """Update the parameters that have an update rule instead of a gradient, and return the model.

        `metrics` are the metrics that `loss` returned. `trainable(name)` says whether the parameter with this name may
        change. The default returns the model unchanged.
        """
        del metrics, trainable
        return model

    def example_batch(self, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        """Return {name: shape and type} for the arrays of the largest batch that a training step can get.

        With these shapes, the training step can be compiled without data. The default is a batch of text: arrays [B,T],
        for B sequences of T tokens.
        """
        types = dict(tokens=jnp.int32, targets=jnp.int32, segment_ids=jnp.int32, loss_mask=jnp.bool_)
        shape = (config.data.B, config.data.T)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}

    def parameter_counts(self, config) -> tuple[int, int]:
        """Return (the number of all parameters, the number of active parameters).

        Active parameters are the parameters that one token uses, without the embedding. The default counts all
        parameters as active. Override this method if the family has an embedding, or experts that a token does not use.
        """
        shapes = jax.eval_shape(lambda: self.init(config, jax.random.key(0)))
        total = sum(x.size for x in jax.tree.leaves(shapes))
        return total, total

    def flops_per_token(self, config, T: int) -> float:
        """Return the number of floating-point operations that a training step takes per token.

        The forward and the backward pass both count. T is the number of tokens of a sequence. The default is 6
        operations per active parameter, for every T.
        """
        del T
        return 6 * self.parameter_counts(config)[1]

    def score(self, model, batch: dict[str, jax.Array], key=None):
        """Run the model on a batch of text, and return (the `TargetScores` of the batch, the output of the model).

        The batch has the arrays `tokens` and `targets` [B,T]. Evaluation calls this method without a key. The default
        calls `apply`, and computes the scores from the `logits` [B,T,V] of its output. Override it if these logits may
        need too much memory.
        """
        output = self.apply(model, batch, key)
        return target_scores(output.logits, batch["targets"]), output

    def predict(self, model, batch: dict[str, jax.Array]) -> jax.Array:
        """Return the predictions of the model for a batch of examples, in inference mode.

        A classifier returns the most probable label of every example [B]. A translation model returns the ids of the
        predicted targets [B,T], padded with 0 on the right. The default is for classifiers.
        """
        return self.apply(model, batch).logits.argmax(-1)

    def induced_trees(self, model, batch: dict[str, jax.Array]) -> dict[str, list] | None:
        """Return the binary trees that the model induces over the texts of a batch; None if it induces no trees.

        The result is {name of an array of token ids [B,T]: list of the trees of its B texts}. The leaves of a tree are
        indices of tokens, where padding is not counted (`stickjax.evaluation.trees`). The default is None.
        """
        del model, batch
        return None

    def empty_cache(self, config, batch: int, size: int):
        """Return an empty cache for `decode_step`, with room for `size` tokens of each of `batch` sequences.

        The default raises ValueError, because a family without this method cannot generate text.
        """
        del batch, size
        raise ValueError(
            f"a model of family={config.family!r} cannot generate text; use another family, such as 'decoder'"
        )

    def cache_specs(self, cache):
        """Return the `PartitionSpec` of every array of a cache on a mesh. The default shards the first axis, B."""
        return jax.tree.map(lambda x: PartitionSpec(ROW_AXES) if x.ndim else PartitionSpec(), cache)

    def decode_step(self, model, tokens, segment_ids, cache):
        """Run the model on `tokens` [B,T], which follow the tokens in `cache`, to generate text.

        `segment_ids` [B,T]: a negative id is padding. Return (the logits [B,V] after the last of the `tokens`, the
        cache with the `tokens` added). The default raises ValueError, because a family without this method cannot
        generate text.
        """
        del tokens, segment_ids, cache
        raise ValueError(
            f"a model of family={model.config.family!r} cannot generate text; use another family, such as 'decoder'"
        )
