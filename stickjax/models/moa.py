"""Mixture of attention heads: experts own the query heads, all share keys and values.

Zhang et al., `Mixture of Attention Heads <https://arxiv.org/abs/2210.05144>`_; with several heads in an expert, the
attention of the Sparse Universal Transformer and of ModuleFormer.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels import expert_linear, route
from stickjax.collectives import joined, split
from stickjax.config import ModelConfig
from stickjax.models.attention import Attention, Context, KeyValues
from stickjax.models.layers import all_experts, cast, matrix_std, normal, output_std
from stickjax.models.moe import biased
from stickjax.models.router import Experts, Router, RouterSums


class MixtureOfHeads(Attention):
    """sum over the chosen experts e of gate * attention(x W_query[e], x W_key, x W_value) W_output[e].

    `attention_experts` experts have K heads each, and a token chooses N / K of them, so that it has N query heads. A
    padding token runs none and gives zero. Keys and values are x W_key and x W_value, with biases if `key_value` is
    "biased"; with "input" both are x itself, and then the cache holds it once.
    """

    def __init__(self, config: ModelConfig, key):
        self.config = c = config
        E, new = c.attention_experts, c.new_attention_experts
        kr, kq, kk, kv, ko = jax.random.split(key, 5)
        self.router = Router(c, Experts(E, new, c.gone_attention_experts), c.N // c.K, kr)
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
        self.output_bias = zeros(c.D) if c.expert_bias else None
        self.head_bias = self.norm = None  # a head of a token is another one of the next

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        cache: KeyValues | None = None,
        real: Bool[Array, "B T"] | None = None,
        key=None,
    ) -> tuple[Float[Array, "B T D"], KeyValues | None, RouterSums]:
        c, (B, T, D) = self.config, x.shape
        chosen, tokens = c.N // c.K, x.reshape(-1, D)
        indices, gates, sums = self.router(tokens, None if real is None else real.reshape(-1), key)
        routing = route(indices, self.router.experts.count)
        x, tokens, gates = split((x, tokens, gates))
        q = expert_linear(tokens, all_experts(self, "expert_query"), routing, implementation=c.implementation)
        k, v = self.keys_values(x)
        K = k.shape[2]  # of this device
        # Query heads stand by their key head: head j of all chosen experts reads key head j.
        q = q.reshape(B, T, chosen, K, c.H).swapaxes(2, 3).reshape(B, T, K * chosen, c.H)
        out, cache = self.attend(q, k, v, context, cache)
        out = out.reshape(B, T, K, chosen, c.H).swapaxes(2, 3).reshape(-1, K * c.H)
        weights = all_experts(self, "expert_output")
        y = expert_linear(out, weights, routing, gates=gates, implementation=c.implementation)
        return biased(self, joined(y.reshape(x.shape)), real), cache, sums

    def keys_values(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        c = self.config
        if c.key_value == "input":
            return x[:, :, None], x[:, :, None]
        k, v = (jnp.einsum("BTD,DKH->BTKH", x, cast(w, c)) for w in (self.key, self.value))
        if c.key_value == "biased":
            k, v = k + cast(self.key_bias, c)[None, None], v + cast(self.value_bias, c)[None, None]
        return k, v
