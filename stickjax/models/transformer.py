"""The decoder: an embedding, L layers in one `lax.scan`, and the logits. `init` makes a model, `apply` runs it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from stickjax.config import ModelConfig
from stickjax.config.attention import variant
from stickjax.models.attention import Attention, Context, segment_positions
from stickjax.models.context import whole_sequence
from stickjax.models.layers import FeedForward, cast, norm_of, normal
from stickjax.models.moa import MixtureOfHeads
from stickjax.models.moe import SparseExperts
from stickjax.models.parameters import gather
from stickjax.models.router import RouterStats, router_stats
from stickjax.models.vocabulary import TargetScores, embedded, scores_in_pieces
from stickjax.parallel.collectives import copy_to_tensor_parallel, size


class Cache(NamedTuple):
    """The cache for text generation: the keys and values of all earlier tokens in all L layers.

    `key` and `value` are [L,B,S,K,H], with room for S tokens per sequence. `length` is a scalar: the first `length`
    places are filled. `value` is None if the values equal the keys (`key_value="input"` in the config). `segment_ids`
    [B,S] is negative for padding and for places that are not filled yet.
    """

    key: jax.Array
    value: jax.Array | None
    segment_ids: jax.Array
    length: jax.Array


class Output(NamedTuple):
    """The output of a decoder.

    `logits`: [B,T,V], in float32. On a mesh with the axis "tensor", a device has only its part of V. None if the model
      was called with targets.
    `router`: the losses and loads of the routers of all feed-forward networks; None if they have no experts.
    `cache`: the cache with the new tokens added; None if the model was called without a cache.
    `attention_router`: the losses and loads of the routers of all attentions; None if they have no experts.
    `scores`: the scores of the targets; None if the model was called without targets.
    """

    logits: jax.Array | None
    router: RouterStats | None
    cache: Cache | None
    attention_router: RouterStats | None = None
    scores: TargetScores | None = None


class Block(nnx.Module):
    """A layer: x becomes x + m_res * attention(norm(x)), and then x + m_res * feed_forward(norm(x)).

    The two norms have separate parameters. The multiplier `m_res` is a field of the config. The attention and the
    feed-forward network may consist of experts.
    """

    def __init__(self, config: ModelConfig, key):
        self.config = config
        k_attention, k_ffn = jax.random.split(key)
        self.attention_norm = norm_of(config)
        self.attention = (MixtureOfHeads if config.attention_experts.E else Attention)(config, k_attention)
        self.ffn_norm = norm_of(config)
        self.ffn = (SparseExperts if config.experts.E else FeedForward)(config, k_ffn)

    def __call__(self, x, context: Context, token_mask, cache, key):
        key_attention = None if key is None else jax.random.fold_in(key, 1)
        y, cache, heads = self.attention(self.attention_norm(x), context, cache, token_mask, key_attention)
        x = x + self.config.m_res * y
        y = self.ffn_norm(x)
        y, experts = self.ffn(y, token_mask, key) if self.config.experts.E else (self.ffn(y), None)
        return x + self.config.m_res * y, cache, (experts, heads)


class Transformer(nnx.Module):
    """A decoder language model. Its field `blocks` has the parameters of all L layers, stacked along the first axis."""

    def __init__(self, config: ModelConfig, key):
        self.config = c = config
        k_embed, k_blocks, k_unembed = jax.random.split(key, 3)
        self.embed = normal(k_embed, (c.vocabulary, c.D), c.init_std, c)
        self.blocks = jax.vmap(lambda k: Block(c, k))(jax.random.split(k_blocks, c.L))
        self.norm = norm_of(c, c.final_norm_eps)
        self.unembed = None if c.tied else normal(k_unembed, (c.D, c.vocabulary), c.init_std, c)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        cache: Cache | None = None,
        key: jax.Array | None = None,
        last_only: bool = False,
        targets: Int[Array, "B T"] | None = None,
    ) -> Output:
        """Compute the logits of the next token at every position. With `targets`, compute their scores instead.

        Args:
          tokens: [B, T], the token ids.
          segment_ids: [B, T], the document of every token. A token attends only to tokens with the same id; a negative
            id is padding. None: every sequence is one document.
          cache: the keys and values of earlier tokens, from `empty_cache` or from the `Output` of an earlier call. The
            returned cache also has the keys and values of `tokens`.
          key: a random key for a training step, in which `sample_topk` and `token_rounding` apply; None for inference.
          last_only: compute only the logits [B, 1, V] of the last position. For a long prompt, the B * T * V floats of
            all positions would take too much memory.
          targets: [B, T], for each token the token that should follow it. With targets, the output has `scores` and
            no logits, and `scores_in_pieces` limits the memory for the logits.
        """
        c = self.config
        if cache is not None and segment_ids is None:
            segment_ids = jnp.zeros_like(tokens)
        token_mask = None if segment_ids is None else segment_ids >= 0
        context, cache = _context(c, tokens, segment_ids, cache)
        embed, unembed = gather({"embed": self.embed, "unembed": self.unembed}, c.dtype, Transformer).values()
        x = c.m_emb * embedded(cast(embed, c), tokens)

        def layer(x, inputs):
            block, layer_cache, layer_key = inputs
            x, layer_cache, sums = gather(block, c.dtype)(x, context, token_mask, layer_cache, layer_key)
            return x, (layer_cache, sums)

        if c.remat != "none":
            policy = jax.checkpoint_policies.checkpoint_dots if c.remat == "dots" else None
            # Inside a scan, XLA cannot merge the recomputation with the forward pass, so this need not be prevented.
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        keys = None if key is None else jax.random.split(key, c.L)
        layer_caches = None if cache is None else (cache.key, cache.value)
        x, (layer_caches, sums) = jax.lax.scan(layer, x, (self.blocks, layer_caches, keys))
        if cache is not None:
            cache = cache._replace(key=layer_caches[0], value=layer_caches[1])

        unembed = cast(embed, c).T if unembed is None else cast(unembed, c)
        x = copy_to_tensor_parallel(self.norm(x[:, -1:] if last_only else x))
        experts, heads = (layers and router_stats(layers) for layers in sums)  # for all layers at once

        def logits(x):
            y = jnp.einsum("BTD,DV->BTV", x, unembed, preferred_element_type=jnp.float32)
            return y / (c.m_width if c.logits_scaling is None else c.logits_scaling)

        if targets is None:
            return Output(logits(x), experts, cache, heads)
        return Output(None, experts, cache, heads, scores_in_pieces(logits, x, targets, unembed.shape[1]))


def _context(config: ModelConfig, tokens, segment_ids, cache: Cache | None) -> tuple[Context, Cache | None]:
    """Return (the `Context` that all attention layers get, the new cache). Without a cache, the second value is None.

    The new cache already has the segment ids of `tokens`, and its `length` includes `tokens`. The attention layers add
    the keys and values of `tokens` later.
    """
    rotary = variant(config.attention).rotary
    if size("context") > 1:
        segment_ids = jnp.zeros_like(tokens) if segment_ids is None else segment_ids
        return Context(segment_ids, whole_sequence(segment_ids), None, 0), None
    if cache is None:
        positions = None
        if rotary:
            positions = segment_positions(jnp.zeros_like(tokens) if segment_ids is None else segment_ids)
        return Context(segment_ids, segment_ids, positions, 0), None
    offset = cache.length
    known = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, offset, axis=1)
    positions = None
    if rotary:
        positions = jax.lax.dynamic_slice_in_dim(segment_positions(known), offset, tokens.shape[1], axis=1)
    return Context(segment_ids, known, positions, offset), cache._replace(
        segment_ids=known, length=offset + tokens.shape[1]
    )


def empty_cache(config: ModelConfig, batch: int, size: int) -> Cache:
    """Return an empty `Cache` for `batch` sequences of up to `size` tokens each, in the type `config.dtype`."""
    shape = (config.L, batch, size, config.K, config.H)
    values = None if config.key_value == "input" else jnp.zeros(shape, config.dtype)
    return Cache(
        jnp.zeros(shape, config.dtype), values,
        jnp.full((batch, size), -1, jnp.int32), jnp.zeros((), jnp.int32),
    )  # fmt: skip


def decode_step(
    model: "Transformer", tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Run the model on `tokens`, which follow the tokens in `cache`. A negative segment id is padding.

    Return (the logits [B,V] after the last of the `tokens`, the cache with the `tokens` added).
    """
    output = model(tokens, segment_ids, cache=cache, last_only=True)
    return output.logits[:, -1], output.cache


def init(config: ModelConfig, key: jax.Array) -> Transformer:
    """Return a new decoder with random parameters. The model is a Flax module and also the pytree of its parameters.

    >>> model = init(ModelConfig(V=16, D=8, L=2, N=2, K=1, H=4, F=16), jax.random.key(0))
    >>> model.blocks.attention.query.shape
    (2, 8, 2, 4)
    """
    return Transformer(config, key)


def apply(params: Transformer, batch: dict[str, jax.Array], key: jax.Array | None = None) -> Output:
    """Run the model `params` on a batch, which has `tokens` [B,T] and may have `segment_ids` [B,T].

    `segment_ids` are needed if a sequence contains several documents. `key` is a random key for a training step, or
    None for inference.

    >>> model = init(ModelConfig(V=16, D=8, L=2, N=2, K=1, H=4, F=16), jax.random.key(0))
    >>> apply(model, {"tokens": jnp.zeros((3, 5), jnp.int32)}).logits.shape
    (3, 5, 16)
    """
    return params(batch["tokens"], batch.get("segment_ids"), key=key)
