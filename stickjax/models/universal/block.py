"""The block of the Sparse Universal Transformer: attention and a feed-forward network, which both consist of experts.

Tan et al., `Sparse Universal Transformer <https://arxiv.org/abs/2310.07096>`_.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import Routing, expert_linear, expert_mlp, route
from stickjax.config.experts import ExpertsConfig
from stickjax.config.universal import SutConfig
from stickjax.models.attention import Context
from stickjax.models.layers import LayerNorm, cast, dropout, uniform
from stickjax.models.moa import SharedHeads
from stickjax.models.router import Experts, Router, RouterSums


class TanhRouter(Router):
    """A router with one hidden layer. The logits for a token x are dropout(tanh(x @ w_in + bias)) @ weight.

    The gates of a token are the softmax probabilities of its k experts, divided by the sum of these k probabilities.
    """

    normalized = True

    def __init__(self, config: SutConfig, mixture: ExpertsConfig, key):
        self.config, self.experts, self.k = config, Experts(mixture.E), mixture.k
        self.order, self.sample_topk, self.token_rounding = "softmax_topk", mixture.sample_topk, 0
        self.denominator, self.selection_bias, self.slot = "old", None, None
        k_in, k_bias, k_out = jax.random.split(key, 3)
        D = config.D
        self.w_in = uniform(k_in, (D, D), D**-0.5, config)
        self.bias = uniform(k_bias, (D,), D**-0.5, config)
        self.weight = uniform(k_out, (D, mixture.E), D**-0.5, config)

    def logits(self, tokens: Float[Array, "T D"], key=None) -> tuple[Float[Array, "T E"], Any]:
        w_in, bias, weight = (p[...].astype(jnp.float32) for p in (self.w_in, self.bias, self.weight))
        k_drop, k_sample = (None, None) if key is None else jax.random.split(key)
        hidden = jnp.tanh(tokens.astype(jnp.float32) @ w_in + bias[None])
        return dropout(hidden, self.config.dropout, k_drop) @ weight, k_sample


class BiasedExperts(nnx.Module):
    """Feed-forward experts with biases. The caller runs the router.

    The output for a token x is the sum over the experts e that the router chose for x of

      gate_e * (gelu(x @ w_in[e] + in_bias[e]) @ w_out[e] + out_bias[e]).

    gate_e is the weight that the router gave to the expert e.
    """

    def __init__(self, config: SutConfig, key):
        self.config, E = (c := config), config.experts.E
        k_in, k_in_bias, k_out, k_out_bias = jax.random.split(key, 4)
        self.w_in = uniform(k_in, (E, c.D, c.F), 1 / c.D, c)
        self.in_bias = uniform(k_in_bias, (E, c.F), c.F**-0.5, c)
        self.w_out = uniform(k_out, (E, c.F, c.D), 1 / c.F, c)
        self.out_bias = uniform(k_out_bias, (E, c.D), c.D**-0.5, c)

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


class Branch(nnx.Module):
    """A residual branch with experts: h becomes norm(h + f(h)), or h + f(norm(h)) if the config has `normalize_before`.

    h [B,T,D] are the hidden states. f(h) is the sum of the outputs of the experts that the router chooses for each
    token, weighted by their gates.
    """

    def __init__(self, config: SutConfig, router: TanhRouter, experts: SharedHeads | BiasedExperts):
        self.config, self.router, self.experts = config, router, experts
        self.norm = LayerNorm(config)

    def __call__(self, h: Float[Array, "B T D"], running: Float[Array, "B T"], key, *inputs):
        """Return the new h, and the `RouterSums` for the losses of the router.

        `running`: the probability that each token has not halted. It is the weight of the token in the losses. A token
        with probability 0 uses no expert. `key`: a random key for a training step, or None. `inputs`: further arguments
        of the experts: `source` and `context` for `SharedHeads`, none for `BiasedExperts`.
        """
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        x = self.norm(h) if self.config.normalize_before else h
        chosen, gates, sums = self.router(x.reshape(-1, x.shape[-1]), running.reshape(-1), keys[0])
        y = self.experts(x, route(chosen, self.router.experts.count), gates, *inputs, key=keys[1])
        h = h + dropout(y, self.config.dropout, keys[2])
        return h if self.config.normalize_before else self.norm(h), sums._replace(pairs=sums.rows.sum())


class SutBlock(nnx.Module):
    """The block of a Universal Transformer: self-attention, cross-attention (in a decoder), and feed-forward experts.

    The model applies the block once per step. h is the output of the previous step. s is the state of every token: a
    weighted mean of h over the steps so far (`Halting.state`). The weight of a step is the probability that the token
    halts at this step. Queries come from h, but self-attention computes its keys and values from s. So a token that has
    not halted attends to the final states of the tokens that have halted.
    """

    def __init__(self, config: SutConfig, key, *, causal: bool, cross: bool = False):
        self.config = c = config
        k_self, k_cross, k_router, k_experts = jax.random.split(key, 4)

        def heads(key, **kind):
            k_router, k_experts = jax.random.split(key)
            router = TanhRouter(c, c.attention_experts, k_router)
            return Branch(c, router, SharedHeads(c, k_experts, **kind))

        self.attention = heads(k_self, causal=causal, relative=not c.causal)
        self.cross = heads(k_cross, causal=False, relative=False) if cross else None
        self.ffn = Branch(c, TanhRouter(c, c.experts, k_router), BiasedExperts(c, k_experts))

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
        """Apply the block to h, the output of the previous step. Return the new h, and {router name: its `RouterSums`}.

        `s`: the states of the tokens, from which self-attention computes its keys and values. `running`: the
        probability that each token has not halted; a token with probability 0 uses no expert. `segment_ids`: tokens
        attend only to tokens with the same id; a negative id is padding. `source` and `source_segment_ids`: the final
        states and the segment ids of the encoder, for cross-attention. `key`: a random key for a training step, or
        None.
        """
        keys, sums = [None] * 3 if key is None else jax.random.split(key, 3), {}
        seen = self.attention.norm(s) if self.config.normalize_before else s
        context = Context(segment_ids, segment_ids, None, 0)
        h, sums["attention"] = self.attention(h, running, keys[0], seen, context)
        if self.cross is not None:
            context = Context(segment_ids, source_segment_ids, None, 0)
            h, sums["cross"] = self.cross(h, running, keys[1], source, context)
        h, sums["ffn"] = self.ffn(h, running, keys[2])
        return h, sums
