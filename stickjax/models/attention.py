"""The attention layer of the decoder, with an optional cache of keys and values.

`stickjax.config.attention` lists the variants of attention that a layer can use, such as stick-breaking and softmax.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from stickjax.config import ModelConfig
from stickjax.config.attention import variant
from stickjax.models.layers import HeadNorm, cast, matrix_std, normal, output_std, query_key_norms, rotary
from stickjax.models.router import RouterSums
from stickjax.parallel.collectives import copy_to_tensor_parallel, reduce_from_tensor_parallel

KeyValues = tuple[jax.Array, jax.Array | None]  # (keys, values), [B,S,K,H] each; values are None if equal to keys


class Context(NamedTuple):
    """The documents and positions of the query tokens, and the documents of the keys.

    In an attention layer, T query tokens per sequence attend to S keys. All layers of a decoder use the same context.
    If the sequences are sharded over the mesh axis "context", T is the number of tokens on this device, and S is the
    number of keys of the whole sequence.

    `segment_ids` [B,T], `key_segment_ids` [B,S]: the document id of every token and of every key. A token attends only
      to keys with the same id; a negative id is padding. None: every sequence is one document.
    `positions` [B,T]: the positions for rotary embedding; None if the attention variant does not use it.
    `offset`: the number of tokens that the cache had before this call; 0 without a cache. It is also 0 on every device
      if the sequences are sharded over the mesh axis "context".
    """

    segment_ids: jax.Array | None
    key_segment_ids: jax.Array | None
    positions: jax.Array | None
    offset: int | jax.Array


class Attention(nnx.Module):
    """An attention layer with N query heads and K key/value heads, all of dimension H.

    The queries are x W_q, the keys x W_k and the values x W_v. N / K query heads share a key/value head. The outputs of
    the heads are multiplied by W_o and summed. With `query_key_value_bias` in the config, queries, keys and values each
    have a trainable bias, which starts at zero. With `query_key_norm`, queries and keys are then normalised
    (`QueryKeyNorm`).

    The stick-breaking weights of a query sum to 1 - rem, where rem is the part of the stick that no key takes. The
    config field `remainder` says what is added to the output of a head. "none": nothing. "value": rem times the value
    of the query's own token. "bias": rem times a trainable vector of the head, which starts at zero.
    """

    def __init__(self, config: ModelConfig, key):
        self.config = c = config
        kq, kk, kv, ko = jax.random.split(key, 4)
        self.query = normal(kq, (c.D, c.N, c.H), matrix_std(c), c)
        self.key = normal(kk, (c.D, c.K, c.H), matrix_std(c), c)
        self.value = normal(kv, (c.D, c.K, c.H), matrix_std(c), c)
        self.output = normal(ko, (c.N, c.H, c.D), output_std(c), c)
        self.head_bias = nnx.Param(jnp.zeros((c.N, c.H), c.param_dtype)) if c.remainder == "bias" else None
        self.norm = HeadNorm(c) if c.head_norm else None
        self.query_norm, self.key_norm = query_key_norms(c)
        zeros = lambda heads: nnx.Param(jnp.zeros((heads, c.H), c.param_dtype)) if c.query_key_value_bias else None  # noqa: E731
        self.query_bias, self.key_bias, self.value_bias = zeros(c.N), zeros(c.K), zeros(c.K)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: KeyValues | None = None, token_mask=None, key=None
    ) -> tuple[Float[Array, "B T D"], KeyValues | None, RouterSums | None]:
        """Apply the layer to x. Return (the output [B,T,D], the new cache, None).

        `cache` has the keys and values of earlier tokens. The new cache also has the keys and values of the tokens of
        x; it is None if `cache` is None. The third result is None, because this layer has no router. `MixtureOfHeads`,
        the subclass with experts, has a router and returns its `RouterSums`. Only this subclass uses `token_mask` and
        `key`.
        """
        c = self.config
        # One matrix product for queries, keys and values, so that x is read once.
        weights = [cast(w, c) for w in (self.query, self.key, self.value)]
        N, K = weights[0].shape[1], weights[1].shape[1]  # the heads of this device
        q, k, v = jnp.split(
            jnp.einsum("BTD,DXH->BTXH", copy_to_tensor_parallel(x), jnp.concatenate(weights, 1)), (N, N + K), axis=2
        )
        if c.query_key_value_bias:
            biases = (self.query_bias, self.key_bias, self.value_bias)
            q, k, v = (a + cast(bias, c)[None, None] for a, bias in zip((q, k, v), biases, strict=True))
        if c.query_key_norm != "none":
            q, k = self.query_norm(q), self.key_norm(k)
        out, cache = self.attend(q, k, v, context, cache)
        return reduce_from_tensor_parallel(jnp.einsum("BTNH,NHD->BTD", out, cast(self.output, c))), cache, None

    def attend(self, q, k, v, context: Context, cache: KeyValues | None = None):
        """Compute the outputs of the heads from the queries, keys and values, with the attention variant of the config.

        `q` [B,T,N,H] are the queries of the T tokens, and `k` and `v` [B,T,K,H] are their keys and values. With a
        cache, the keys and values are first written into the cache. Then the queries attend to the keys in the cache.

        Returns:
          The outputs of the heads [B,T,N,H], and the new cache, which is None if `cache` is None.
        """
        c, own, kind = self.config, v, variant(self.config.attention)
        if kind.rotary and c.rope_theta is not None:
            q, k = (rotary(a, context.positions, c.rope_theta, c.rope_scaling) for a in (q, k))
        if cache is not None:
            cache = tuple(
                old
                if old is None
                else jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), context.offset, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            k, v = cache[0], cache[0] if cache[1] is None else cache[1]
        returned = kind.load()(c, q, k, v, context)
        if not isinstance(returned, tuple) or len(returned) != 2:
            found = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else "a value that is not a tuple"
            raise ValueError(
                f"attention={c.attention!r}: the function of this variant must return (out, rest), but it returned "
                f"{found}. 'out' must have the shape {q.shape}; 'rest' must be None, or an array [B,T,N]: one minus "
                "the sum of each query's weights"
            )
        out, rest = returned
        if out.shape != q.shape:
            raise ValueError(
                f"attention={c.attention!r}: the function of this variant returned (out, rest) where 'out' has the "
                f"shape {out.shape}; it must have the shape of the queries, {q.shape}"
            )
        if c.remainder != "none":
            if rest is None:
                raise ValueError(
                    f"attention={c.attention!r}: with remainder={c.remainder!r}, the function of this variant must "
                    "return (out, rest), where 'rest' is an array [B,T,N]: one minus the sum of each query's weights. "
                    "It returned rest=None. Return the array, or set remainder='none'"
                )
            own = jnp.repeat(own, c.N // c.K, axis=2) if c.remainder == "value" else cast(self.head_bias, c)[None, None]
            out = (out.astype(jnp.float32) + rest[..., None] * own.astype(jnp.float32)).astype(out.dtype)
        if self.norm is not None:
            out = self.norm(out)
        return out, cache


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the rotary position of every token [B,T]: its distance to the first token of its segment.

    A segment is a run of neighbouring tokens with the same id in `segment_ids`.
    """
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    first = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
