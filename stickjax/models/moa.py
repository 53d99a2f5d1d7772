"""Mixture of attention heads: every expert has its own query heads, and all experts share the keys and values.

Zhang et al., `Mixture of Attention Heads <https://arxiv.org/abs/2210.05144>`_. With several heads per expert, this is
the attention of the Sparse Universal Transformer and of ModuleFormer.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels import Routing, expert_linear, route, stick_breaking_attention
from stickjax.config import ModelConfig
from stickjax.config.universal import SutConfig
from stickjax.models.attention import Attention, Context, KeyValues
from stickjax.models.layers import all_experts, cast, matrix_std, normal, output_std, uniform
from stickjax.models.moe import add_output_bias
from stickjax.models.relative import softmax_attention
from stickjax.models.router import Router, RouterSums
from stickjax.parallel.collectives import copy_to_tensor_parallel, reduce_from_tensor_parallel


class MixtureOfHeads(Attention):
    """Attention whose query heads belong to experts. A router chooses the experts and gates of every token x.

    The output is the sum over the chosen experts e of

      gate_e * attention(x W_query[e], x W_key, x W_value) W_output[e].

    `config.attention_experts` describes the experts. There are K key heads, and every expert has K query heads. The
    router chooses N / K experts for every token, so that a token has N query heads. If the config has
    `attention_experts.bias`, a trainable `output_bias` [D] is added to the sum. A padding token uses no expert, and its
    output is zero.

    If `config.key_value` is "biased", the keys and values have trainable biases. If it is "input", the keys and the
    values are both x itself, and the cache stores x only once.
    """

    def __init__(self, config: ModelConfig, key):
        self.config = c = config
        E, new = c.attention_experts.E, c.attention_experts.added
        kr, kq, kk, kv, ko = jax.random.split(key, 5)
        self.router = Router(c, c.attention_experts, c.N // c.K, kr)
        self.expert_query = normal(kq, (E, c.D, c.K * c.H), matrix_std(c), c)
        self.expert_output = normal(ko, (E, c.K * c.H, c.D), output_std(c), c)
        extra = lambda key, *shape, std: normal(jax.random.fold_in(key, 1), (new, *shape), std, c) if new else None  # noqa: E731
        self.new_expert_query = extra(kq, c.D, c.K * c.H, std=matrix_std(c))
        self.new_expert_output = extra(ko, c.K * c.H, c.D, std=output_std(c))
        own, zeros = c.key_value != "input", lambda *shape: nnx.Param(jnp.zeros(shape, c.param_dtype))
        self.key = normal(kk, (c.D, c.K, c.H), matrix_std(c), c) if own else None
        self.value = normal(kv, (c.D, c.K, c.H), matrix_std(c), c) if own else None
        self.key_bias = zeros(c.K, c.H) if c.key_value == "biased" else None
        self.value_bias = zeros(c.K, c.H) if c.key_value == "biased" else None
        self.output_bias = zeros(c.D) if c.attention_experts.bias else None
        self.query_norm = self.key_norm = None
        self.head_bias = self.norm = None  # head n belongs to different experts for different tokens

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        cache: KeyValues | None = None,
        token_mask: Bool[Array, "B T"] | None = None,
        key=None,
    ) -> tuple[Float[Array, "B T D"], KeyValues | None, RouterSums]:
        c = self.config
        indices, gates, sums = self.router(
            x.reshape(-1, c.D), None if token_mask is None else token_mask.reshape(-1), key
        )
        routing = route(indices, self.router.experts.count)
        x, gates = copy_to_tensor_parallel((x, gates))
        k, v = self.keys_values(x)
        K = k.shape[2]  # the key heads of this device
        q = expert_queries(x, all_experts(self, "expert_query"), routing, K, c.implementation)
        out, cache = self.attend(q, k, v, context, cache)
        y = expert_outputs(out, all_experts(self, "expert_output"), routing, gates, K, c.implementation)
        return add_output_bias(self, reduce_from_tensor_parallel(y), token_mask), cache, sums

    def keys_values(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        c = self.config
        if c.key_value == "input":
            return x[:, :, None], x[:, :, None]
        k, v = (jnp.einsum("BTD,DKH->BTKH", x, cast(w, c)) for w in (self.key, self.value))
        if c.key_value == "biased":
            k, v = k + cast(self.key_bias, c)[None, None], v + cast(self.value_bias, c)[None, None]
        return k, v


class SharedHeads(nnx.Module):
    """Attention whose query heads belong to experts, for the Universal Transformer. The caller runs the router.

    The output for a token x is the sum over the experts e that the router chose for x of

      gate_e * attention(x W_query[e], source W_key, source W_value) W_output[e].

    gate_e is the weight that the router gave to the expert e. `source` is the sequence of x (self-attention) or another
    sequence (cross-attention). If the router chose no expert for a token, the output of this token is zero.

    With `causal`, the field `attention` of the config chooses stick-breaking or causal softmax attention. Without
    `causal`, the layer uses softmax attention to all keys. With `relative`, softmax attention adds a trainable vector
    to each key. The parameter `relative` [K,H,P] has a vector for each key head and each of the P = 2 * clip - 1
    distances between a query and a key. `clip` is a field of the config.
    """

    def __init__(self, config: SutConfig, key, *, causal: bool, relative: bool):
        self.config = c = config
        self.causal = causal
        kq, kk, kv, ko = jax.random.split(key, 4)
        width = c.K * c.H
        xavier = (3 / (c.D + width)) ** 0.5  # with gain 1 / sqrt(2)
        self.expert_query = uniform(kq, (c.attention_experts.E, c.D, width), 1 / c.D, c)
        self.key = uniform(kk, (c.D, c.K, c.H), xavier, c)
        self.value = uniform(kv, (c.D, c.K, c.H), xavier, c)
        self.expert_output = uniform(ko, (c.attention_experts.E, width, c.D), 1 / width, c)
        self.relative = nnx.Param(jnp.zeros((c.K, c.H, 2 * c.clip - 1), c.param_dtype)) if relative else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        routing: Routing,
        gates: Float[Array, "R k"],
        source: Float[Array, "B S D"],
        context: Context,
        key=None,
    ) -> Float[Array, "B T D"]:
        c, segments, key_segments = self.config, context.segment_ids, context.key_segment_ids
        q = expert_queries(x, cast(self.expert_query, c), routing, c.K, c.implementation)
        k, v = (jnp.einsum("BSD,DKH->BSKH", source, cast(w, c)) for w in (self.key, self.value))
        scale = c.H**-0.5
        if self.causal and c.causal:
            out, _ = stick_breaking_attention(
                q, k, v, scale=scale, segment_ids=segments, key_segment_ids=key_segments,
                implementation=c.implementation,
            )  # fmt: skip
        else:
            mask = (segments[:, :, None] == key_segments[:, None]) & (key_segments >= 0)[:, None]
            if self.causal:
                mask &= jnp.tri(x.shape[1], source.shape[1], dtype=bool)[None]
            relative = None if self.relative is None else cast(self.relative, c)
            out = softmax_attention(q, k, v, mask, scale, relative, c.dropout, key)
        return expert_outputs(out, cast(self.expert_output, c), routing, gates, c.K, c.implementation)


def expert_queries(
    x: Float[Array, "B T D"], weight: Float[Array, "E D KH"], routing: Routing, K: int, implementation
) -> Float[Array, "B T N H"]:
    """Compute the queries x W_query[e] of every token x, for the k experts e that `routing` has for the token.

    `weight` [E,D,KH] is W_query, and KH is K * H: every expert has K query heads. Query head j of an expert attends to
    key head j. The N = K * k query heads of a token are ordered by key head, as attention with shared key heads needs.
    `implementation`: the kernel of the grouped GEMM, such as "triton"; None: the best kernel that works.
    """
    (B, T, D), k = x.shape, routing.expert_indices.shape[1]
    q = expert_linear(x.reshape(-1, D), weight, routing, implementation=implementation)
    q = q.reshape(B, T, k, K, -1).swapaxes(2, 3)
    return q.reshape(B, T, K * k, q.shape[-1])


def expert_outputs(
    heads: Float[Array, "B T N H"], weight: Float[Array, "E KH D"], routing: Routing, gates, K: int, implementation
) -> Float[Array, "B T D"]:
    """Multiply the head outputs by the output matrices of their experts, and sum over the experts of every token.

    `heads` are the outputs of the N = K * k query heads, ordered by key head, as `expert_queries` returns the queries.
    `weight` [E,KH,D] has the output matrices, and KH is K * H. `routing` has the k experts of every token, and `gates`
    [B*T,k] are their weights in the sum. `implementation`: as in `expert_queries`.
    """
    B, T, N, H = heads.shape
    heads = heads.reshape(B, T, K, N // K, H).swapaxes(2, 3).reshape(-1, K * H)
    return expert_linear(heads, weight, routing, gates=gates, implementation=implementation).reshape(B, T, -1)
