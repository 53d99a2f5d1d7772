"""Routers choose the experts of every token, and compute the losses that balance or concentrate the load.

The gate of an expert is the weight of its output. The load of an expert is its share of the (token, choice) pairs. The
losses are computed from means over all tokens of the batch, on all devices, without padding.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from stickjax.config import ModelConfig
from stickjax.config.experts import ExpertsConfig
from stickjax.models.layers import matrix_std, normal
from stickjax.parallel.collectives import psum_over_batch

# {name of a loss in `RouterStats` and in the metrics: the field of `ExpertsConfig` with its weight}.
ROUTER_LOSSES = {
    "switch": "switch_weight", "z": "z_weight", "mutual_information": "mi_weight",
    "concentration": "concentration_weight",
}  # fmt: skip
NEVER = -1e9  # the logit of an expert that must not be chosen; finite, so that 0 * NEVER is 0 and not NaN


class RouterSums(NamedTuple):
    """Sums over the tokens of this device, without padding. `router_stats` computes the losses of a router from them.

    Every token has a weight (see `router_sums`), by default 1. g [E] is the softmax of a token's logits.

    `tokens`: the sum of the weights, by default the number of tokens.
    `pairs`: the number of (token, choice) pairs. It is `tokens` * k, or in a Universal Transformer the sum of `rows`.
    `rows` [E]: the number of (token, choice) pairs that chose each expert.
    `probability` [E]: the weighted sum of g.
    `z`: the weighted sum of logsumexp(logits)^2.
    `entropy`: the weighted sum of the entropy of g.
    """

    tokens: jax.Array
    pairs: jax.Array
    rows: jax.Array
    probability: jax.Array
    z: jax.Array
    entropy: jax.Array


class RouterStats(NamedTuple):
    """The losses of a router, and the loads of its experts. The docstring of `router_stats` has the formulas.

    A loss is an array [L] for the routers of L layers, or a scalar for a single router. It is not yet multiplied by its
    weight from the config. `load` [L,E] or [E] is the share of the (token, choice) pairs that chose each expert.
    """

    switch: jax.Array
    z: jax.Array
    mutual_information: jax.Array
    concentration: jax.Array
    load: jax.Array


def probabilities(logits: Float[Array, "T E"], trained: int | None = None) -> Float[Array, "T E"]:
    """Return the softmax of every token's logits. Added experts with logits of -inf change no bit of the other values.

    The first `trained` columns of `logits` are the experts of the trained model. The other columns are experts that
    were added to this model. If their logits are -inf, the probabilities of the trained experts are the same to the
    last bit as without the added experts. `trained` is None if no experts were added.

    `jax.nn.softmax` does not guarantee this. In XLA, the last bit of an exponential can depend on the shape of the loop
    that computes it, and the last bit of a sum can depend on the number of summands. So this function computes the
    exponentials of the trained columns and of the added columns separately, with an optimization barrier around each
    part. It adds them up in a pairwise tree, so that zeros at the end do not change the sum.

    >>> probabilities(jnp.array([[1.0, 1.0, -jnp.inf]]), trained=2).tolist()
    [[0.5, 0.5, 0.0]]
    """
    barrier = jax.lax.optimization_barrier
    parts = [part for part in jnp.split(logits, [trained or logits.shape[1]], axis=1) if part.size]
    parts, top = barrier((parts, jax.lax.stop_gradient(logits.max(axis=1, keepdims=True))))
    raised = jnp.concatenate(barrier([jnp.exp(part - top) for part in parts]), axis=1)
    total = raised
    while (E := total.shape[1]) > 1:
        half = 2 ** ((E - 1).bit_length() - 1)
        total = total[:, :half] + jnp.pad(total[:, half:], ((0, 0), (0, 2 * half - E)))
    return raised / total


def choose_experts(
    logits: Float[Array, "T E"],
    k: int,
    order: str,
    *,
    trained: int | None = None,
    bias=None,
    pruned=None,
    sample_topk: int = 0,
    key=None,
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """Choose k experts for every token. Return their indices and their gates.

    Args:
      logits: the router logits of every expert.
      k: the number of experts per token.
      order: "topk_softmax": choose the experts with the k largest logits; the gates are the softmax of these k logits
        and sum to one. "softmax_topk": choose the experts with the k largest `probabilities`; the gates are these
        probabilities, and sum to at most one.
      trained: the number of columns of `logits` before experts were added to the model (see `probabilities`); None: no
        experts were added.
      bias: [E], added to the logits or probabilities for the choice only; the gates do not contain it.
      pruned: [E], True for experts that are never chosen.
      sample_topk, key: with a random key, only k - `sample_topk` experts are chosen as above. The other `sample_topk`
        experts are drawn at random without replacement, with the probabilities softmax(logits) (Gumbel top-k). `order`
        says how the gates of all k experts are computed.
    """
    logits = logits.astype(jnp.float32)
    scores = logits if order == "topk_softmax" else probabilities(logits, trained)
    wanted = scores if bias is None else scores + bias.astype(jnp.float32)[None]
    wanted = wanted if pruned is None else jnp.where(pruned[None], NEVER, wanted)
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(wanted), k)
    if sample_topk and key is not None:
        best = chosen[:, : k - sample_topk]
        taken = jax.nn.one_hot(best, logits.shape[1], dtype=bool).any(1)
        taken = taken if pruned is None else taken | pruned[None]
        noisy = jax.nn.log_softmax(logits, axis=-1) + jax.random.gumbel(key, logits.shape)
        _, drawn = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(taken, -jnp.inf, noisy)), sample_topk)
        chosen = jnp.concatenate([best, drawn], 1)
    gates = jnp.take_along_axis(scores, chosen, axis=1)
    return chosen, jax.nn.softmax(gates, axis=-1) if order == "topk_softmax" else gates


def round_tokens(
    expert_indices: Int[Array, "T k"], gates: Float[Array, "T k"], num_experts: int, multiple: int
) -> Int[Array, "T k"]:
    """Drop (token, choice) pairs, so that every expert has a multiple of `multiple` pairs (token rounding).

    If `multiple` is the number of rows of a kernel tile, no tile is partly empty.

    Each expert drops its pairs with the smallest gates, at most `multiple` - 1 of them. Return `expert_indices` with
    the index E = `num_experts` in place of every dropped pair. The index E means no expert. The method is from arXiv
    2512.14080. The paper also rounds up; this function only rounds down. Whether a pair is dropped depends on all
    tokens of the device, so this function is for training only.

    >>> round_tokens(jnp.array([[0], [0], [1], [0]]), jnp.array([[0.3], [0.1], [0.9], [0.2]]), 2, 2).T
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
    logits: Float[Array, "T E"],
    expert_indices: Int[Array, "T k"],
    weight: Float[Array, "T"] | Bool[Array, "T"] | None = None,
) -> RouterSums:
    """Compute the `RouterSums` of one router over its tokens.

    `expert_indices` are the chosen experts; the index E means no expert. `weight` is the weight of each token in the
    sums; None: all are 1. The field `rows` of the result, the number of (token, choice) pairs of each expert, ignores
    the weights. To leave a token out of `rows`, set its indices to E. The logit of an expert that must not be chosen
    may be -inf. It is replaced by the finite number `NEVER`, so that no sum is NaN.
    """
    logits = jnp.maximum(logits.astype(jnp.float32), NEVER)
    weight = jnp.ones(logits.shape[:1]) if weight is None else weight.astype(jnp.float32)
    log_g = jax.nn.log_softmax(logits, axis=-1)
    g, tokens = jnp.exp(log_g), weight.sum()
    # The index of a padding token is E; bincount drops it.
    rows = jnp.bincount(expert_indices.reshape(-1), length=logits.shape[1]).astype(jnp.float32)
    z = (weight * jnp.square(jax.nn.logsumexp(logits, axis=-1))).sum()
    entropy = -(weight * (g * log_g).sum(-1)).sum()
    return RouterSums(tokens, tokens * expert_indices.shape[1], rows, (weight[:, None] * g).sum(0), z, entropy)


def router_stats(sums: RouterSums) -> RouterStats:
    """Compute the losses of one router, or of the routers of L layers, and the loads of their experts.

    `sums` are the sums over the tokens of this device. This function first adds the sums of all devices.

    All means are over tokens, with the weights of the tokens. g is the softmax of a token's logits, P is the mean of g,
    and e is an expert. f_e is the load of e: its share of the (token, choice) pairs.

    switch = E * sum_e f_e P_e (arXiv 2101.03961). It is 1 if all loads are equal. The corresponding loss in Hugging
      Face transformers is k times as large, because its f_e is the number of pairs of e per token.
    z = mean(logsumexp(logits)^2) (arXiv 2202.08906).
    mutual_information = H(e|x) - H(e): the mean entropy of g minus the entropy of P (arXiv 2306.04640). It is minus
      the mutual information of the token x and the expert e.
    concentration = H(e), the entropy of P: a smaller value means that fewer experts are used. arXiv 2306.04640
      describes this loss without a formula or code; the formula is our reading of the description.
    """
    sums = psum_over_batch(sums)
    tokens, pairs = jnp.maximum(sums.tokens, 1), jnp.maximum(sums.pairs, 1)
    load, P = sums.rows / pairs[..., None], sums.probability / tokens[..., None]
    marginal = -(P * jnp.log(P + 1e-8)).sum(-1)
    switch = sums.rows.shape[-1] * (load * P).sum(-1)
    return RouterStats(switch, sums.z / tokens, sums.entropy / tokens - marginal, marginal, load)


def updated_router_bias(
    bias: Float[Array, "*L E"], load: Float[Array, "*L E"], rate: float, experts: int | Int[Array, "*L 1"]
) -> Float[Array, "*L E"]:
    """Return the selection bias of each expert e for the next step: bias_e + rate * sign(mean load - load_e).

    This is the auxiliary-loss-free balancing of arXiv 2408.15664. `load` is the share of the (token, choice) pairs that
    chose each expert. The mean is over the experts that exist, and `experts` is their number. After pruning, `experts`
    is smaller than E, the number of router columns.
    """
    return (bias + rate * jnp.sign(load.sum(-1, keepdims=True) / experts - load)).astype(bias.dtype)


@dataclasses.dataclass(frozen=True)
class Experts:
    """The numbers of `old`, `new` and `pruned` experts of a router.

    Old experts belong to the trained model. New experts were added to it. Pruned experts were removed, but the router
    still computes their logits. The first columns of the logits are the old and the pruned experts, in the order that
    they have in the trained model. The last columns are the new experts. The arrays with the weights of the experts
    contain first the old experts and then the new experts, but not the pruned ones.
    """

    old: int
    new: int = 0
    pruned: int = 0

    @property
    def count(self) -> int:
        """The number of experts that exist, without the pruned ones."""
        return self.old + self.new

    @property
    def columns(self) -> int:
        return self.old + self.pruned + self.new


class Router(nnx.Module):
    """A router: it computes a logit for every expert from a token x [D], always in fp32, and chooses k experts.

    The config field `network` says how the logits are computed from the matrices `hidden` and `weight`:

      "linear": x @ weight
      "mlp": gelu(x @ hidden + hidden_bias) @ weight
      "gmm": for every expert e, exp(log_scale) * cos(x @ hidden, weight[:, e])

    cos(a, b) is the cosine similarity of two vectors, and weight[:, e] is the centroid of expert e. For experts that
    were added to a trained model, `new_weight` has further columns of `weight`.

    `selection_bias` balances the load without a loss: it changes which experts are chosen, but not their gates. In a
    pruned model, column c of the logits belongs to the expert with the index `slot[c]` in the arrays with the weights
    of the experts. `slot[c]` is -1 if this expert was pruned. With `pruning="old_denominator"`, pruned experts still
    count in the denominator of the softmax. With "new_denominator", they do not count.
    """

    normalized = False  # whether the gates of a token are divided by their sum

    def __init__(self, config: ModelConfig, mixture: ExpertsConfig, k: int, key):
        self.config, self.k = config, k
        self.experts = experts = Experts(mixture.E, mixture.added, mixture.pruned)
        self.order, self.sample_topk, self.token_rounding = mixture.order, mixture.sample_topk, mixture.token_rounding
        self.denominator = "new" if mixture.pruning == "new_denominator" else "old"
        c, old, new, network = config, experts.old + experts.pruned, experts.new, mixture.network
        rows = c.D if network == "linear" else mixture.hidden
        std = 1.0 if network == "gmm" else matrix_std(c)  # only the direction of a centroid counts
        zeros = lambda size, dtype=c.param_dtype: nnx.Param(jnp.zeros(size, dtype))  # noqa: E731
        k_hidden, k_new = (jax.random.fold_in(key, i) for i in (1, 2))
        self.hidden = None if network == "linear" else normal(k_hidden, (c.D, rows), matrix_std(c), c)
        self.hidden_bias = zeros(rows) if network == "mlp" else None
        self.log_scale = zeros(1) if network == "gmm" else None
        self.weight = normal(key, (rows, old), std, c)
        self.new_weight = normal(k_new, (rows, new), std, c) if new else None
        # In float32: in a smaller type, the small step `bias_rate` would be lost when it is added to a large bias.
        self.selection_bias = zeros(old + new, jnp.float32) if mixture.bias_rate else None
        # Indices as floats, because all parameters are floats; float32 represents every index exactly.
        self.slot = nnx.Param(jnp.arange(old + new, dtype=jnp.float32)) if mixture.pruning != "no" else None

    def logits(self, tokens: Float[Array, "T D"], key=None) -> tuple[Float[Array, "T E"], Any]:
        """Return (the logits of all router columns, a random key for the sampling of experts).

        `Experts` says which experts the columns belong to. This class returns `key` unchanged. A subclass that needs
        random numbers itself, such as for dropout, returns a new key.
        """
        exact = lambda param: param[...].astype(jnp.float32)  # noqa: E731
        x = tokens.astype(jnp.float32)
        if self.hidden is not None:
            x = jnp.einsum("TD,DR->TR", x, exact(self.hidden))
        if self.hidden_bias is not None:
            x = jax.nn.gelu(x + exact(self.hidden_bias)[None], approximate=False)
        if self.log_scale is not None:
            x = _unit(x, 1) * jnp.exp(exact(self.log_scale))[None]
        # Separate products for old and new experts, so that new experts change no bit of the old logits.
        weights = [exact(w) for w in (self.weight, self.new_weight) if w is not None]
        if self.log_scale is not None:
            weights = [_unit(w, 0) for w in weights]
        return jnp.concatenate([jnp.einsum("TR,RE->TE", x, w) for w in weights], axis=1), key

    def __call__(
        self, tokens: Float[Array, "T D"], token_weight: Float[Array, "T"] | Bool[Array, "T"] | None = None, key=None
    ) -> tuple[Int[Array, "T k"], Float[Array, "T k"], RouterSums]:
        """Choose k experts for every token. Return their indices, their gates, and the `RouterSums` for the losses.

        `token_weight`: the weight of each token in the losses; a token mask is also accepted. A token of weight 0 uses
        no expert: its indices equal the number of experts, which means no expert. With a random `key`, the router works
        as in training: it applies `sample_topk` and `token_rounding` of the config.
        """
        (logits, key), slot = self.logits(tokens, key), self.slot
        bias = None if self.selection_bias is None else self.selection_bias[...].astype(jnp.float32)
        pruned = None if slot is None else slot[...] < 0
        if self.denominator == "new":
            logits = jnp.where(pruned[None], NEVER, logits)
        options = dict(trained=self.weight.shape[1], bias=bias, pruned=pruned, sample_topk=self.sample_topk, key=key)
        columns, gates = choose_experts(logits, self.k, self.order, **options)
        if self.normalized:
            gates = gates / (gates.sum(-1, keepdims=True) + 1e-6)
        chosen = columns if slot is None else slot[...].astype(jnp.int32)[columns]
        if token_weight is not None:
            runs = token_weight.astype(jnp.float32)[:, None] > 0
            columns, chosen = (
                jnp.where(runs, *which) for which in ((columns, self.experts.columns), (chosen, self.experts.count))
            )
        sums = router_sums(logits, columns, token_weight)
        if self.token_rounding and key is not None:
            chosen = round_tokens(chosen, gates, self.experts.count, self.token_rounding)
        return chosen, gates, sums


def _unit(x, axis):
    """Divide the vectors of x along `axis` by their norms. If a norm is at most 1e-12, result and gradient are 0."""
    square = jnp.square(x).sum(axis, keepdims=True)
    return x * jnp.where(square > 1e-24, jax.lax.rsqrt(jnp.maximum(square, 1e-24)), 0)
