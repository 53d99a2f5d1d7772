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
from stickjax.models.layers import cast, matrix_std, normal, output_std
from stickjax.models.moe import RouterSums, routed


class MixtureOfHeads(Attention):
    """sum over the chosen experts e of gate * attention(x W_query[e], x W_key, x W_value) W_output[e].

    `attention_experts` experts have K heads each, and a token chooses N / K of them, so that it has N query heads. A
    padding token runs none and gives zero.
    """

    def __init__(self, config: ModelConfig, key):
        self.config = c = config
        E = c.attention_experts
        kr, kq, kk, kv, ko = jax.random.split(key, 5)
        self.router = normal(kr, (c.D, E), matrix_std(c), c)
        self.expert_query = normal(kq, (E, c.D, c.K * c.H), matrix_std(c), c)
        self.key = normal(kk, (c.D, c.K, c.H), matrix_std(c), c)
        self.value = normal(kv, (c.D, c.K, c.H), matrix_std(c), c)
        self.expert_output = normal(ko, (E, c.K * c.H, c.D), output_std(c), c)
        self.router_bias = nnx.Param(jnp.zeros(E, c.param_dtype)) if c.bias_rate else None
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
        chosen, K = c.N // c.K, self.key.shape[1]  # K of this device
        tokens, real = x.reshape(-1, D), None if real is None else real.reshape(-1)
        indices, gates, sums = routed(c, tokens, self.router, self.router_bias, chosen, real, key)
        routing = route(indices, c.attention_experts)
        x, tokens, gates = split((x, tokens, gates))
        q = expert_linear(tokens, cast(self.expert_query, c), routing, implementation=c.implementation)
        k, v = (jnp.einsum("BTD,DKH->BTKH", x, cast(w, c)) for w in (self.key, self.value))
        # Query heads stand by their key head: head j of all chosen experts reads key head j.
        q = q.reshape(B, T, chosen, K, c.H).swapaxes(2, 3).reshape(B, T, K * chosen, c.H)
        out, cache = self.attend(q, k, v, context, cache)
        out = out.reshape(B, T, K, chosen, c.H).swapaxes(2, 3).reshape(-1, K * c.H)
        y = expert_linear(out, cast(self.expert_output, c), routing, gates=gates, implementation=c.implementation)
        return joined(y.reshape(x.shape)), cache, sums
