"""Test the Sparse Universal Transformer against the original encoder, and test the properties of its halting."""

import dataclasses
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FORWARD, assert_close
from flax import nnx

from pallas_kernels import route
from stickjax.config.experts import ExpertsConfig
from stickjax.config.universal import SutConfig
from stickjax.models.parameters import label, map_leaves, partition, shardings
from stickjax.models.router import router_stats
from stickjax.models.universal import SparseUniversalTransformer, UniversalStack, apply, init, loss
from stickjax.models.universal.block import BiasedExperts
from stickjax.models.universal.halting import HaltingGate, halting_step, start, until_halted
from stickjax.parallel.mesh import AXES, shard_batch
from stickjax.training.gradients import mesh_gradients

HERE = Path(__file__).parent


@cache
def original_encoder(name):
    """Return our stack with the original weights, its input x [B,T,D], the token mask [B,T], and a dict of arrays.

    `name` is a file in tests/oracles/sut. The dict contains the arrays that the original encoder computes in each step.
    """
    with np.load(HERE / "oracles" / "sut" / f"{name}.npz", allow_pickle=False) as arrays:
        a = dict(arrays)
    p = {key.removeprefix("param/").removeprefix("mod."): a[key] for key in a if key.startswith("param/")}
    config = SutConfig(
        D=32, L=7, K=2, H=8, F=24, experts=ExpertsConfig(6, 2), attention_experts=ExpertsConfig(5, 2),
        normalize_before=name == "encoder_pre_norm",
    )  # fmt: skip
    stack = jax.eval_shape(partial(UniversalStack, config, causal=False), jax.random.key(0))
    attention, feed_forward, heads, ffn = stack.block.attention, stack.block.ffn, "self_attn.", "moe."
    weights = {
        (attention.router, "w_in"): p[heads + "q_proj.w_gate.0.weight"].T,
        (attention.router, "bias"): p[heads + "q_proj.w_gate.0.bias"],
        (attention.router, "weight"): p[heads + "q_proj.w_gate.3.weight"].T,
        (attention.experts, "expert_query"): p[heads + "q_proj.experts.w"],
        (attention.experts, "expert_output"): p[heads + "q_proj.output_experts.w"],
        (attention.experts, "key"): p[heads + "k_proj.weight"].T.reshape(32, 2, 8),
        (attention.experts, "value"): p[heads + "v_proj.weight"].T.reshape(32, 2, 8),
        (attention.experts, "relative"): p[heads + "rel_pos_emb"][..., 1:-1],  # distances of -64 and 64 are never used
        (attention.norm, "scale"): p["self_attn_layer_norm.weight"],
        (attention.norm, "bias"): p["self_attn_layer_norm.bias"],
        (feed_forward.router, "w_in"): p[ffn + "w_gate.0.weight"].T,
        (feed_forward.router, "bias"): p[ffn + "w_gate.0.bias"],
        (feed_forward.router, "weight"): p[ffn + "w_gate.3.weight"].T,
        (feed_forward.experts, "w_in"): p[ffn + "experts.w"],
        (feed_forward.experts, "in_bias"): p[ffn + "experts.b"],
        (feed_forward.experts, "w_out"): p[ffn + "output_experts.w"],
        (feed_forward.experts, "out_bias"): p[ffn + "output_experts.b"],
        (feed_forward.norm, "scale"): p["final_layer_norm.weight"],
        (feed_forward.norm, "bias"): p["final_layer_norm.bias"],
        (stack.gate, "w_in"): p["_gate.0.weight"].T,
        (stack.gate, "bias"): p["_gate.0.bias"],
        (stack.gate, "w_out"): p["_gate.3.weight"].T,
    }
    for (module, leaf), value in weights.items():
        assert getattr(module, leaf).shape == value.shape, leaf
        setattr(module, leaf, nnx.Param(jnp.asarray(value)))
    return stack, jnp.asarray(a["x"].swapaxes(0, 1)), jnp.asarray(~a["pad"]), a


@jax.jit
def each_step(stack, x, real, threshold):
    """Return the halting states after each of the L steps, stacked along the first axis.

    Args:
      stack: the layers of the model.
      x: the input, [B, T, D].
      real: the token mask, [B, T].
      threshold: a token halts when its probability to have halted exceeds this.
    """

    def block(h, s, running, step):
        h, sums = stack.block(h, s, running, jnp.where(real, 0, -1))
        return h, sums, {name: one.rows.sum() for name, one in sums.items()}

    def step(now, _):
        now = halting_step(now, block, stack.gate, real, threshold)
        return now, now

    return jax.lax.scan(step, start(x, real, block, stack.config.L), None, stack.config.L)[1]


@pytest.mark.parametrize("name", ["encoder_post_norm", "encoder_pre_norm"])
def test_every_step_is_that_of_the_original_encoder(name):
    stack, x, real, expected = original_encoder(name)
    steps = jax.device_get(each_step(stack, x, real, stack.config.halting_threshold))
    real = np.asarray(real)
    for i in range(7):
        hidden, state = (expected[part][i].swapaxes(0, 1)[real] for part in ("hidden", "soft_halted"))
        assert_close(steps.hidden[i][real], hidden, FORWARD["float32"], f"hidden {i}")
        assert_close(steps.state[i][real], state, FORWARD["float32"], f"state {i}")
        act = steps.act[i][real].mean()
        np.testing.assert_allclose(act, expected["act_loss"][i], rtol=1e-5, err_msg=f"act {i}")


@pytest.fixture(scope="module")
def encoder():
    """Return our encoder with the original post-norm weights, its input x, the token mask, and a dict of functions.

    Each function runs the encoder. Its key in the dict is True if the loop stops as soon as all tokens have halted. The
    tokens halt at different steps.
    """
    stack, x, real, _ = original_encoder("encoder_post_norm")
    segments = jnp.where(real, 0, -1)
    run = {
        stop_early: jax.jit(
            lambda x, threshold, stop=stop_early: stack(x, segments, threshold=threshold, stop_early=stop)
        )
        for stop_early in (False, True)
    }
    return stack, x, real, run


@pytest.fixture(scope="module")
def halting_soon(encoder):
    stack, x, real, _ = encoder
    return jax.device_get(each_step(stack, x, real, 0.6))


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_depth_at_the_start_is_that_of_equal_coins(bias):
    """Before training, a token halts at each of the first L - 1 steps with the same probability, else at step L.

    The probability is 1/2 if `halting_bias` is 0. The expected depth must agree with these coin tosses.
    """
    config, L = SutConfig(D=4, H=2, halting_bias=bias), 5
    x, real = jnp.ones((2, 3, 4)), jnp.arange(3)[None] < jnp.array([[3], [1]])
    end = until_halted(
        lambda h, s, w, step: (h + 1, (), ()), HaltingGate(config, jax.random.key(0)), x, real, L, 0.999,
        stop_early=False,
    )  # fmt: skip
    on = 1 / (1 + np.exp(-bias))
    expected = sum(j * on ** (j - 1) * (1 - on) for j in range(1, L)) + L * on ** (L - 1)
    np.testing.assert_allclose(end.depth, expected * real, rtol=1e-6)
    np.testing.assert_allclose(end.act[real], expected - 1, rtol=1e-6)
    np.testing.assert_allclose(end.state, jnp.where(real[..., None], 1 + expected, 1) * x, rtol=1e-6)


def test_states_of_halted_tokens_are_frozen(halting_soon):
    steps = halting_soon
    halted_at = [int((steps.running[i] == 0).sum()) for i in range(7)]
    assert halted_at[0] < halted_at[2] <= halted_at[-1]  # some tokens halt, not all at once
    for i in range(6):
        halted = steps.running[i] == 0
        np.testing.assert_array_equal(steps.state[i + 1][halted], steps.state[i][halted])
        np.testing.assert_array_equal(steps.depth[i + 1][halted], steps.depth[i][halted])
        assert (steps.running[i + 1][halted] == 0).all()
        assert (steps.state[i + 1][~halted] != steps.state[i][~halted]).any(-1).all()


def test_stopping_early_changes_nothing_and_a_lower_threshold_runs_fewer_rows(encoder):
    _, x, real, run = encoder
    rows = {}
    for threshold in (0.999, 0.6, 0.3):
        full, early = (run[stop_early](x, threshold) for stop_early in (False, True))
        assert full.step == 7
        for part in ("state", "depth", "statistics", "rows"):
            jax.tree.map(np.testing.assert_array_equal, getattr(full, part), getattr(early, part))
        rows[threshold] = {name: np.asarray(counts) for name, counts in early.rows.items()}
        for counts in rows[threshold].values():
            assert counts[0] == 2 * real.sum() and (np.diff(counts) <= 0).all()
    assert early.step < 7
    for name in ("attention", "ffn"):
        assert rows[0.999][name].sum() > rows[0.6][name].sum() > rows[0.3][name].sum() > 0


def test_neither_padding_nor_halted_tokens_change_others(encoder, halting_soon):
    stack, x, real, run = encoder
    before, after = (run[False](inputs, 0.6) for inputs in (x, jnp.where(real[..., None], x, 7.0)))
    for part in ("state", "depth", "act"):
        np.testing.assert_array_equal(getattr(before, part)[real], getattr(after, part)[real])
    jax.tree.map(np.testing.assert_array_equal, before.statistics, after.statistics)
    # Other tokens see the frozen state of a halted token, never the state that it would compute.
    running, hidden, state = (getattr(halting_soon, name)[1] for name in ("running", "hidden", "state"))
    halted, segments = running == 0, jnp.where(real, 0, -1)
    assert (halted & real).any() and (~halted).any()
    block = jax.jit(stack.block)
    h, sums = block(hidden, state, running, segments)
    other, other_sums = block(jnp.where(halted[..., None], 7.0, hidden), state, running, segments)
    np.testing.assert_array_equal(h[~halted], other[~halted])
    jax.tree.map(np.testing.assert_array_equal, sums, other_sums)
    moved, _ = block(hidden, jnp.where((halted & real)[..., None], state + 1, state), running, segments)
    assert (moved[~halted] != h[~halted]).any()


def test_mutual_information_is_that_of_all_steps_together(encoder, halting_soon):
    """The statistic `mutual_information` of the attention's router is computed over all steps together.

    The statistic is H(e|x) - H(e), which is minus the mutual information of the experts e and the pairs x = (token,
    step). Each pair is weighted by the probability that the token still runs.
    """
    stack, x, real, _ = encoder
    router = stack.block.attention.router
    inputs = np.concatenate([x[None], halting_soon.hidden[:-1]]).reshape(-1, 32)
    w = np.concatenate([real[None].astype(np.float32), halting_soon.running[:-1]]).reshape(-1)
    logits = np.tanh(inputs @ np.asarray(router.w_in[...]) + np.asarray(router.bias[...])) @ np.asarray(
        router.weight[...]
    )
    g = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p = w / w.sum()
    marginal = p @ g
    expected = -(p @ (g * np.log(g)).sum(-1)) + (marginal * np.log(marginal)).sum()
    sums = jax.tree.map(lambda a: a[-1], halting_soon.statistics)["attention"]
    stats = router_stats(sums)
    np.testing.assert_allclose(stats.mutual_information, expected, rtol=1e-5)
    assert expected < 0
    np.testing.assert_allclose(stats.load.sum(), 1, rtol=1e-6)


TINY = dict(
    V=12, D=16, L=3, K=2, H=4, F=12, experts=ExpertsConfig(4, 2), attention_experts=ExpertsConfig(3, 2),
    implementation="reference",
)  # fmt: skip
BALANCED = dict(experts=ExpertsConfig(4, 2, mi_weight=0.01), attention_experts=ExpertsConfig(3, 2, mi_weight=0.01))
PAIRS = BALANCED | dict(classes=7, act_weight=0.01)
SAMPLED = BALANCED | dict(attention_experts=ExpertsConfig(3, 2, mi_weight=0.01, sample_topk=1))


def pairs(B, T, seed):
    """Return a batch of B random pairs of sentences with up to T tokens, and random labels.

    0 is padding.
    """
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 12, (2, B, T), np.int32)
    words[np.arange(T)[None, None] >= rng.integers(1, T + 1, (2, B, 1))] = 0
    return {"left": words[0], "right": words[1], "label": rng.integers(0, 7, B, np.int32)}


def language(B, T, seed):
    tokens = np.random.default_rng(seed).integers(0, 12, (B, T + 1), np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": np.ones((B, T), bool)}


def translation(B, T, seed):
    batch = pairs(B, T, seed)
    return {"source": batch["left"], "target": batch["right"]}


def drawn(make, config):
    """Return the model make(config, key) with random parameters, also those whose initial value is zero.

    NumPy draws the parameters, so that nothing is compiled.
    """
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(leaf.names[-1] == "scale", 0.2, leaf.value.shape), jnp.float32)

    return map_leaves(draw, jax.eval_shape(partial(make, config), jax.random.key(0)))


def translation_loss(model, batch, key):
    output = model(batch, key)
    information = sum(stats.mutual_information for stats in output.router.values())
    return jnp.square(output.logits).mean() + information + output.act, {}


MODELS = {
    "pairs": (SutConfig(**TINY | PAIRS), init, pairs, loss),
    "language": (
        SutConfig(**TINY | SAMPLED, attention="stick_breaking", act_weight=0.01, dropout=0.1),
        init, language, loss,
    ),
    "translation": (
        SutConfig(**TINY | SAMPLED, normalize_before=True, remat="full", dropout=0.1), SparseUniversalTransformer,
        translation, translation_loss,
    ),
}  # fmt: skip


# `make test` checks the translation model only. It has every part of the language model: dropout, sampled experts and
# rematerialisation.
EXHAUSTIVE = {"test_every_parameter_learns_and_has_a_label_and_a_partition": lambda name: name == "language"}


def check_gradients(gradients):
    def check(leaf):
        value = np.asarray(leaf.value)
        assert np.isfinite(value).all() and (value != 0).any(), leaf.name
        assert label(leaf) in ("matrix", "vector", "embedding")
        return partition(leaf)

    map_leaves(check, gradients)


@pytest.mark.parametrize("name", ["language", "translation"])
def test_every_parameter_learns_and_has_a_label_and_a_partition(name):
    config, make, batch, f = MODELS[name]
    model = drawn(make, config)
    key = jax.random.key(2) if config.dropout else None
    arrays = batch(16, 6, 1)  # as in `classifier`
    check_gradients(jax.jit(jax.grad(lambda m, arrays: f(m, arrays, key)[0]))(model, arrays))


def pair_gradients(model, batch, key):
    return jax.grad(lambda m: loss(m, batch, None), has_aux=True)(model)


@pytest.fixture(scope="module")
def classifier():
    """Return a model that classifies pairs of sentences, a batch of pairs, and a jitted function.

    The function (model, batch, key) returns the gradients and the metrics of the batch.
    """
    return drawn(init, MODELS["pairs"][0]), pairs(16, 6, 1), jax.jit(pair_gradients)


def test_losses_are_means_over_all_devices(classifier):
    model, batch, gradients = classifier
    key = jax.random.key(0)
    expected, metrics = gradients(model, batch, key)
    check_gradients(expected)
    mesh = jax.make_mesh((2, 1, 1, 1, 1), AXES, devices=jax.devices()[:2])
    placed = jax.device_put(model, shardings(mesh, model))
    found, found_metrics = jax.jit(mesh_gradients(mesh, pair_gradients))(placed, shard_batch(mesh, batch), key)
    for name, value in metrics.items():
        np.testing.assert_allclose(found_metrics[name], value, rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), found, expected)


def test_a_few_pairs_are_learnt(classifier):
    model, batch, gradients = classifier
    optimizer = optax.adam(1e-2)
    state, history = optimizer.init(model), []

    @jax.jit
    def learn(model, state, gradients):
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state

    for _ in range(80):
        g, metrics = gradients(model, batch, jax.random.key(0))
        model, state = learn(model, state, g)
        history.append({name: float(value) for name, value in metrics.items()})
    assert history[0]["accuracy"] < 0.5 and history[-1]["accuracy"] == 1
    assert history[-1]["loss"] < 0.1 < 1 < history[0]["loss"]


def test_a_causal_classifier_reads_the_last_tokens():
    model = drawn(init, SutConfig(**TINY | PAIRS, attention="stick_breaking"))
    read = jax.jit(lambda left, right: apply(model, {"left": left, "right": right}).logits)
    left, right = jnp.array([[3, 4, 5, 0, 0]]), jnp.array([[4, 1, 3, 2, 5]])
    logits = read(left, right)
    wider = ((0, 0), (0, 2))
    assert_close(read(jnp.pad(left, wider), jnp.pad(right, wider)), logits, 1e-6)  # padding has no effect
    for t in range(3):
        other = read(left.at[0, t].set(2), right)
        assert (np.abs(other - logits) > 1e-3).any()


def test_a_translation_depends_on_what_is_read_and_on_what_was_written_before():
    """The logits of a translation depend on every source token and on earlier target tokens.

    They depend neither on later target tokens nor on the padding of the source. Stopping early changes nothing.
    """
    config = MODELS["translation"][0]
    model = drawn(SparseUniversalTransformer, config)
    run = jax.jit(lambda source, target: model({"source": source, "target": target}).logits)
    source, target, t = jnp.array([[3, 4, 5, 0]]), jnp.array([[4, 1, 3, 2, 5]]), 2
    logits = run(source, target)
    after = run(source, target.at[0, t + 1 :].set(7))
    np.testing.assert_array_equal(after[:, : t + 1], logits[:, : t + 1])
    assert (after[:, t + 1 :] != logits[:, t + 1 :]).any(-1).all()
    assert_close(run(jnp.pad(source, ((0, 0), (0, 3))), target), logits, 1e-6)
    for position in range(3):
        assert (jnp.abs(run(source.at[0, position].set(8), target) - logits) > 1e-4).any(-1).all()
    early = jax.jit(lambda: model({"source": source, "target": target}, stop_early=True).logits)()
    np.testing.assert_array_equal(early, logits)


def test_no_token_depends_on_later_ones_or_on_other_documents():
    """In a causal model, no token depends on later tokens or on other documents.

    The test checks the gradients of the state and of the expected depth. It also checks values, because the decision to
    halt has no gradient.
    """
    model = drawn(init, SutConfig(**TINY, attention="stick_breaking"))
    segments, t = jnp.array([[0, 0, 1, 1, 1, 1, 1, -1]]), 4
    x = jax.random.normal(jax.random.key(1), (1, 8, 16))
    weights = jax.random.normal(jax.random.key(2), (16,))

    @jax.jit
    def run(x, threshold):
        end = model.stack(x, segments, threshold=threshold)
        return end.state[0] @ weights, end.depth[0], end.act[0]

    gradients = jax.jit(jax.jacrev(lambda x: jnp.stack([part[t] for part in run(x, 0.999)])))(x)
    for gradient in jnp.abs(gradients).max(-1)[:, 0]:
        assert (gradient[jnp.array([0, 1, 5, 6, 7])] == 0).all() and (gradient[2:5] > 0).all()
    before, after = run(x, 0.6), run(x.at[0, t + 1 :].set(7.0).at[0, :2].set(7.0), 0.6)
    assert len(set(np.asarray(before[1]).tolist())) > 4  # tokens halt at different steps
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one[2 : t + 1], other[2 : t + 1])
        assert (one[t + 1 : 7] != other[t + 1 : 7]).all()


@pytest.mark.parametrize("name", MODELS)
def test_the_type_of_the_computation_is_kept(name):
    """With dtype bfloat16, the model can be traced, and its floating-point outputs are in float32.

    Tracing would fail if a carry of the loop over the steps changed its type.
    """
    config, make, batch, f = MODELS[name]
    config = dataclasses.replace(config, dtype="bfloat16")
    model = jax.eval_shape(partial(make, config), jax.random.key(0))
    state = jax.eval_shape(lambda m: m(batch(2, 5, 1), jax.random.key(2)), model)
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state))


def test_hidden_units_that_drop_out_have_a_path_of_their_own():
    """Dropout of hidden units uses a code path of its own. With a rate near zero, the output is as without dropout."""
    config = SutConfig(**TINY, dropout=1e-9)
    experts = BiasedExperts(config, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, 5, 16))
    routing = route(jnp.array([[0, 1], [3, 2], [4, 4], [1, 0], [2, 3]]), 4)
    gates = jax.random.uniform(jax.random.key(2), (5, 2))
    y = experts(x, routing, gates)
    assert_close(experts(x, routing, gates, jax.random.key(3)), y, FORWARD["float32"])
    assert (y[0, 2] == 0).all() and (y[0, 3] != 0).all()


def test_presets_have_the_published_sizes():
    """The presets sut_base and sut_big have 66M and 110M parameters, as published."""
    for config, millions in ((SutConfig.sut_base(), 66), (SutConfig.sut_big(), 110)):
        shapes = jax.eval_shape(partial(SparseUniversalTransformer, config), jax.random.key(0))
        assert round(sum(x.size for x in jax.tree.leaves(shapes)) / 1e6) == millions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(experts=ExpertsConfig(4, 5)), "experts: k=5 experts per token cannot exceed E=4"),
        (dict(attention_experts=ExpertsConfig(3, 1)), "attention_experts: k=1 .* has a constant gate"),
        (
            dict(attention_experts=ExpertsConfig(3, 2, sample_topk=3)),
            "sample_topk=3 cannot exceed k=2",
        ),
        (dict(experts=ExpertsConfig()), "experts.E=0 must be at least 1"),
        (
            dict(experts=ExpertsConfig(4, 2, network="mlp")),
            "experts.network='mlp' must be 'linear', the default: this model family supports only the fields E, k, ",
        ),
        (dict(D=15), "D=15 must be even"),
        (dict(halting_threshold=0.0), "halting_threshold=0.0 must be above 0"),
        (dict(dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
        (dict(attention="stick"), "did you mean 'stick_breaking'"),
    ],
)
def test_configs_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        SutConfig(**TINY | changes)
