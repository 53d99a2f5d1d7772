"""Modules (experts and attention experts) can be added, pruned and counted, from Python and from the command line."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FORWARD, assert_close
from scipy.special import erf

from stickjax.config import Config, DataConfig, ExpertsConfig, ModelConfig, OptimConfig, SutConfig, TrainConfig
from stickjax.models.attention import Context
from stickjax.models.router import Router, choose_experts, probabilities
from stickjax.models.transformer import init
from stickjax.storage.checkpoints import named_leaves
from stickjax.storage.run_folder import save
from stickjax.surgery import (
    TRAINABLE,
    extend,
    freeze,
    frozen,
    merged,
    mutual_information,
    prune,
    report,
    use,
)
from stickjax.surgery.kinds import KINDS as KINDS_OF_MODULES
from stickjax.training.step import init_state, make_step

ROUTER = dict(order="softmax_topk", network="mlp", hidden=8, mi_weight=0.01)
CONFIG = ModelConfig(
    V=257, D=16, L=2, N=4, K=2, H=8, F=12, experts=ExpertsConfig(6, 2, **ROUTER),
    attention_experts=ExpertsConfig(4, **ROUTER), attend_current=True, activation="gelu_tanh", norm="layer",
    implementation="reference",
)  # fmt: skip
KINDS = {"ffn": (6, 2), "attention": (4, 2)}  # columns and k of each
run = jax.jit(lambda model, tokens: model(tokens))
first = jax.jit(lambda config: init(config, jax.random.key(0)), static_argnums=0)
TOKENS = np.random.default_rng(0).integers(0, 257, (2, 24))


@pytest.fixture(scope="module")
def model():
    return first(CONFIG)


# Users run optimised programs. One case without optimisation is enough to test such programs, too.
EXHAUSTIVE = {
    "test_probabilities_keep_their_bits": lambda compiled, E, new: (
        (compiled, E) not in (("optimised", 5), ("optimised", 16), ("optimised", 8), ("quick", 6))
    )
}


@pytest.fixture(params=["optimised", "quick"])
def compiled(request):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", request.param == "quick")
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(("E", "new"), [(6, 2), (8, 5), (16, 16), (5, 1)])
def test_probabilities_keep_their_bits(compiled, E, new):
    """New experts whose logit is -inf do not change one bit of the old experts' indices, gates and probabilities.

    The test runs with 7 and with 700 tokens, because XLA compiles small and large loops differently.
    """
    rng = np.random.default_rng(E)
    for T in (7, 700):
        x, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((T, 16), (16, E)))

        def chosen(x, w, new):
            logits = jnp.concatenate([x @ w, jnp.full((x.shape[0], new), -jnp.inf)], 1)
            return choose_experts(logits, 2, "softmax_topk", trained=E), probabilities(logits, E)

        chosen = jax.jit(chosen, static_argnums=2)
        (indices, gates), p = chosen(x, w, 0)
        (more_indices, more_gates), more = chosen(x, w, new)
        same(indices, more_indices)
        same(gates, more_gates)
        same(p, more[:, :E])
        assert_close(p, jax.nn.softmax(x @ w), FORWARD["float32"])
        assert not more[:, E:].any()


def test_extended_model_is_the_old_one_without_its_new_modules(model, monkeypatch):
    extended = extend(model, jax.random.key(1), experts=5, attention_experts=3)
    base = run(model, TOKENS)
    assert (run(extended, TOKENS).logits != base.logits).any()
    logits = Router.logits

    def of_old_modules(self, x, key):
        out, key = logits(self, x, key)
        return out.at[:, self.weight.shape[1] :].set(-jnp.inf), key

    monkeypatch.setattr(Router, "logits", of_old_modules)
    found = jax.jit(lambda model: model(TOKENS))(extended)
    same(found.logits, base.logits)
    for kind in ("router", "attention_router"):  # experts that are never chosen do not count
        assert_close(getattr(found, kind).mutual_information, getattr(base, kind).mutual_information, 1e-5)


def test_extension_keeps_every_old_leaf_and_draws_the_new_ones(model):
    old = named_leaves(model)
    first, second = (named_leaves(extend(model, jax.random.key(i), experts=2, attention_experts=1)) for i in (1, 2))
    added = {name.rpartition("/")[2] for name in first.keys() - old.keys()}
    assert added == {"new_w_in", "new_w_out", "new_weight", "new_expert_query", "new_expert_output"}
    for name in first:
        if name in old:
            same(first[name], old[name])
        else:
            assert (first[name] != second[name]).all()


def test_merged_is_the_same_function(model):
    extended = extend(model, jax.random.key(1), experts=5, attention_experts=3)
    assert_close(run(merged(extended), TOKENS).logits, run(extended, TOKENS).logits, FORWARD["float32"])
    again = extend(extended, jax.random.key(2), experts=1).config
    experts, heads = again.experts, again.attention_experts
    assert (experts.E, experts.added, heads.E, heads.added) == (11, 1, 7, 0)


@pytest.mark.parametrize("routing", TRAINABLE)
def test_what_is_frozen_does_not_move(routing):
    """Training does not change one bit of the frozen parameters.

    The model has router losses and selection biases. Selection biases move without a gradient, so it is not enough to
    set the gradients of frozen parameters to zero.
    """
    changes = dict(bias_rate=0.01, switch_weight=0.1)
    model = CONFIG
    for kind in KINDS_OF_MODULES.values():
        model = kind.changed(model, **changes)
    optim = OptimConfig(schedule="constant", peak_lr=0.01, trainable=TRAINABLE[routing])
    extended = extend(first(model), jax.random.key(1), experts=2, attention_experts=2)
    config = Config(extended.config, DataConfig(T=24, B=2), optim, TrainConfig(steps=3))
    state = jax.jit(partial(init_state, config))(jax.random.key(0))._replace(params=extended)
    before = {name: np.asarray(leaf) for name, leaf in named_leaves(extended).items()}
    batch = dict(tokens=TOKENS, targets=np.roll(TOKENS, -1, 1), loss_mask=np.ones(TOKENS.shape, bool))
    step = jax.jit(make_step(config))
    for _ in range(3):
        state, metrics = step(state, batch)
    assert metrics["bad_steps"] == 0
    for name, leaf in named_leaves(state.params).items():
        learns = "/new_" in name or (routing == "full" and "/router/" in name)
        assert (np.asarray(leaf) != before[name]).any() == learns, name


def test_freeze_leaves_out_what_it_names(model):
    config = freeze(Config(CONFIG), "*.router.*,embed")
    mask = named_leaves(frozen(model, config.optim.trainable))
    assert {name for name in mask if mask[name]} == {name for name in mask if "/router/" in name or name == "embed"}
    again = named_leaves(frozen(model, freeze(config, "norm.*").optim.trainable))
    assert {name for name in again if again[name] != mask[name]} == {"norm/scale", "norm/bias"}
    with pytest.raises(ValueError, match="no parameter matches 'embedd'"):
        frozen(model, freeze(config, "embedd").optim.trainable)


def test_use_counts_routed_pairs_of_real_tokens(model, monkeypatch):
    segments = np.zeros(TOKENS.shape, np.int32)
    segments[1, 10:] = -1
    seen: list[tuple] = []
    logits = Router.logits

    def spied(self, x, key):
        out, key = logits(self, x, key)
        jax.debug.callback(lambda out, kind=self.experts.old: seen.append((kind, np.asarray(out))), out)
        return out, key

    monkeypatch.setattr(Router, "logits", spied)
    jax.clear_caches()  # drops programs that were compiled without the spy; below, those compiled with it
    counts = use(model, [dict(tokens=TOKENS, segment_ids=segments), dict(tokens=TOKENS)])
    jax.effects_barrier()
    for kind, (E, k) in KINDS.items():
        of_kind = [out for old, out in seen if old == E]
        assert len(of_kind) == 2 * CONFIG.L
        total = 0
        for i, out in enumerate(of_kind):
            best = np.argsort(-out, axis=1)[:, :k]
            total += np.bincount(best[segments.ravel() >= 0 if i < CONFIG.L else ...].ravel(), minlength=E)
        same(counts[kind].sum(0), total)
        same(counts[kind].sum(1), [k * (34 + 48)] * CONFIG.L)
    jax.clear_caches()


def gelu(x, exact):
    return x * (0.5 + 0.5 * erf(x / 2**0.5)) if exact else np.asarray(jax.nn.gelu(x, approximate=True))


def dense_ffn(ffn, x, alive, denominator):
    """Return the output of the first layer's experts on x [T, D], and the two chosen experts of each token, [T, 2].

    NumPy computes every expert on all tokens.

    Args:
      ffn: the expert parameters and routers of all layers.
      alive: a bool array [E], false for pruned experts, which are never chosen.
      denominator: the experts in the softmax of the gates: "new" for the experts that remain, "old" for all.
    """
    p = {name: np.asarray(leaf[0], np.float64) for name, leaf in named_leaves(ffn).items()}
    logits = gelu(x @ p["router/hidden"] + p["router/hidden_bias"], True) @ p["router/weight"]
    if denominator == "new":
        logits = np.where(alive, logits, -np.inf)
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    chosen = np.argsort(-np.where(alive, probability, -1), axis=1)[:, :2]
    hidden = gelu(np.einsum("TD,EDF->TEF", x, p["w_in"][:, :, 0]), False)
    outputs = np.einsum("TEF,EFD->TED", hidden, p["w_out"])
    gates = np.take_along_axis(probability, chosen, 1)
    return (gates[..., None] * np.take_along_axis(outputs, chosen[..., None], 1)).sum(1), chosen


first_layer = jax.jit(lambda model, x: jax.tree.map(lambda leaf: leaf[0], model.blocks).ffn(x)[0])
first_heads = jax.jit(lambda model, x, context: jax.tree.map(lambda leaf: leaf[0], model.blocks).attention(x, context))


@pytest.mark.parametrize(("denominator", "implementation"), [("old", "reference"), ("old", "xla"), ("new", "xla")])
def test_pruned_layer_against_a_dense_one(denominator, implementation):
    model = first(dataclasses.replace(CONFIG, implementation=implementation))
    x = np.random.default_rng(3).normal(size=(1, 40, 16)).astype(np.float32)
    counts = {"ffn": np.array([[9, 1, 9, 2, 9, 9], [9, 9, 9, 9, 9, 9]])}
    pruned = prune(model, counts, threshold=0.1, denominator=denominator)
    alive = np.array([True, False, True, False, True, True])
    assert pruned.config.experts.E == 6  # the second layer keeps all; the first has two unused columns
    slot = pruned.blocks.ffn.router.slot[...]
    columns = alive if denominator == "old" else np.arange(6) < 4
    same(slot[0], np.where(columns, np.cumsum(columns) - 1, -1))
    wanted, _ = dense_ffn(model.blocks.ffn, x[0].astype(np.float64), alive, denominator)
    y = first_layer(pruned, x)
    assert_close(y[0], wanted, FORWARD["float32"])
    _, before = dense_ffn(model.blocks.ffn, x[0].astype(np.float64), np.ones(6, bool), "old")
    untouched = alive[before].all(1)
    assert 0 < untouched.sum() < 40
    if denominator == "old":
        same(y[0][untouched], first_layer(model, x)[0][untouched])


def test_pruned_heads_leave_other_tokens_alone(model):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 40, 16)), jnp.float32)
    counts = {"attention": np.array([[9, 1, 9, 9], [9, 9, 1, 9]])}
    pruned = prune(model, counts, count=3)
    assert (pruned.config.attention_experts.E, pruned.config.attention_experts.pruned, pruned.config.experts.E) == (
        3,
        1,
        6,
    )
    router = jax.tree.map(lambda leaf: leaf[0], model.blocks.attention.router)
    chosen = np.asarray(router(x[0])[0])
    untouched = (chosen != 1).all(1)
    assert 0 < untouched.sum() < 40
    before, after = (first_heads(m, x, Context(None, None, None, 0))[0][0] for m in (model, pruned))
    same(before[untouched], after[untouched])
    assert (before[~untouched] != after[~untouched]).any(1).all()


@pytest.mark.parametrize("denominator", ["old", "new"])
def test_a_pruned_module_is_never_drawn(model, denominator):
    """A router with sample_topk, which draws the last of the chosen experts at random, never draws a pruned one."""
    counts = {"ffn": np.array([[9, 1, 8, 2, 7, 6], [1, 2, 3, 4, 5, 6]])}
    pruned = prune(model, counts, count=3, denominator=denominator)
    router = jax.tree.map(lambda leaf: leaf[0], pruned.blocks.ffn.router)
    router.sample_topk = 1
    x = jnp.asarray(np.random.default_rng(3).normal(size=(500, 16)), jnp.float32)
    chosen, gates, _ = router(x, None, jax.random.key(0))
    assert {*np.unique(chosen)} == {0, 1, 2}
    assert (chosen[:, 0] != chosen[:, 1]).all() and (gates > 0).all()


def test_nothing_used_less_than_the_threshold_changes_nothing(model):
    counts = {"ffn": np.ones((2, 6), int)}
    untouched = prune(model, counts, threshold=0.1)
    assert untouched.config == CONFIG
    same(run(untouched, TOKENS).logits, run(model, TOKENS).logits)


def test_a_threshold_keeps_what_a_token_needs(model):
    counts = {"ffn": np.array([[0, 5, 0, 4, 1, 0], [0, 0, 0, 0, 0, 0]])}
    pruned = prune(model, counts, threshold=1.0)
    assert pruned.config.experts.E == 2
    same(pruned.blocks.ffn.router.slot[...] >= 0, [[0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0]])


@pytest.mark.parametrize("denominator", ["old", "new"])
def test_prune_again_and_extend(model, denominator):
    """Pruning in two steps gives the same model as pruning once.

    A model that is pruned and then extended routes only to the experts that remain and to the new ones.
    """
    counts = {"ffn": np.array([[9, 1, 8, 2, 7, 6], [1, 2, 3, 4, 5, 6]]), "attention": np.array([[4, 3, 2, 1]] * 2)}
    once = prune(model, counts, count={"ffn": 3, "attention": 2}, denominator=denominator)
    half = prune(model, counts, count={"ffn": 5, "attention": 2}, denominator=denominator)
    if denominator == "new":
        fewer = KINDS_OF_MODULES["attention"].changed(CONFIG, E=2)
        assert half.config == KINDS_OF_MODULES["ffn"].changed(fewer, E=5)  # as if it had never had more
        counts["ffn"] = np.array([[9, 8, 2, 7, 6], [2, 3, 4, 5, 6]])
    twice = prune(half, {"ffn": counts["ffn"]}, count=3, denominator=denominator)
    assert twice.config == once.config
    jax.tree.map(same, twice, once)
    extended = extend(once, jax.random.key(5), experts=2)
    routed = run(extended, TOKENS).router.load
    columns = {"old": [3, 6], "new": [3, 3]}[denominator]
    assert routed.shape == (2, columns[1] + 2)
    assert_close(routed.sum(1), [1.0, 1.0], FORWARD["float32"])
    both = merged(extended)
    assert both.config.experts.E == 5
    assert_close(run(both, TOKENS).logits, run(extended, TOKENS).logits, FORWARD["float32"])


def test_uneven_layers_and_the_new_denominator(model):
    counts = {"ffn": np.array([[9, 0, 9, 0, 9, 9], [9, 0, 9, 0, 0, 9]])}
    pruned = prune(model, counts, threshold=0.1, denominator="new")
    assert (pruned.config.experts.E, pruned.config.experts.pruned, pruned.config.experts.pruning) == (
        4,
        0,
        "new_denominator",
    )
    load = run(pruned, TOKENS).router.load
    assert load.shape == (2, 4)
    assert load[1, 3] == 0
    assert not pruned.blocks.ffn.w_in[1, 3].any()
    with pytest.raises(ValueError, match="are no longer there"):
        prune(pruned, {"ffn": np.ones((2, 4))}, count=2, denominator="old")
    with pytest.raises(ValueError, match="count=4 must be at least 2, the number of ffn modules .* at most 3"):
        prune(pruned, {"ffn": np.ones((2, 4))}, count=4, denominator="new")


def test_mutual_information_against_its_definition():
    p = np.random.default_rng(0).integers(0, 9, (3, 2, 5))
    found = mutual_information({str(s): {"ffn": counts} for s, counts in enumerate(p)})["ffn"]
    for layer in range(2):
        joint = p[:, layer] / p[:, layer].sum(1, keepdims=True) / 3
        product = joint.sum(0)[None] * joint.sum(1)[:, None]
        there = joint > 0
        assert_close(found[layer], (joint[there] * np.log2(joint[there] / product[there])).sum(), FORWARD["float32"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: extend(m, jax.random.key(0)), "experts and attention_experts are both 0"),
        (lambda m: extend(m, jax.random.key(0), experts=-1), "to add, experts=-1 and attention_experts=0, must be"),
        (lambda m: prune(m, {}), "give either count or threshold, got count=None"),
        (lambda m: prune(m, {"ffn": np.ones((2, 6))}, count=1), "uses, and at most 6, the number of ffn modules in"),
        (lambda m: prune(m, {"ffn": np.ones((2, 6))}, count=7), "count=7 must be at least 2, the number of ffn"),
        (lambda m: prune(m, {"ffn": np.ones((2, 5))}, count=3), r"has shape \[2, 5\], but must have \[2, 6\]"),
        (lambda m: prune(m, {"ffn": np.ones((2, 6))}, threshold=2), "threshold=2 must be a share"),
        (lambda m: prune(m, {}, count=3, denominator="odd"), "denominator='odd' is not one of 'old', 'new'"),
        (
            lambda m: prune(m, {"heads": np.ones((2, 6))}, count=3),
            "has no modules \\(experts\\) of the kind heads, but",
        ),
        (lambda m: report(m, {}), "at least one source"),
        (lambda m: save(".", m, Config(CONFIG)), r"\. exists"),
    ],
)
def test_bad_calls(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_models_without_modules():
    dense = init(
        dataclasses.replace(CONFIG, experts=ExpertsConfig(), attention_experts=ExpertsConfig(), V=8), jax.random.key(0)
    )
    for call in (
        lambda: extend(dense, jax.random.key(0), experts=1),
        lambda: prune(dense, {}, count=2),
        lambda: use(dense, []),
    ):
        with pytest.raises(ValueError, match=r"has no modules \(experts\): its experts.E"):
            call()
    with pytest.raises(ValueError, match="cannot be added to a model of family='sut'"):
        prune(SimpleNamespace(config=SutConfig(D=8, H=4, F=16)), {}, count=2)
