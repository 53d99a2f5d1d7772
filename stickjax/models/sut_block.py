"""The block of the Sparse Universal Transformer: attention and feed-forward network, both of experts.

Tan et al., `Sparse Universal Transformer <https://arxiv.org/abs/2310.07096>`_.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import Routing, expert_linear, expert_mlp, route
from stickjax.models.attention import Context
from stickjax.models.layers import LayerNorm, cast, dropout, uniform
from stickjax.models.moa import SharedHeads
from stickjax.models.router import RouterSums, choose_experts, router_sums
from stickjax.sut_config import SutConfig


class Choice(NamedTuple):
    """The experts of B * T tokens, their gates [B*T,k], and what the losses of their router are made of."""

    routing: Routing
    gates: jax.Array
    sums: RouterSums


class TanhRouter(nnx.Module):
    """The k largest of softmax(dropout(tanh(x w_in + bias)) weight), as gates divided by their sum; in fp32."""

    def __init__(self, config: SutConfig, E: int, k: int, sample_topk: int, key):
        self.config, self.E, self.k, self.sample_topk = config, E, k, sample_topk
        k_in, k_bias, k_out = jax.random.split(key, 3)
        D = config.D
        self.w_in = uniform(k_in, (D, D), D**-0.5, config)
        self.bias = uniform(k_bias, (D,), D**-0.5, config)
        self.weight = uniform(k_out, (D, E), D**-0.5, config)

    def __call__(self, x: Float[Array, "B T D"], running: Float[Array, "B T"], key=None) -> Choice:
        """Tokens whose `running` is 0 have no expert (index E); the losses weigh a token by its `running`."""
        x, running = x.reshape(-1, x.shape[-1]).astype(jnp.float32), running.reshape(-1)
        w_in, bias, weight = (p[...].astype(jnp.float32) for p in (self.w_in, self.bias, self.weight))
        k_drop, k_sample = (None, None) if key is None else jax.random.split(key)
        logits = dropout(jnp.tanh(x @ w_in + bias[None]), self.config.dropout, k_drop) @ weight
        chosen, gates = choose_experts(logits, self.k, "softmax_topk", sample_topk=self.sample_topk, key=k_sample)
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-6)
        chosen = jnp.where(running[:, None] > 0, chosen, self.E)
        sums = router_sums(logits, chosen, running)
        return Choice(route(chosen, self.E), gates, sums._replace(slots=sums.rows.sum()))


class BiasedExperts(nnx.Module):
    """sum over the chosen experts of gate * (gelu(x w_in[e] + in_bias[e]) w_out[e] + out_bias[e])."""

    def __init__(self, config: SutConfig, key):
        self.config = c = config
        k_in, k_in_bias, k_out, k_out_bias = jax.random.split(key, 4)
        self.w_in = uniform(k_in, (c.E, c.D, c.F), 1 / c.D, c)
        self.in_bias = uniform(k_in_bias, (c.E, c.F), c.F**-0.5, c)
        self.w_out = uniform(k_out, (c.E, c.F, c.D), 1 / c.F, c)
        self.out_bias = uniform(k_out_bias, (c.E, c.D), c.D**-0.5, c)

    def __call__(self, x: Float[Array, "B T D"], routing: Routing, gates, key=None) -> Float[Array, "B T D"]:
        c, tokens = self.config, x.reshape(-1, x.shape[-1])
        w_in, b_in, w_out, b_out = (cast(p, c) for p in (self.w_in, self.in_bias, self.w_out, self.out_bias))
        how = dict(implementation=c.implementation)
        if key is None or not c.dropout:
            y = expert_mlp(tokens, w_in, w_out, routing, gates, b_in=b_in, b_out=b_out, activation="gelu", **how)
        else:
            hidden = expert_linear(tokens, w_in, routing, bias=b_in, grouped_out=True, **how)
            hidden = dropout(jax.nn.gelu(hidden, approximate=False), c.dropout, key)
            y = expert_linear(hidden, w_out, routing, bias=b_out, grouped_in=True, gates=gates, **how)
        return y.reshape(x.shape)


class SutBlock(nnx.Module):
    """h = norm(h + attention(h, s)), with `cross` h = norm(h + cross(h, source)), h = norm(h + experts(h)).

    `normalize_before`: h = h + attention(norm(h), norm(s)), and so on. Keys and values are those of s, so that tokens
    which have halted stay to be seen, as what they have become.
    """

    def __init__(self, config: SutConfig, key, *, causal: bool, cross: bool = False):
        self.config = c = config
        keys = jax.random.split(key, 6)
        heads, relative = (c.attention_experts, c.attention_k, c.sample_topk), c.attention == "softmax"
        self.attention_router = TanhRouter(c, *heads, keys[0])
        self.attention = SharedHeads(c, keys[1], causal=causal, relative=relative)
        self.attention_norm = LayerNorm(c)
        self.cross_router = TanhRouter(c, *heads, keys[2]) if cross else None
        self.cross = SharedHeads(c, keys[3], causal=False, relative=False) if cross else None
        self.cross_norm = LayerNorm(c) if cross else None
        self.ffn_router = TanhRouter(c, c.E, c.k, 0, keys[4])
        self.ffn = BiasedExperts(c, keys[5])
        self.ffn_norm = LayerNorm(c)

    def __call__(
        self,
        h: Float[Array, "B T D"],
        s: Float[Array, "B T D"],
        running: Float[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        source: Float[Array, "B S D"] | None = None,
        source_segment_ids: Int[Array, "B S"] | None = None,
        key=None,
    ) -> tuple[Float[Array, "B T D"], dict[str, RouterSums]]:
        """The next h, and the sums of every router by its name."""
        c, sums = self.config, {}
        before = c.normalize_before

        def branch(h, name, norm, router, layer, index):
            keys = [None] * 3 if key is None else jax.random.split(jax.random.fold_in(key, index), 3)
            x = norm(h) if before else h
            choice = router(x, running, keys[0])
            sums[name] = choice.sums
            y = layer(x, choice.routing, choice.gates, keys[1])
            h = h + dropout(y, c.dropout, keys[2])
            return h if before else norm(h)

        def attend_self(x, routing, gates, key):
            context = Context(segment_ids, segment_ids, None, 0)
            return self.attention(x, self.attention_norm(s) if before else s, context, routing, gates, key)

        def attend_source(x, routing, gates, key):
            return self.cross(x, source, Context(segment_ids, source_segment_ids, None, 0), routing, gates, key)

        h = branch(h, "attention", self.attention_norm, self.attention_router, attend_self, 0)
        if self.cross is not None:
            h = branch(h, "cross", self.cross_norm, self.cross_router, attend_source, 1)
        return branch(h, "ffn", self.ffn_norm, self.ffn_router, self.ffn, 2), sums
