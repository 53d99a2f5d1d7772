"""The Sparse Universal Transformer: one block of experts, applied until every token has halted, in three models.

Tan et al., `Sparse Universal Transformer <https://arxiv.org/abs/2310.07096>`_.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from stickjax.config import Config, SutConfig
from stickjax.models.attention import segment_positions
from stickjax.models.family import Family
from stickjax.models.halting import Halting, HaltingGate, until_halted
from stickjax.models.layers import LayerNorm, cast, dropout, normal, uniform
from stickjax.models.router import RouterStats, router_stats
from stickjax.models.sut_block import SutBlock
from stickjax.parallel.collectives import psum_over_batch


class SutOutput(NamedTuple):
    """The output of a model for a batch.

    `logits` in fp32, [B,classes] or [B,T,V]. `depth` [B,T], for pairs [2,B,T]: the mean number of blocks in a token's
    final state. `act`: the mean halting step of all tokens, whose gradient shortens the computation. `router`: the
    statistics of every router over all steps, each token weighed by the probability that it still runs. `rows`: the
    expert rows that this device ran in each step, [L], by the name of their router.
    """

    logits: jax.Array
    depth: jax.Array
    act: jax.Array
    router: dict[str, RouterStats]
    rows: dict[str, jax.Array]


class UniversalStack(nnx.Module):
    """One `SutBlock` for all steps, the gate that halts tokens, and with `normalize_before` a norm at the end."""

    def __init__(self, config: SutConfig, key, *, causal: bool, cross: bool = False):
        self.config = config
        k_block, k_gate = jax.random.split(key)
        self.block = SutBlock(config, k_block, causal=causal, cross=cross)
        self.gate = HaltingGate(config, k_gate)
        self.norm = LayerNorm(config) if config.normalize_before else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        source: Float[Array, "B S D"] | None = None,
        source_segment_ids: Int[Array, "B S"] | None = None,
        key=None,
        *,
        threshold=None,
        stop_early: bool = False,
    ) -> Halting:
        """`segment_ids`: attention stays within equal ones, negative ones are padding."""
        c = self.config

        def block(h, s, running, step):
            k = None if key is None else jax.random.fold_in(key, step)
            h, sums = self.block(h, s, running, segment_ids, source, source_segment_ids, k)
            rows = {name: one.rows.sum().astype(jnp.int32) for name, one in sums.items()}
            return h, sums, rows

        if c.remat == "full":
            block = jax.checkpoint(block, prevent_cse=False)  # scan already keeps the two apart
        threshold = c.halting_threshold if threshold is None else threshold
        end = until_halted(block, self.gate, x, segment_ids >= 0, c.L, threshold, stop_early=stop_early)
        state = end.state.astype(x.dtype)
        return end._replace(state=state if self.norm is None else self.norm(state))


class PairClassifier(nnx.Module):
    """Logits of the label of two sentences: W_2 elu(W_1 [u; v; u * v; |u - v|] + b_1) + b_2, with 4 D hidden units.

    u and v are the final states of the sentences' first tokens. In a bracketed formula the first token is the outermost
    bracket; data without such a token put one first. Stick-breaking attention is causal: with it, u and v are the
    states of the last tokens.
    """

    def __init__(self, config: SutConfig, key):
        self.config = c = config
        k_embed, k_stack, *keys = jax.random.split(key, 6)
        self.embed = normal(k_embed, (c.vocabulary, c.D), c.D**-0.5, c)
        self.stack = UniversalStack(c, k_stack, causal=c.causal)
        wide = 4 * c.D
        self.w_in = uniform(keys[0], (wide, wide), wide**-0.5, c)
        self.in_bias = uniform(keys[1], (wide,), wide**-0.5, c)
        self.w_out = uniform(keys[2], (wide, c.classes), wide**-0.5, c)
        self.out_bias = uniform(keys[3], (c.classes,), wide**-0.5, c)

    def __call__(self, batch, key=None, *, threshold=None, stop_early: bool = False) -> SutOutput:
        c = self.config
        tokens = jnp.concatenate([batch["left"], batch["right"]])
        end = encoded(self.stack, self.embed, tokens, key, threshold=threshold, stop_early=stop_early)
        read = (tokens != 0).sum(1) - 1 if c.causal else jnp.zeros(len(tokens), int)
        u, v = jnp.split(jnp.take_along_axis(end.state, read[:, None, None], axis=1)[:, 0], 2)
        w_in, in_bias, w_out, out_bias = (cast(p, c) for p in (self.w_in, self.in_bias, self.w_out, self.out_bias))
        hidden = jax.nn.elu(jnp.concatenate([u, v, u * v, jnp.abs(u - v)], -1) @ w_in + in_bias[None])
        k_drop = None if key is None else jax.random.fold_in(key, c.L)
        hidden = dropout(hidden, c.dropout, k_drop)
        logits = (hidden @ w_out + out_bias[None]).astype(jnp.float32)
        output = summary(logits, [(end, tokens != 0)])
        return output._replace(depth=output.depth.reshape(2, *batch["left"].shape))


class LanguageModel(nnx.Module):
    """A causal language model, with the embedding as output matrix.

    A token and its halting depend on no later token.
    """

    def __init__(self, config: SutConfig, key):
        self.config = c = config
        k_embed, k_stack = jax.random.split(key)
        self.embed = normal(k_embed, (c.vocabulary, c.D), c.D**-0.5, c)
        self.stack = UniversalStack(c, k_stack, causal=True)

    def __call__(self, batch, key=None, *, threshold=None, stop_early: bool = False) -> SutOutput:
        tokens = batch["tokens"]
        segments = batch.get("segment_ids", jnp.zeros_like(tokens))
        x, keys = embedded(self.config, self.embed, tokens, segments, key)
        end = self.stack(x, segments, key=keys, threshold=threshold, stop_early=stop_early)
        return summary(unembedded(end.state, cast(self.embed, self.config)), [(end, segments >= 0)])


class SparseUniversalTransformer(nnx.Module):
    """Encoder and decoder for translation, with one embedding for source, target and output.

    A batch has `source` [B,S] and `target` [B,T], both padded with 0. The logits [B,T,V] predict the token after
    each token of `target`.
    """

    def __init__(self, config: SutConfig, key):
        self.config = c = config
        k_embed, k_encoder, k_decoder = jax.random.split(key, 3)
        self.embed = normal(k_embed, (c.vocabulary, c.D), c.D**-0.5, c)
        self.encoder = UniversalStack(c, k_encoder, causal=False)
        self.decoder = UniversalStack(c, k_decoder, causal=True, cross=True)

    def __call__(self, batch, key=None, *, threshold=None, stop_early: bool = False) -> SutOutput:
        how = dict(threshold=threshold, stop_early=stop_early)
        k_encoder, k_decoder = (None, None) if key is None else jax.random.split(key)
        source, target = batch["source"], batch["target"]
        read = encoded(self.encoder, self.embed, source, k_encoder, **how)
        segments, source_segments = segments_of(target), segments_of(source)
        x, keys = embedded(self.config, self.embed, target, segments, k_decoder)
        written = self.decoder(x, segments, read.state, source_segments, keys, **how)
        logits = unembedded(written.state, cast(self.embed, self.config))
        return summary(logits, [(written, target != 0), (read, source != 0)], ("", "encoder_"))


def segments_of(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0 for tokens, -1 for the padding 0."""
    return jnp.where(tokens != 0, 0, -1)


def sinusoidal(T: int, D: int) -> Float[np.ndarray, "T D"]:
    """Sines and then cosines of t * 10000^(-i / (D/2)), arXiv 1706.03762.

    >>> sinusoidal(2, 4)[:, 2:].tolist() == [[1, 1], [np.float32(np.cos(1)), np.float32(np.cos(0.01))]]
    True
    """
    angle = np.arange(T)[:, None] * 10_000.0 ** -(np.arange(D // 2) / (D // 2))[None]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def embedded(config: SutConfig, embed, tokens, segment_ids, key):
    """sqrt(D) * embedding, plus positions within the segments, zero for padding; and the key of the steps."""
    x = config.D**0.5 * cast(embed, config)[tokens]
    if config.sinusoidal and not config.causal:
        positions = segment_positions(segment_ids)  # not the place in the array, because padding may stand on the left
        x += jnp.asarray(sinusoidal(tokens.shape[1], config.D), x.dtype)[positions]
    k_drop, key = (None, None) if key is None else jax.random.split(key)
    return dropout(jnp.where((segment_ids >= 0)[..., None], x, 0), config.dropout, k_drop), key


def encoded(stack: UniversalStack, embed, tokens, key, **how) -> Halting:
    """The stack over tokens that are padded with 0."""
    segments = segments_of(tokens)
    x, key = embedded(stack.config, embed, tokens, segments, key)
    return stack(x, segments, key=key, **how)


def unembedded(state: Float[Array, "B T D"], embed: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    return jnp.einsum("BTD,VD->BTV", state, embed, preferred_element_type=jnp.float32)


def summary(logits, stacks, prefixes=("",)) -> SutOutput:
    """The output of a model, from its stacks [(end, token mask)]. `prefixes` precede the router names of each stack."""
    router, rows, act, tokens = {}, {}, 0.0, 0.0
    for (end, token_mask), prefix in zip(stacks, prefixes, strict=True):
        router |= {prefix + name: router_stats(sums) for name, sums in end.statistics.items()}
        rows |= {prefix + name: counts for name, counts in end.rows.items()}
        token_mask = token_mask.astype(jnp.float32)
        act += (end.act * token_mask).sum()
        tokens += token_mask.sum()
    act = psum_over_batch(act) / jnp.maximum(psum_over_batch(tokens), 1)
    return SutOutput(logits, stacks[0][0].depth, act, router, rows)


def init(config: SutConfig, key: jax.Array) -> PairClassifier | LanguageModel:
    """Parameters of a model, as a pytree that is also the model: with `classes` of pairs, else a language model.

    >>> model = init(SutConfig(V=16, D=8, H=4, F=16), jax.random.key(0))
    >>> model.stack.block.ffn.experts.w_in.shape
    (8, 8, 16)
    """
    return (PairClassifier if config.classes else LanguageModel)(config, key)


def apply(
    params: PairClassifier | LanguageModel, batch: dict[str, jax.Array], key: jax.Array | None = None, *, threshold=None
) -> SutOutput:
    """Run a model on a batch: training with a key, else inference, which stops when all tokens have halted.

    Args:
      batch: `left` and `right` [B,T], padded with 0; or `tokens` [B,T] and, when documents are packed, `segment_ids`.
      key: randomness of a training step; with one the output has a reverse derivative.
      threshold: in place of `halting_threshold`; a number or a scalar array.

    >>> pairs = {"left": jnp.array([[3, 4, 0]]), "right": jnp.array([[5, 0, 0]])}
    >>> model = init(SutConfig(V=16, D=8, H=4, F=16, classes=7), jax.random.key(0))
    >>> output = apply(model, pairs, threshold=0.5)
    >>> output.logits.shape, output.rows["ffn"].tolist()  # 3 tokens have 2 experts each
    ((1, 7), [6, 6, 0, 0, 0, 0])
    """
    return params(batch, key, threshold=threshold, stop_early=key is None)


class TokenHistory(NamedTuple):
    """The `length` tokens that a language model has read so far. Their keys and values are not kept: every new token is
    computed together with all of them."""

    tokens: jax.Array
    segment_ids: jax.Array
    length: jax.Array


def empty_cache(config: SutConfig, batch: int, size: int) -> TokenHistory:
    """An empty cache for `batch` sequences of up to `size` tokens."""
    return TokenHistory(
        jnp.zeros((batch, size), jnp.int32), jnp.full((batch, size), -1, jnp.int32), jnp.zeros((), jnp.int32)
    )


def decode_step(
    model: LanguageModel, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"], cache: TokenHistory
) -> tuple[Float[Array, "B V"], TokenHistory]:
    """Logits after the last of these tokens, and the cache with them."""
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cache.length, axis=1)  # noqa: E731
    cache = TokenHistory(put(cache.tokens, tokens), put(cache.segment_ids, segment_ids), cache.length + tokens.shape[1])
    logits = apply(model, {"tokens": cache.tokens, "segment_ids": cache.segment_ids}).logits
    return jax.lax.dynamic_index_in_dim(logits, cache.length - 1, axis=1, keepdims=False), cache


def loss(
    params: PairClassifier | LanguageModel, batch: dict[str, jax.Array], key: jax.Array | None
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """Mean cross-entropy plus `mi_weight` * sum of the routers' H(e|x) - H(e) plus `act_weight` * mean halting step.

    Args:
      batch: as in `apply`, with `label` [B]; or with `targets` [B,T] and `loss_mask` [B,T].
      key: randomness of a training step, or None.

    Returns:
      The loss, and metrics: `loss` (cross-entropy alone), for pairs `accuracy`, `depth` (mean over tokens), `act`,
      `mutual_information` (mean over routers) and `load_max` (largest share of rows times experts, 1 at balance).

    >>> config = SutConfig(V=16, D=8, H=4, F=16)
    >>> batch = {"tokens": jnp.ones((2, 3), int), "targets": jnp.ones((2, 3), int), "loss_mask": jnp.ones((2, 3))}
    >>> sorted(loss(init(config, jax.random.key(0)), batch, None)[1])
    ['act', 'depth', 'load_max', 'loss', 'mutual_information']
    """
    output, config = params(batch, key), params.config
    if config.classes:
        labels, mask = batch["label"], jnp.ones(batch["label"].shape)
        token_mask = jnp.stack([batch["left"], batch["right"]]) != 0
    else:
        labels, mask = batch["targets"], batch["loss_mask"].astype(jnp.float32)
        token_mask = batch.get("segment_ids", jnp.zeros_like(batch["tokens"])) >= 0

    def mean(x, weight):
        x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
        return psum_over_batch((x * weight).sum()) / jnp.maximum(psum_over_batch(weight.sum()), 1)

    nll = mean(optax.softmax_cross_entropy_with_integer_labels(output.logits, labels), mask)
    information = jnp.stack([stats.mutual_information for stats in output.router.values()])
    metrics = {
        "loss": nll,
        "depth": mean(output.depth, token_mask),
        "act": output.act,
        "mutual_information": information.mean(),
        "load_max": jnp.stack([s.load.max() * s.load.shape[-1] for s in output.router.values()]).max(),
    }
    if config.classes:
        metrics["accuracy"] = mean(output.logits.argmax(-1) == labels, mask)
    return nll + config.mi_weight * information.sum() + config.act_weight * output.act, metrics


class Universal(Family):
    """The family of Universal Transformers: a language model, or with `classes` a classifier of pairs."""

    config = SutConfig

    def init(self, config: SutConfig, key) -> PairClassifier | LanguageModel:
        return init(config, key)

    def apply(self, model, batch, key=None) -> SutOutput:
        return apply(model, batch, key)

    def loss(self, model, batch, key):
        return loss(model, batch, key)

    def example_batch(self, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        if config.model.reads == "text":
            return super().example_batch(config)
        sentences = jax.ShapeDtypeStruct((config.data.B, config.data.T), jnp.int32)
        return {"left": sentences, "right": sentences, "label": jax.ShapeDtypeStruct((config.data.B,), jnp.int32)}

    def parameter_counts(self, config: SutConfig) -> tuple[int, int]:
        """The number of all parameters, and of those that a step applies to a token: k of E experts, no embedding."""
        shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        block, size = shapes.stack.block, lambda tree: sum(x.size for x in jax.tree.leaves(tree))
        heads = size([block.attention.experts.expert_query, block.attention.experts.expert_output])
        idle = size(block.ffn.experts) * (config.E - config.k) // config.E
        idle += heads * (config.attention_experts - config.attention_k) // config.attention_experts
        return size(shapes), size(shapes.stack) - idle

    def flops_per_token(self, config: SutConfig, T: int) -> float:
        """As if no token halted before the last step. Bidirectional attention takes twice the work of causal."""
        _, active = self.parameter_counts(config)
        heads, directions = config.attention_k * config.K, 1 if config.causal else 2
        return config.L * (6 * active + 6 * directions * heads * config.H * T)

    def empty_cache(self, config: SutConfig, batch: int, size: int) -> TokenHistory:
        if config.classes:
            raise ValueError(f"a classifier of classes={config.classes} generates no text")
        return empty_cache(config, batch, size)

    def decode_step(self, model: LanguageModel, tokens, segment_ids, cache):
        return decode_step(model, tokens, segment_ids, cache)
