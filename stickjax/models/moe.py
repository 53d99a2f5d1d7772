"""Sparse experts: a feed-forward network that consists of E experts. Every token uses k of them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pallas_kernels import cost, expert_mlp, route
from stickjax.config import ModelConfig
from stickjax.models.layers import SharedExpert, all_experts, gates, matrix_std, normal, output_std
from stickjax.models.router import Router, RouterSums
from stickjax.parallel.collectives import (
    all_gather_for_experts,
    copy_to_tensor_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_from_experts,
)


class SparseExperts(nnx.Module):
    """A feed-forward network of experts: the sum over the k chosen experts e of gate_e * act(x w_in[e]) w_out[e].

    A router chooses the experts and gates of every token x. For a padding token it chooses no expert, and the sum is
    zero. `w_in` is [E,D,G,F], and `w_out` is [E,F,D], where F is the number of hidden units of an expert. G is 2 for a
    gated activation, such as swiglu, else 1. If experts were added to a trained model, their weights are the parameters
    `new_w_in` and `new_w_out`, and the indices of these experts come last.

    If the config has `experts.shared`, the output of a dense `SharedExpert` is added to the sum, without a gate. It is
    added for all tokens, including padding. If the config has `experts.bias`, a trainable `output_bias` [D] is added to
    the sum, but not for padding tokens.

    If the experts are sharded over the mesh axis "expert", every device computes its own experts for the tokens of all
    devices along this axis. An expert has no capacity limit: it computes all tokens that the router sends to it.
    """

    def __init__(self, config: ModelConfig, key):
        self.config = c = config
        kr, ki, ko = jax.random.split(key, 3)
        E, new = c.experts.E, c.experts.added
        self.router = Router(c, c.experts, c.experts.k, kr)
        self.w_in = normal(ki, (E, c.D, gates(c), c.F), matrix_std(c), c)
        self.w_out = normal(ko, (E, c.F, c.D), output_std(c), c)
        k_in, k_out = jax.random.split(jax.random.fold_in(key, 1))
        self.new_w_in = normal(k_in, (new, c.D, gates(c), c.F), matrix_std(c), c) if new else None
        self.new_w_out = normal(k_out, (new, c.F, c.D), output_std(c), c) if new else None
        self.shared = SharedExpert(c, jax.random.fold_in(key, 2)) if c.experts.shared else None
        self.output_bias = nnx.Param(jnp.zeros(c.D, c.param_dtype)) if c.experts.bias else None

    def __call__(
        self, x: Float[Array, "B T D"], token_mask: Bool[Array, "B T"] | None = None, key=None
    ) -> tuple[Float[Array, "B T D"], RouterSums]:
        c = self.config
        tokens = x.reshape(-1, c.D)
        chosen, weights, sums = self.router(tokens, None if token_mask is None else token_mask.reshape(-1), key)
        w_in, w_out = (all_experts(self, name) for name in ("w_in", "w_out"))
        E, D, G, F = w_in.shape  # E and F count the experts and hidden units of this device
        tokens, weights = copy_to_tensor_parallel((tokens, weights))
        tokens, chosen, weights = all_gather_for_experts(tokens, chosen, weights, E)
        options = dict(activation=c.activation, implementation=c.implementation)
        # With a balanced load, this is the share of the (token, choice) pairs that choose an expert of this device.
        run = cost.share(E / self.router.experts.count, lambda *arrays: expert_mlp(*arrays, **options))
        y = run(tokens, w_in.reshape(E, D, G * F), w_out, route(chosen, E), weights)
        y = reduce_scatter_from_experts(reduce_from_tensor_parallel(y)).reshape(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        return add_output_bias(self, y, token_mask), sums


def add_output_bias(mixture, y: Float[Array, "B T D"], token_mask: Bool[Array, "B T"] | None) -> Float[Array, "B T D"]:
    """Add the output bias of a mixture of experts to y, the sum of the outputs of the experts.

    `mixture` is a module whose field `output_bias` is the bias [D], or None. If it is None, y is returned unchanged.
    The bias is not added for padding tokens, for which `token_mask` is False.
    """
    if mixture.output_bias is None:
        return y
    bias = mixture.output_bias[...].astype(y.dtype)[None, None]
    return y + (bias if token_mask is None else jnp.where(token_mask[..., None], bias, 0))
