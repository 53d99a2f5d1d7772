"""The family of Universal Transformers: the methods that training, planning and text generation call."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from stickjax.config import Config, ExpertsConfig, SutConfig
from stickjax.models.family import Family
from stickjax.models.universal.model import LanguageModel, PairClassifier, SutOutput
from stickjax.parallel.collectives import psum_over_batch


def init(config: SutConfig, key: jax.Array) -> PairClassifier | LanguageModel:
    """Return a new model with random parameters: a classifier of pairs of sentences, or a language model.

    The model is a classifier if `config.classes` is at least 1. It is a Flax module and also the pytree of its
    parameters.

    >>> model = init(SutConfig(V=16, D=8, H=4, F=16), jax.random.key(0))
    >>> model.stack.block.ffn.experts.w_in.shape
    (8, 8, 16)
    """
    return (PairClassifier if config.classes else LanguageModel)(config, key)


def apply(
    params: PairClassifier | LanguageModel, batch: dict[str, jax.Array], key: jax.Array | None = None, *, threshold=None
) -> SutOutput:
    """Run the model `params` on a batch.

    With a key, the model runs in training mode. Without a key, it stops as soon as all tokens have halted, and the
    output has no gradient: `jax.grad` raises an error.

    Args:
      batch: for a classifier, the token ids `left` and `right` [B,T] of the sentences, padded with 0. For a language
        model, `tokens` [B,T], and `segment_ids` [B,T] if a sequence contains several documents.
      key: a random key for a training step; None for inference.
      threshold: a number or a scalar array that replaces `halting_threshold` of the config; None: do not replace it.

    >>> pairs = {"left": jnp.array([[3, 4, 0]]), "right": jnp.array([[5, 0, 0]])}
    >>> model = init(SutConfig(V=16, D=8, H=4, F=16, classes=7), jax.random.key(0))
    >>> output = apply(model, pairs, threshold=0.5)
    >>> output.logits.shape, output.rows["ffn"].tolist()  # 2 steps, with 2 experts for each of 3 tokens
    ((1, 7), [6, 6, 0, 0, 0, 0])
    """
    return params(batch, key, threshold=threshold, stop_early=key is None)


class TokenHistory(NamedTuple):
    """The cache for text generation. It has the ids of all earlier tokens, but no keys and values.

    `tokens` and `segment_ids` are [B,size], with room for `size` tokens; the first `length` places are filled. At every
    decode step, the model runs on all tokens again.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    length: jax.Array


def empty_cache(config: SutConfig, batch: int, size: int) -> TokenHistory:
    """Return an empty `TokenHistory` for `batch` sequences of up to `size` tokens each."""
    return TokenHistory(
        jnp.zeros((batch, size), jnp.int32), jnp.full((batch, size), -1, jnp.int32), jnp.zeros((), jnp.int32)
    )


def decode_step(
    model: LanguageModel, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"], cache: TokenHistory
) -> tuple[Float[Array, "B V"], TokenHistory]:
    """Run the model on all tokens: the tokens in `cache`, and then `tokens`. A negative segment id is padding.

    Return (the logits [B,V] after the last of the `tokens`, the cache with the `tokens` added).
    """
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cache.length, axis=1)  # noqa: E731
    cache = TokenHistory(put(cache.tokens, tokens), put(cache.segment_ids, segment_ids), cache.length + tokens.shape[1])
    logits = apply(model, {"tokens": cache.tokens, "segment_ids": cache.segment_ids}).logits
    return jax.lax.dynamic_index_in_dim(logits, cache.length - 1, axis=1, keepdims=False), cache


def loss(
    params: PairClassifier | LanguageModel, batch: dict[str, jax.Array], key: jax.Array | None
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """Compute the loss of a batch, and its metrics.

    The loss is

      mean cross-entropy + `act_weight` * mean halting step + sum over routers of `mi_weight` * (H(e|x) - H(e)).

    `act_weight` is a field of the config, and `mi_weight` a field of the config of a router's experts. H(e|x) - H(e)
    is the loss `mutual_information` of a router (see `router_stats`). The halting step of a token is the number of the
    step in which it halts; the first step has the number 0.

    Args:
      batch: as in `apply`. Pairs of sentences also have `label` [B]; text also has `targets` and `loss_mask` [B,T].
      key: a random key for a training step; None for inference.

    Returns:
      The loss, and the metrics: `loss` (the cross-entropy alone), `accuracy` (for pairs only), `depth` (the mean number
      of times that the block is applied to a token), `act` (the mean halting step), `mutual_information` (a mean over
      the routers) and `load_max`. The load of an expert is its share of the (token, choice) pairs of its router.
      `load_max` is the largest load of any expert, times the number of experts of the router: 1 if all loads are equal.

    >>> config = SutConfig(V=16, D=8, H=4, F=16)
    >>> batch = {"tokens": jnp.ones((2, 3), int), "targets": jnp.ones((2, 3), int), "loss_mask": jnp.ones((2, 3))}
    >>> sorted(loss(init(config, jax.random.key(0)), batch, None)[1])
    ['act', 'depth', 'load_max', 'loss', 'mutual_information']
    """
    config = params.config
    if config.classes:
        output, labels, mask = params(batch, key), batch["label"], jnp.ones(batch["label"].shape)
        by_target = optax.softmax_cross_entropy_with_integer_labels(output.logits, labels)
        token_mask = jnp.stack([batch["left"], batch["right"]]) != 0
    else:
        output, mask = params(batch, key, targets=batch["targets"]), batch["loss_mask"].astype(jnp.float32)
        by_target = output.scores.nll
        token_mask = batch.get("segment_ids", jnp.zeros_like(batch["tokens"])) >= 0

    def mean(x, weight):
        x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
        return psum_over_batch((x * weight).sum()) / jnp.maximum(psum_over_batch(weight.sum()), 1)

    nll = mean(by_target, mask)
    information = {name: stats.mutual_information for name, stats in output.router.items()}
    weights = {name: _mixture(config, name).mi_weight for name in information}
    metrics = {
        "loss": nll,
        "depth": mean(output.depth, token_mask),
        "act": output.act,
        "mutual_information": jnp.stack(list(information.values())).mean(),
        "load_max": jnp.stack([s.load.max() * s.load.shape[-1] for s in output.router.values()]).max(),
    }
    if config.classes:
        metrics["accuracy"] = mean(output.logits.argmax(-1) == labels, mask)
    balance = sum(weights[name] * x for name, x in information.items())
    return nll + balance + config.act_weight * output.act, metrics


def _mixture(config: SutConfig, router: str) -> ExpertsConfig:
    """Return the config of the experts that a router chooses. `router` is the router's name, such as "encoder_ffn"."""
    return config.experts if router.endswith("ffn") else config.attention_experts


class Universal(Family):
    """The family of Universal Transformers: language models, and classifiers of pairs of sentences.

    A model is a classifier if `classes` in its config is at least 1.
    """

    config = SutConfig

    def init(self, config: SutConfig, key) -> PairClassifier | LanguageModel:
        return init(config, key)

    def apply(self, model, batch, key=None) -> SutOutput:
        return apply(model, batch, key)

    def score(self, model, batch, key=None):
        output = model(batch, key, targets=batch["targets"])
        return output.scores, output

    def loss(self, model, batch, key):
        return loss(model, batch, key)

    def example_batch(self, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        if config.model.reads == "text":
            return super().example_batch(config)
        sentences = jax.ShapeDtypeStruct((config.data.B, config.data.T), jnp.int32)
        return {"left": sentences, "right": sentences, "label": jax.ShapeDtypeStruct((config.data.B,), jnp.int32)}

    def parameter_counts(self, config: SutConfig) -> tuple[int, int]:
        """Return (the number of all parameters, the number of active parameters).

        Active parameters are the parameters of the `UniversalStack` that one step uses for one token: k of the E
        experts of each kind, and all other parameters of the stack. Parameters outside the stack, such as the
        embedding, are not active.
        """
        shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        block, size = shapes.stack.block, lambda tree: sum(x.size for x in jax.tree.leaves(tree))
        heads = size([block.attention.experts.expert_query, block.attention.experts.expert_output])
        mixtures = ((config.experts, size(block.ffn.experts)), (config.attention_experts, heads))
        idle = sum(weights * (mixture.E - mixture.k) // mixture.E for mixture, weights in mixtures)
        return size(shapes), size(shapes.stack) - idle

    def flops_per_token(self, config: SutConfig, T: int) -> float:
        """Return the number of floating-point operations that a training step takes per token, if no token halts early.

        The block is then applied L times to every token. T is the number of tokens of a sequence. Bidirectional
        attention takes twice as many operations as causal attention.
        """
        _, active = self.parameter_counts(config)
        heads, directions = config.attention_experts.k * config.K, 1 if config.causal else 2
        return config.L * (6 * active + 6 * directions * heads * config.H * T)

    def empty_cache(self, config: SutConfig, batch: int, size: int) -> TokenHistory:
        if config.classes:
            raise ValueError(
                f"a classifier (classes={config.classes}) cannot generate text; use a model with classes=0"
            )
        return empty_cache(config, batch, size)

    def decode_step(self, model: LanguageModel, tokens, segment_ids, cache):
        return decode_step(model, tokens, segment_ids, cache)
