"""Test the mixture of attention heads, against a loop over its experts and against the original layer."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FORWARD, GRADIENT, assert_close
from flax import nnx

from pallas_kernels import route, stick_breaking_attention
from stickjax.config import Config, ExpertsConfig, ModelConfig
from stickjax.config.universal import SutConfig
from stickjax.models.attention import Context
from stickjax.models.decoder import Decoder
from stickjax.models.moa import MixtureOfHeads, SharedHeads
from stickjax.models.router import choose_experts, router_stats, router_sums
from stickjax.models.transformer import init
from stickjax.training.step import init_state, make_step

SIZES = dict(V=31, D=16, L=2, H=4, F=24)
SHARED = dict(D=16, K=2, H=4, attention_experts=ExpertsConfig(3, 2), implementation="reference")
HERE = Path(__file__).parent


def every_expert(layer, x):
    """Return the output of the layer for x [B, T, D], computed from the definition of the layer.

    Every expert computes all tokens. The gate of an expert is zero at a token that did not choose the expert.
    """
    c, (B, T, _) = layer.config, x.shape
    chosen, gates = choose_experts(
        (x @ layer.router.weight[...]).reshape(B * T, -1), c.N // c.K, c.attention_experts.order
    )
    E = c.attention_experts.E
    gate = (jax.nn.one_hot(chosen, E) * gates[..., None]).sum(1).reshape(B, T, E)
    key, value = (jnp.einsum("BTD,DKH->BTKH", x, w[...]) for w in (layer.key, layer.value))
    out = jnp.zeros_like(x)
    for e in range(E):
        query = (x @ layer.expert_query[...][e]).reshape(B, T, c.K, c.H)
        heads, rem = stick_breaking_attention(query, key, value, implementation="reference")
        if c.remainder == "value":
            heads += rem[..., None] * value
        out += gate[..., e, None] * (heads.reshape(B, T, -1) @ layer.expert_output[...][e])
    return out


@pytest.mark.parametrize(
    "changes",
    [
        dict(N=6, K=2, attention_experts=ExpertsConfig(5)),
        dict(N=2, K=1, attention_experts=ExpertsConfig(2), remainder="value"),
        dict(N=3, K=3, attention_experts=ExpertsConfig(4, order="softmax_topk")),
    ],
    ids=["two-heads", "all-chosen", "one-chosen"],
)
def test_outputs_and_gradients_are_those_of_a_loop_over_experts(changes):
    layer = jax.jit(lambda: MixtureOfHeads(ModelConfig(**SIZES | changes), jax.random.key(0)))()
    x, cotangent = jax.random.normal(jax.random.key(1), (2, 2, 9, 16))

    @partial(jax.jit, static_argnums=0)
    def output_and_gradients(f, layer, x):
        y, vjp = jax.vjp(f, layer, x)
        return y, vjp(cotangent)

    (y, gradients), (expected, wanted) = (
        output_and_gradients(f, layer, x)
        for f in (lambda layer, x: layer(x, Context(None, None, None, 0))[0], every_expert)
    )
    assert_close(y, expected, FORWARD["float32"])
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, 3 * GRADIENT["float32"])


def test_padding_runs_no_expert():
    config = ModelConfig(**SIZES, N=4, K=2, attention_experts=ExpertsConfig(E=3), implementation="reference")
    layer = jax.jit(lambda: MixtureOfHeads(config, jax.random.key(0)))()
    x = jax.random.normal(jax.random.key(1), (1, 8, 16))
    segments = jnp.array([[-1, -1, 0, 0, 0, 0, 0, -1]])
    real = segments >= 0
    y, _, sums = jax.jit(lambda layer: layer(x, Context(segments, segments, None, 0), None, real))(layer)
    assert (y[0, [0, 1, 7]] == 0).all() and (jnp.abs(y[0, 3:7]).max(-1) > 0).all()
    alone, _, alone_sums = jax.jit(lambda layer: layer(x[:, 2:7], Context(None, None, None, 0)))(layer)
    assert_close(y[:, 2:7], alone, FORWARD["float32"])
    np.testing.assert_allclose(router_stats(sums).load, router_stats(alone_sums).load, rtol=1e-6)


def test_the_shared_heads_are_those_of_the_original_layer():
    """The mixture of heads gives the outputs and router losses of the original code.

    The layer has softmax self-attention, one head per expert, and padded keys.
    """
    with np.load(HERE / "oracles" / "moa" / "attention.npz", allow_pickle=False) as arrays:
        x, out = (jnp.asarray(arrays[name].swapaxes(0, 1)) for name in ("x", "out"))  # [B,T,D]
        pad, aux = jnp.asarray(arrays["pad"]), arrays["aux"]
        p = {name.removeprefix("param/"): arrays[name] for name in arrays.files if name.startswith("param/")}
    config = SutConfig(D=32, K=1, H=8, attention_experts=ExpertsConfig(6, 2))
    layer = jax.jit(lambda: SharedHeads(config, jax.random.key(0), causal=False, relative=False))()
    weights = {
        f"expert_{name}": p[f"q_proj.{w}"] for name, w in dict(query="experts.w", output="output_experts.w").items()
    }
    weights |= {name: p[f"{name[0]}_proj.weight"].T[:, None] for name in ("key", "value")}
    for name, value in weights.items():
        assert getattr(layer, name).shape == value.shape
        setattr(layer, name, nnx.Param(jnp.asarray(value)))
    logits, real = x.reshape(-1, 32) @ p["q_proj.w_gate"], ~pad.reshape(-1)
    chosen, gates = choose_experts(logits, 2, "softmax_topk")
    chosen = jnp.where(real[:, None], chosen, 6)
    segments = jnp.where(pad, -1, 0)
    y = jax.jit(lambda layer: layer(x, route(chosen, 6), gates, x, Context(segments, segments, None, 0)))(layer)
    assert_close(y, out, FORWARD["float32"])
    stats = router_stats(router_sums(logits, chosen, real))
    everywhere = jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean()  # the original's z loss counts padding as well
    np.testing.assert_allclose(0.01 * stats.switch + 0.001 * everywhere, aux[0], rtol=1e-5)


@pytest.mark.parametrize("kind", ["cross", "relative", "causal"])
def test_shared_heads_are_softmax_attention_of_every_expert(kind):
    """The layer equals the sum of the gated softmax attention of its experts, computed with explicit arrays.

    `kind` says whether the keys come from another sequence, positions are relative, or the mask is causal. Padded keys
    have no effect. With relative positions, all distances of 2 or more in one direction share one position vector.
    """
    B, T, S, config = 2, 7, 5 if kind == "cross" else 7, SutConfig(**SHARED, clip=3)
    layer = SharedHeads(config, jax.random.key(0), causal=kind == "causal", relative=kind == "relative")
    x = jax.random.normal(jax.random.key(1), (B, T, 16))
    source = jax.random.normal(jax.random.key(2), (B, S, 16)) if kind == "cross" else x
    key_segments = jnp.where(jnp.arange(S)[None] < jnp.array([[S], [S - 2]]), 0, -1)
    chosen = jnp.array([[0, 1], [2, 1], [0, 2], [3, 3], [1, 0], [2, 0], [1, 2]] * B)
    gates = jax.random.uniform(jax.random.key(3), (B * T, 2))
    scores_of = jnp.zeros((2, 4, T, S))
    if kind == "relative":
        layer.relative = nnx.Param(jax.random.normal(jax.random.key(4), (2, 4, 5)))
        distance = np.arange(S)[None] - np.arange(T)[:, None]
        scores_of = layer.relative[...][:, :, np.clip(distance, -2, 2) + 2]
    seen = jnp.broadcast_to((key_segments >= 0)[:, None], (B, T, S))
    if kind == "causal":
        seen &= jnp.tri(T, dtype=bool)[None]
    key, value = (jnp.einsum("BSD,DKH->BSKH", source, w[...]) for w in (layer.key, layer.value))
    expected = jnp.zeros_like(x)
    for e in range(3):
        query = (x @ layer.expert_query[...][e]).reshape(B, T, 2, 4) / 2
        scores = jnp.einsum("BTKH,BSKH->BKTS", query, key) + jnp.einsum("BTKH,KHTS->BKTS", query, scores_of)
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        heads = jnp.einsum("BKTS,BSKH->BTKH", weights, value).reshape(B, T, 8)
        gate = (gates * (chosen == e)).sum(-1).reshape(B, T, 1)
        expected += gate * (heads @ layer.expert_output[...][e])
    context = Context(jnp.zeros((B, T), int), key_segments, None, 0)
    y = jax.jit(lambda layer: layer(x, route(chosen, 3), gates, source, context))(layer)
    assert_close(y, expected, FORWARD["float32"])
    assert (y[:, 3] == 0).all()


def test_training_balances_both_routers():
    """A training step balances two routers: the router of the experts and the router of the attention heads.

    The step reports the statistics of both routers, trains their weights, and moves their selection biases.
    """
    model = ModelConfig(
        **SIZES,
        N=4,
        K=2,
        implementation="reference",
        experts=ExpertsConfig(E=4, k=2, bias_rate=0.01, switch_weight=0.1),
        attention_experts=ExpertsConfig(E=4, bias_rate=0.01, switch_weight=0.1),
    )
    config = Config(model=model).replace({"data.T": 8, "data.B": 2, "train.steps": 2, "train.accumulate": 2})
    state = jax.jit(partial(init_state, config))(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 31)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": jnp.ones((2, 8), bool)}
    before = jax.tree.map(jnp.copy, state.params)
    state, metrics = jax.jit(make_step(config))(state, batch | {"segment_ids": jnp.zeros((2, 8), jnp.int32)})
    for name in ("switch", "z", "mutual_information", "load_max"):
        assert np.isfinite(metrics[name]) and np.isfinite(metrics[f"attention_{name}"]), name
    for layer in ("ffn", "attention"):
        old, new = (getattr(params.blocks, layer) for params in (before, state.params))
        np.testing.assert_allclose(np.abs(new.router.selection_bias[...]).max(), 0.01, rtol=1e-6)
        assert (new.router.weight[...] != old.router.weight[...]).any()


def test_active_parameters_are_those_of_the_chosen_experts():
    config = ModelConfig(**SIZES, N=6, K=2, attention_experts=ExpertsConfig(E=5))
    total, active = Decoder().parameter_counts(config)
    assert total == sum(leaf.size for leaf in jax.tree.leaves(init(config, jax.random.key(0))))
    idle = 2 * 2 * (5 - 3) * 16 * 8  # layers, query and output, experts not chosen, D, K * H
    assert active == total - 31 * 16 - idle
    dense, _ = Decoder().parameter_counts(dataclasses.replace(config, attention_experts=ExpertsConfig()))
    assert total - dense == 2 * (2 * (5 - 3) * 16 * 8 + 16 * 5)  # two more experts (five, three chosen), and routers


def test_experts_may_be_sampled_for_the_heads_alone():
    assert ModelConfig(**SIZES, N=4, K=1, attention_experts=ExpertsConfig(E=8, sample_topk=1)).experts.E == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(N=4, K=2, attention_experts=ExpertsConfig(1)), "attention_experts: k=2 .* cannot exceed E=1"),
        (dict(N=4, K=2, attention_experts=ExpertsConfig(3), key_value="input"), "key_value='input' needs K=1 and H=D="),
        (
            dict(D=16, N=2, K=1, H=16, attention_experts=ExpertsConfig(3), key_value="input", attention="softmax"),
            "key_value='input' needs attention='stick_breaking'",
        ),
        (dict(N=2, K=2, attention_experts=ExpertsConfig(4)), "order='topk_softmax' has a constant gate"),
        (
            dict(N=4, K=2, attention_experts=ExpertsConfig(4), head_norm=True),
            "head_norm=True needs attention_experts.E=0: attention experts need head_norm=False",
        ),
        (dict(N=4, K=2, attention_experts=ExpertsConfig(4, sample_topk=3)), "sample_topk=3 cannot exceed k=2"),
        (dict(N=4, K=2, attention_experts=ExpertsConfig(4, k=3)), "attention_experts.k=3 must be 2; it is N / K"),
    ],
)
def test_configs_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SIZES | changes)
