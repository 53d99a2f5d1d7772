"""Test the decoder model: causality, packed documents, experts, multipliers, presets and caches.

A dense einsum over all experts gives the expected output of the experts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FORWARD, GRADIENT, assert_close
from flax import nnx

from stickjax.config import ExpertsConfig, ModelConfig
from stickjax.config.decoder import MODULE_ROUTER, MODULES
from stickjax.models.decoder import Decoder
from stickjax.models.layers import rotary
from stickjax.models.moe import SparseExperts
from stickjax.models.router import choose_experts, round_tokens, router_stats, router_sums, updated_router_bias
from stickjax.models.transformer import apply, empty_cache, init
from stickjax.storage.checkpoints import named_leaves
from stickjax.storage.hugging_face.configs import _effective, to_config_json, to_model_config

SMALL = dict(V=31, D=24, L=2, N=4, K=2, H=8, F=20, norm_eps=1e-5)
MODELS = {
    "dense": ModelConfig(**SMALL),
    "experts": ModelConfig(**SMALL, experts=ExpertsConfig(E=4, k=2)),
    "softmax": ModelConfig(**SMALL, attention="softmax", tied=False),
    "heads": ModelConfig(
        **SMALL | dict(N=4, K=2), experts=ExpertsConfig(E=4, k=2), attention_experts=ExpertsConfig(E=5)
    ),
    "value": ModelConfig(**SMALL, remainder="value", window=5),
    "modules": ModelConfig(
        **SMALL | MODULES | dict(N=2, K=1, H=24),
        experts=ExpertsConfig(E=4, k=2, hidden=8, **MODULE_ROUTER),
        attention_experts=ExpertsConfig(E=3, hidden=8, **MODULE_ROUTER),
        key_value="input",
    ),
    "bias": ModelConfig(**SMALL, remainder="bias", head_norm=True, attend_current=True, activation="gelu"),
}
each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())


def is_part_of_another(config) -> bool:
    """Return True for the models whose parts are all in other models, most of them in "modules"."""
    return any(config is MODELS[name] for name in ("dense", "experts", "heads"))


EXHAUSTIVE = dict.fromkeys(
    [
        "test_no_position_sees_a_later_one_or_another_row",
        "test_packed_documents_do_not_see_each_other",
        "test_padding_changes_nothing",
        "test_gradients_are_finite_and_reach_every_parameter",
    ],
    is_part_of_another,
) | {"test_the_cache_gives_the_full_pass": lambda config: config is MODELS["dense"] or config is MODELS["experts"]}

# To compile one program takes less time than to compile every operation of an eager call. The tests of a model use the
# same shapes, so they share its compiled programs.
call = jax.jit(lambda model, *arrays, **named: model(*arrays, **named))
first_model = functools.cache(lambda config: jax.jit(lambda: init(config, jax.random.key(0)))())


def tokens_of(config, B=2, T=13, seed=1):
    return jax.random.randint(jax.random.key(seed), (B, T), 0, config.vocabulary)


@functools.cache
def influence_of(config):
    """Return a function from `segment_ids` [B, T] to an array [B, T, B, T].

    The array says how much the output at each position depends on the embedding at each position. Its first two axes
    are the batch entry and the position of the output. The last two axes are the batch entry and the position of the
    embedding. A zero means that the output does not depend on the embedding.
    """
    config = dataclasses.replace(config, tied=False)
    model, tokens = first_model(config), tokens_of(config)
    # Every position gets a different token, so that each embedding belongs to one position.
    own = jnp.arange(tokens.size).reshape(tokens.shape)

    def outputs(extra, segment_ids):
        changed = jax.tree.map(lambda x: x, model)
        changed.embed = type(changed.embed)(changed.embed[...][tokens.reshape(-1)] + extra.reshape(-1, config.D))
        return jnp.square(changed(own, segment_ids).logits).sum(-1)

    jacobian = jax.jit(jax.jacrev(outputs))
    zero = jnp.zeros((*tokens.shape, config.D))
    return lambda segment_ids: np.abs(np.asarray(jacobian(zero, segment_ids))).sum(-1)


@each_model
def test_no_position_sees_a_later_one_or_another_row(config):
    seen = influence_of(config)(jnp.zeros((2, 13), int))
    T = seen.shape[1]
    for b in range(2):
        assert (seen[b, :, 1 - b] == 0).all()
        assert (seen[b, :, b][np.triu_indices(T, 1)] == 0).all()
        assert (seen[b, :, b][np.arange(T), np.arange(T)] > 0).all()
    assert (seen[0, 1:, 0][np.arange(T - 1), np.arange(T - 1)] > 0).all(), "the previous token must matter"


@each_model
def test_packed_documents_do_not_see_each_other(config):
    segments = jnp.array([[0] * 5 + [1] * 8, [0] * 9 + [3] * 4])
    seen = influence_of(config)(segments)
    for b in range(2):
        other = np.asarray(segments[b])[:, None] != np.asarray(segments[b])[None]
        assert (seen[b, :, b][other] == 0).all()
    # The logits of a document do not change if it is alone.
    model, tokens = first_model(config), tokens_of(config)
    packed = call(model, tokens, segments).logits
    alone = call(model, tokens[:1, 5:]).logits
    assert_close(packed[:1, 5:], alone, FORWARD["float32"])


@each_model
def test_padding_changes_nothing(config):
    model, tokens = first_model(config), tokens_of(config).at[:, :5].set(7)
    segments = jnp.zeros_like(tokens).at[:, :5].set(-1)
    alone = call(model, tokens[:1, 5:]).logits
    assert_close(call(model, tokens, segments).logits[:1, 5:], alone, FORWARD["float32"])


@each_model
def test_the_cache_gives_the_full_pass(config):
    model, tokens = first_model(config), tokens_of(config)
    segments = jnp.zeros_like(tokens).at[1, :4].set(-1)
    full = call(model, tokens, segments).logits
    cache, parts = empty_cache(config, 2, 20), []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 13)):
        out = call(model, tokens[:, start:stop], segments[:, start:stop], cache=cache)
        cache, parts = out.cache, [*parts, out.logits]
    real = (segments >= 0)[..., None]
    assert_close(jnp.where(real, jnp.concatenate(parts, 1), 0), jnp.where(real, full, 0), FORWARD["float32"])
    # The cache has the keys of all layers, and the values unless they equal the keys.
    assert sum(a.ndim == 5 for a in jax.tree.leaves(cache)) == (1 if config.key_value == "input" else 2)


@pytest.mark.parametrize("router", ["topk_softmax", "softmax_topk"])
def test_all_experts_equal_a_dense_einsum(router):
    config = ModelConfig(**SMALL, experts=ExpertsConfig(E=3, k=3, order=router))
    layer = jax.jit(lambda: SparseExperts(config, jax.random.key(0)))()
    x = jax.random.normal(jax.random.key(1), (2, 7, config.D))
    cotangent = jax.random.normal(jax.random.key(2), x.shape)

    def sparse(layer, x):
        return layer(x)[0]

    def dense(layer, x):
        gates = jax.nn.softmax(x @ layer.router.weight[...], axis=-1)
        gate, up = (jnp.einsum("BTD,EDF->BTEF", x, layer.w_in[:, :, g]) for g in range(2))
        return jnp.einsum("BTE,BTEF,EFD->BTD", gates, jax.nn.silu(gate) * up, layer.w_out[...])

    @functools.partial(jax.jit, static_argnums=0)
    def output_and_gradients(f, layer, x):
        y, vjp = jax.vjp(f, layer, x)
        return y, vjp(cotangent)

    (y, gradients), (expected, wanted) = (output_and_gradients(f, layer, x) for f in (sparse, dense))
    assert_close(y, expected, FORWARD["float32"])
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, GRADIENT["float32"])


def test_router_orders():
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))
    chosen, gates = choose_experts(logits, 2, "topk_softmax")
    assert chosen.tolist() == [[3, 2]]
    np.testing.assert_allclose(gates, [[4 / 7, 3 / 7]], rtol=1e-6)
    _, gates = choose_experts(logits, 2, "softmax_topk")
    np.testing.assert_allclose(gates, [[0.4, 0.3]], rtol=1e-6)
    chosen, gates = choose_experts(logits, 2, "softmax_topk", bias=jnp.array([1.0, 0, 0, 0]))
    assert chosen.tolist() == [[0, 3]]
    np.testing.assert_allclose(gates, [[0.1, 0.4]], rtol=1e-6)  # the bias affects the choice, not the gates


def test_sampled_experts_follow_the_probabilities():
    p = jnp.array([0.5, 0.25, 0.15, 0.1])
    chosen, gates = choose_experts(
        jnp.tile(jnp.log(p), (20_000, 1)), 2, "softmax_topk", sample_topk=1, key=jax.random.key(0)
    )
    assert (chosen[:, 0] == 0).all() and (chosen[:, 1] != 0).all()
    share = np.bincount(chosen[:, 1], minlength=4) / 20_000
    np.testing.assert_allclose(share, [0, 0.5, 0.3, 0.2], atol=0.015)
    np.testing.assert_allclose(gates, p[chosen], rtol=1e-6)


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_rounding_drops_the_smallest_gates_of_every_expert(multiple):
    rng = np.random.default_rng(0)
    chosen, gates = rng.permuted(np.tile(np.arange(7), (50, 1)), axis=1)[:, :3], rng.random((50, 3))
    chosen[:9] = 6  # E = 6, so 6 means padding
    kept = np.asarray(round_tokens(jnp.asarray(chosen), jnp.asarray(gates, jnp.float32), 6, multiple))
    assert (kept[kept != chosen] == 6).all()
    for e in range(6):
        before, after = gates[chosen == e], gates[kept == e]
        assert len(after) == len(before) // multiple * multiple
        np.testing.assert_array_equal(np.sort(after), np.sort(before)[len(before) - len(after) :])


def test_rounding_is_for_training_alone():
    config = ModelConfig(**SMALL, experts=ExpertsConfig(E=4, k=2, token_rounding=8))
    model, tokens = first_model(config), tokens_of(config)
    plain = first_model(MODELS["experts"])
    np.testing.assert_array_equal(call(model, tokens).logits, call(plain, tokens).logits)
    trained, whole = (call(m, tokens, key=jax.random.key(1)) for m in (model, plain))
    assert (trained.logits != whole.logits).any()
    # The load counts the choices of the router before token rounding.
    np.testing.assert_array_equal(trained.router.load[0], whole.router.load[0])
    with pytest.raises(ValueError, match="token_rounding=8 needs E >= 1 experts"):
        ModelConfig(**SMALL, experts=ExpertsConfig(token_rounding=8))


def test_router_losses():
    rng = np.random.default_rng(0)
    logits, chosen = rng.normal(size=(50, 4)), rng.integers(0, 4, (50, 2))
    real = rng.random(50) < 0.7
    sums = router_sums(jnp.array(logits, jnp.float32), jnp.array(np.where(real[:, None], chosen, 4)), jnp.array(real))
    stats = router_stats(sums)
    x, c = logits[real], chosen[real]
    g = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    f, P = np.bincount(c.reshape(-1), minlength=4) / c.size, g.mean(0)
    np.testing.assert_allclose(stats.load, f, rtol=1e-6)
    np.testing.assert_allclose(stats.switch, 4 * (f * P).sum(), rtol=1e-5)
    np.testing.assert_allclose(stats.z, (np.log(np.exp(x).sum(1)) ** 2).mean(), rtol=1e-5)
    mutual = -(g * np.log(g)).sum(1).mean() + (P * np.log(P)).sum()
    np.testing.assert_allclose(stats.mutual_information, mutual, rtol=1e-4)
    assert float(stats.mutual_information) < 0, "H(e|x) - H(e) is minus the mutual information"


def test_balance_gives_switch_loss_one():
    logits = jnp.tile(jnp.eye(4) * 3, (5, 1))
    stats = router_stats(router_sums(logits, jnp.argsort(-logits, axis=1)[:, :1]))
    np.testing.assert_allclose(stats.switch, 1, rtol=1e-6)


def test_router_bias_moves_against_the_load():
    bias = updated_router_bias(jnp.zeros((2, 4)), jnp.array([[0.7, 0.1, 0.1, 0.1], [0.25] * 4]), 0.01, 4)
    np.testing.assert_allclose(bias, [[-0.01, 0.01, 0.01, 0.01], [0] * 4], atol=1e-8)
    # Two of the four experts were pruned, so the mean is taken over the other two.
    pruned = updated_router_bias(jnp.zeros((1, 4)), jnp.array([[0.6, 0.4, 0, 0]]), 0.01, jnp.array([[2]]))
    np.testing.assert_allclose(pruned[0, :2], [-0.01, 0.01], atol=1e-8)


PRESETS = {
    "powerlm_1b": (1.208e9, 40),
    "powermoe_1b": (1.335e9, 24),
    "powerlm_3b": (3.511e9, 40),
    "powermoe_3b": (3.299e9, 32),
    "stickbreaking_3b": (3.629e9, 40),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name):
    total, layers = PRESETS[name]
    config = getattr(ModelConfig, name)()
    assert config.L == layers
    assert abs(Decoder().parameter_counts(config)[0] / total - 1) < 5e-4


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("molm_350m_4b", 4_142_526_464, 366_482_432),
        ("molm_700m_4b", 4_142_526_464, 668_472_320),
        ("molm_700m_8b", 8_182_046_720, 681_460_736),
    ],
)
def test_molm_has_exactly_the_published_parameters(name, total, active):
    config = getattr(ModelConfig, name)()
    assert Decoder().parameter_counts(config) == (total, active)
    assert _effective(to_model_config(to_config_json(config, 512))[0]) == _effective(config)


def test_stickbreaking_3b_tied_and_active_counts():
    assert abs(Decoder().parameter_counts(ModelConfig.stickbreaking_3b(tied=True))[0] / 3.513e9 - 1) < 5e-4
    assert abs(Decoder().parameter_counts(ModelConfig.powermoe_1b())[1] / 377e6 - 1) < 5e-3
    assert abs(Decoder().parameter_counts(ModelConfig.powermoe_3b())[1] / 800e6 - 1) < 2e-2


def test_multipliers():
    """The model applies m_emb, m_res, the attention scale and the divisor of the logits as specified."""
    config = ModelConfig(**SMALL, m_emb=3.0, m_res=0.0, m_width=4.0)
    model, tokens = first_model(config), tokens_of(config)
    x = 3.0 * np.asarray(model.embed[...])[tokens]  # m_res = 0 removes every layer
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
    assert_close(call(model, tokens).logits, x @ np.asarray(model.embed[...]).T / 4.0, FORWARD["float32"])
    scaled = first_model(ModelConfig(**SMALL, attention_scale=0.0))
    assert not np.allclose(call(scaled, tokens).logits, call(first_model(MODELS["dense"]), tokens).logits)


def test_initial_deviations():
    config = ModelConfig(V=512, D=128, L=8, N=4, K=4, H=32, F=256, m_width=4.0, init_std=0.1, tied=False)
    model = init(config, jax.random.key(0))
    expected = {
        "embed": (model.embed, 0.1), "unembed": (model.unembed, 0.1), "query": (model.blocks.attention.query, 0.05),
        "w_in": (model.blocks.ffn.w_in, 0.05), "output": (model.blocks.attention.output, 0.05 / 4),
        "w_out": (model.blocks.ffn.w_out, 0.05 / 4),
    }  # fmt: skip
    for name, (param, std) in expected.items():
        assert abs(float(param[...].std()) / std - 1) < 0.02, name


def test_rotary_depends_on_distances_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def dot(i, j):
        return float((rotary(q, jnp.array([[i]]), 100.0) * rotary(k, jnp.array([[j]]), 100.0)).sum())

    assert abs(dot(5, 3) - dot(105, 103)) < 1e-4 and abs(dot(5, 3) - dot(5, 4)) > 1e-3


def square(model, tokens):
    return jnp.square(model(tokens).logits).mean()


gradients_of = jax.jit(jax.grad(square))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_value(remat):
    config = MODELS["experts"]
    other, tokens = first_model(dataclasses.replace(config, remat=remat)), tokens_of(config)
    pairs = zip(*(jax.tree.leaves(gradients_of(m, tokens)) for m in (other, first_model(config))), strict=True)
    for a, b in pairs:
        assert_close(a, b, GRADIENT["float32"])


def test_bfloat16_computes_and_float32_stores():
    config = dataclasses.replace(MODELS["experts"], dtype="bfloat16")
    model, tokens = first_model(config), tokens_of(config)
    assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    out = jax.jit(apply)(model, {"tokens": tokens})
    assert out.logits.dtype == jnp.float32
    exact = call(first_model(MODELS["dense"]), tokens).logits
    half = call(first_model(dataclasses.replace(MODELS["dense"], dtype="bfloat16")), tokens).logits
    assert_close(half, exact, 2e-2)


@each_model
def test_gradients_are_finite_and_reach_every_parameter(config):
    for name, g in named_leaves(gradients_of(first_model(config), tokens_of(config))).items():
        assert np.isfinite(g).all() and np.abs(g).max() > 0, name


def test_tree_mode_of_nnx():
    """The modules are plain pytrees: jit and grad work on them with NNX's graph mode switched off."""
    config = ModelConfig(**SMALL | dict(V=8), experts=ExpertsConfig(2, 2), implementation="reference")
    with nnx.set_graph_mode(False):
        model = jax.jit(lambda: init(config, jax.random.key(0)))()
        gradient = jax.jit(jax.grad(square))(model, jnp.zeros((1, 4), jnp.int32))
    assert jax.tree.structure(gradient) == jax.tree.structure(model)
