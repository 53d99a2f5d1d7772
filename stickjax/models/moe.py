"""Sparse experts: the router, its losses, and the expert network.

The losses are means over all tokens of the batch, on however many devices it lies.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import cost, expert_mlp, route
from stickjax.collectives import from_experts, joined, split, to_experts, total
from stickjax.config import ModelConfig
from stickjax.models.layers import cast, gates, matrix_std, normal, output_std


class RouterSums(NamedTuple):
    """What a router's losses are made of, summed over the real tokens of this device.

    `tokens` and `slots`: their number, and k times that. `rows` [E]: how many went to each expert. `probability` [E],
    `z` and `entropy`, with g the softmax of the logits: sum g, sum logsumexp(logits)^2 and sum H(g).
    """

    tokens: jax.Array
    slots: jax.Array
    rows: jax.Array
    probability: jax.Array
    z: jax.Array
    entropy: jax.Array


class RouterStats(NamedTuple):
    """The losses of routers [L] (unweighted), and the share of the T * k rows that went to each expert, [L,E]."""

    switch: jax.Array
    z: jax.Array
    mutual_information: jax.Array
    load: jax.Array


def choose_experts(
    logits: Float[Array, "T E"], k: int, order: str, *, bias=None, sample_topk: int = 0, key=None
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """Expert indices and gates of every token.

    `topk_softmax`: the k largest logits, their softmax (gates sum to one). `softmax_topk`: the softmax over E, its k
    largest probabilities as they are. `bias` [E] is added for the selection only. With a key, the last `sample_topk`
    of the k are drawn without replacement by their probabilities instead (Gumbel top-k); gates are as without.
    """
    logits = logits.astype(jnp.float32)
    scores = logits if order == "topk_softmax" else jax.nn.softmax(logits, axis=-1)
    wanted = scores if bias is None else scores + bias.astype(jnp.float32)[None]
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(wanted), k)
    if sample_topk and key is not None:
        best = chosen[:, : k - sample_topk]
        taken = jax.nn.one_hot(best, logits.shape[1], dtype=bool).any(1)
        noisy = jax.nn.log_softmax(logits, axis=-1) + jax.random.gumbel(key, logits.shape)
        _, drawn = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(taken, -jnp.inf, noisy)), sample_topk)
        chosen = jnp.concatenate([best, drawn], 1)
    gates = jnp.take_along_axis(scores, chosen, axis=1)
    return chosen, jax.nn.softmax(gates, axis=-1) if order == "topk_softmax" else gates


def rounded(
    expert_indices: Int[Array, "T k"], gates: Float[Array, "T k"], num_experts: int, multiple: int
) -> Int[Array, "T k"]:
    """The indices with every expert's rows rounded down to a multiple, so that no tile of a kernel is part empty.

    The rows of an expert with the smallest gates go, fewer than `multiple` of them; their index becomes E, no expert
    (after arXiv 2512.14080, which also rounds up). What runs depends on the device's whole batch: for training alone.

    >>> rounded(jnp.array([[0], [0], [1], [0]]), jnp.array([[0.3], [0.1], [0.9], [0.2]]), 2, 2).T
    Array([[0, 2, 2, 0]], dtype=int32)
    """
    experts, E = expert_indices.reshape(-1), num_experts
    order = jnp.lexsort((-jax.lax.stop_gradient(gates).reshape(-1), experts))
    counts = jnp.bincount(experts, length=E + 1)
    starts = jnp.cumsum(counts) - counts
    rank = jnp.zeros_like(experts).at[order].set(jnp.arange(experts.size) - starts[experts[order]])
    keep = rank < (counts // multiple * multiple)[experts]
    return jnp.where(keep, experts, E).reshape(expert_indices.shape)


def router_sums(
    logits: Float[Array, "T E"], expert_indices: Int[Array, "T k"], real: Bool[Array, "T"] | None = None
) -> RouterSums:
    """The sums of one router over its real tokens."""
    logits = logits.astype(jnp.float32)
    weight = jnp.ones(logits.shape[:1]) if real is None else real.astype(jnp.float32)
    log_g = jax.nn.log_softmax(logits, axis=-1)
    g, tokens = jnp.exp(log_g), weight.sum()
    # The index of a padding token is E; bincount drops it.
    rows = jnp.bincount(expert_indices.reshape(-1), length=logits.shape[1]).astype(jnp.float32)
    z = (weight * jnp.square(jax.nn.logsumexp(logits, axis=-1))).sum()
    entropy = -(weight * (g * log_g).sum(-1)).sum()
    return RouterSums(tokens, tokens * expert_indices.shape[1], rows, (weight[:, None] * g).sum(0), z, entropy)


def router_stats(sums: RouterSums) -> RouterStats:
    """The losses over the tokens of all devices, of one router or of those of all layers.

    switch = E * sum_e f_e P_e, f_e the share of the rows and P_e the mean of g_e: 1 at balance (arXiv 2101.03961;
      Hugging Face's variant does not divide the rows by k and is k at balance).
    z = mean(logsumexp(logits)^2) (arXiv 2202.08906).
    mutual information = H(e|x) - H(e), the entropy of g_t averaged, less that of P (arXiv 2306.04640).
    """
    sums = total(sums)
    tokens, slots = jnp.maximum(sums.tokens, 1), jnp.maximum(sums.slots, 1)
    load, P = sums.rows / slots[..., None], sums.probability / tokens[..., None]
    marginal = -(P * jnp.log(P + 1e-8)).sum(-1)
    switch = sums.rows.shape[-1] * (load * P).sum(-1)
    return RouterStats(switch, sums.z / tokens, sums.entropy / tokens - marginal, load)


def updated_router_bias(bias: Float[Array, "*L E"], load: Float[Array, "*L E"], rate: float) -> Float[Array, "*L E"]:
    """Auxiliary-loss-free balancing (arXiv 2408.15664): b_e + rate * sign(mean load - load_e)."""
    return (bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)).astype(bias.dtype)


def routed(
    config: ModelConfig, tokens: Float[Array, "T D"], router, bias, k: int, real: Bool[Array, "T"] | None, key
) -> tuple[Int[Array, "T k"], Float[Array, "T k"], RouterSums]:
    """Where the tokens go, and their gates: `router` [D,E] chooses k experts, none (E) for those that are not real."""
    # In fp32 whatever the type of the computation: a rounded logit is another expert.
    logits = jnp.einsum("TD,DE->TE", tokens.astype(jnp.float32), router[...].astype(jnp.float32))
    bias = None if bias is None else bias[...]
    chosen, gates = choose_experts(logits, k, config.router, bias=bias, sample_topk=config.sample_topk, key=key)
    E = logits.shape[1]
    if real is not None:
        chosen = jnp.where(real[:, None], chosen, E)
    sums = router_sums(logits, chosen, real)
    if config.round_rows and key is not None:
        chosen = rounded(chosen, gates, E, config.round_rows)
    return chosen, gates, sums


class SparseExperts(nnx.Module):
    """sum over the k chosen experts of gate * act(x w_in[e]) w_out[e]; a padding token runs none and gives zero.

    w_in is [E,D,G,F] as in `FeedForward`. On a mesh with "expert" a device has the rows of all devices of that axis for
    its own experts: no row is dropped, whatever the balance.
    """

    def __init__(self, config: ModelConfig, key):
        self.config = c = config
        kr, ki, ko = jax.random.split(key, 3)
        self.router = normal(kr, (c.D, c.E), matrix_std(c), c)
        self.w_in = normal(ki, (c.E, c.D, gates(c), c.F), matrix_std(c), c)
        self.w_out = normal(ko, (c.E, c.F, c.D), output_std(c), c)
        self.router_bias = nnx.Param(jnp.zeros(c.E, c.param_dtype)) if c.bias_rate else None

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"] | None = None, key=None
    ) -> tuple[Float[Array, "B T D"], RouterSums]:
        c = self.config
        tokens = x.reshape(-1, c.D)
        real = None if real is None else real.reshape(-1)
        chosen, weights, sums = routed(c, tokens, self.router, self.router_bias, c.k, real, key)
        w_in, w_out = cast(self.w_in, c), cast(self.w_out, c)
        E, D, G, F = w_in.shape  # of this device
        tokens, weights = split((tokens, weights))
        tokens, chosen, weights = to_experts(tokens, chosen, weights, E)
        options = dict(activation=c.activation, implementation=c.implementation)
        # With balanced experts each device has its share of the rows; the others' slots are empty.
        run = cost.share(E / c.E, lambda *arrays: expert_mlp(*arrays, **options))
        y = run(tokens, w_in.reshape(E, D, G * F), w_out, route(chosen, E), weights)
        return from_experts(joined(y)).reshape(x.shape), sums
