"""Test muP, the optimizer (against AdamW), and that a run can continue with another schedule or batch size."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stickjax.config import Config
from stickjax.models.parameters import PARAMETERS, Parameter
from stickjax.training import optimizer, schedules
from stickjax.training.optimizer import label_tree, make_optimizer
from stickjax.training.schedules import make_schedule


class Norm(nnx.Module):
    def __init__(self, *shape):
        self.scale = nnx.Param(jnp.full(shape, 2.0))


class Weights(nnx.Module):
    def __init__(self, **shapes):
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.full(shape, 2.0)))


class Blocks(nnx.Module):
    def __init__(self, L=2, D=4):
        self.norm = Norm(L, D)
        self.attention = Weights(query=(L, D, 1, D), key=(L, D, 1, D), value=(L, D, 1, D), output=(L, 1, D, D))
        self.attention.head_bias = nnx.Param(jnp.ones((L, 1, D)))
        self.router = Weights(weight=(L, D, 3), selection_bias=(L, 3))
        self.experts = Weights(w_in=(L, 3, D, D), w_out=(L, 3, D, D), bias=(L, D))


class Model(nnx.Module):
    def __init__(self):
        self.embed = Weights(embedding=(5, 4))
        self.unembed = nnx.Param(jnp.ones((4, 5)))
        self.blocks = Blocks()
        self.norm = Norm(4)


LABELS = {
    "embed.embedding": "embedding",
    "unembed": "embedding",
    "norm.scale": "vector",
    "blocks.norm.scale": "vector",
    "blocks.attention.head_bias": "vector",
    "blocks.experts.bias": "vector",
    "blocks.router.selection_bias": "frozen",
} | {
    f"blocks.{name}": "matrix"
    for name in (
        *("attention.query", "attention.key", "attention.value", "attention.output"),
        *("router.weight", "experts.w_in", "experts.w_out"),
    )
}


def flat(tree) -> dict:
    return {jax.tree_util.keystr(p, simple=True, separator=".").removesuffix(".value"): x
            for p, x in jax.tree_util.tree_leaves_with_path(tree)}  # fmt: skip


WEIGHTS = {
    "embedding": Parameter("V D", label="embedding"), "query": Parameter("D N H"), "key": Parameter("D K H"),
    "value": Parameter("D K H"), "output": Parameter("N H D"), "head_bias": Parameter("N H", label="vector"),
    "weight": Parameter("D C"), "selection_bias": Parameter("C", label="frozen"), "w_in": Parameter("E D F"),
    "w_out": Parameter("E F D"), "bias": Parameter("D", label="vector"),
}  # fmt: skip
NORM = {"scale": Parameter("D", label="vector")}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """Add the modules of this file to the table of parameters, which the optimizer reads, during each test."""
    mine = {"Weights": WEIGHTS, "Norm": NORM, "Model": {"unembed": Parameter("D V", label="embedding")}}
    for module, rows in mine.items():
        monkeypatch.setitem(PARAMETERS, module, rows)


@pytest.mark.parametrize("view", [lambda m: m, lambda m: jax.eval_shape(lambda: m), nnx.state])
def test_labels_by_name(view):
    params = view(Model())
    labels = label_tree(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert flat(labels) == LABELS


def test_labels_of_plain_dictionaries():
    assert label_tree({"attention": {"value": 0.0}, "embed": 0.0}) == {
        "attention": {"value": "matrix"},
        "embed": "embedding",
    }


def test_unknown_names_are_not_guessed(monkeypatch):
    with pytest.raises(ValueError, match="no muP label for 'attention.qeury' .did you mean 'query'"):
        label_tree({"attention": {"qeury": 0.0}})
    with pytest.raises(ValueError, match="surprise"):
        make_optimizer(Config(), {"surprise": jnp.ones(2)})
    model = Model()
    model.blocks.attention.qeury = nnx.Param(jnp.ones((2, 4, 1, 4)))
    with pytest.raises(ValueError, match="blocks.attention.qeury .Weights.qeury. is not in the table of parameters"):
        label_tree(model)
    monkeypatch.setitem(PARAMETERS, "Norm", {"scale": Parameter("N H", label="vector")})
    with pytest.raises(ValueError, match="norm.scale has 1 axes, but in the table of parameters its axes are 'N H'"):
        label_tree(Model())


def mup_step(model, **changes):
    """Return {name of a parameter: the distinct values of -update / learning rate in the first step}.

    All gradients are 1. `changes` are fields of the config.
    """
    changes = {"model.m_width": 4.0, "optim.peak_lr": 1e-3, "optim.schedule": "constant"} | changes
    tx = make_optimizer(Config().replace(changes), model)
    update = jax.jit(lambda model: tx.update(jax.tree.map(jnp.ones_like, model), tx.init(model), model))
    updates, _ = update(model)
    return {name: -np.unique(np.asarray(x)) / 1e-3 for name, x in flat(updates).items()}


@pytest.mark.parametrize("scale_decay", [False, True])
def test_mup_learning_rates_and_decay_by_numbers(scale_decay):
    """With muP at m_width=4, each kind of parameter gets the right learning rate and weight decay.

    All gradients are 1, so the first step of Adam is 1, in units of the learning rate. With weight decay, the step of a
    value p of the embedding is 1 + decay * p, and the step of a value p of a matrix is (1 + decay * p) / m_width. With
    `scale_decay`, the decay of matrices is multiplied by m_width. Vectors have no decay. The step of a frozen parameter
    is 0.
    """
    found = mup_step(Model(), **{"optim.scale_decay": scale_decay, "optim.weight_decay": 0.1})
    matrix = (1 + 0.1 * 2.0 * (4 if scale_decay else 1)) / 4
    values = {"matrix": matrix, "vector": 1.0, "frozen": 0.0}
    for name, label in LABELS.items():
        expected = 1 + 0.1 * (1.0 if name == "unembed" else 2.0) if label == "embedding" else values[label]
        np.testing.assert_allclose(found[name], [expected], rtol=1e-5, err_msg=name)


def test_against_plain_adamw():
    """With m_width=1 and only matrices, five steps of the optimizer equal optax's gradient clipping and AdamW."""
    params = {"w_in": jnp.linspace(-1, 1, 6).reshape(2, 3)}
    config = Config().replace({"optim.schedule": "constant", "optim.peak_lr": 1e-2})
    ours = make_optimizer(config, params)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, 0.9, 0.95, 1e-10, weight_decay=0.1))
    a, b = params, params
    sa, sb = ours.init(params), theirs.init(params)
    for i in range(5):
        grads = jax.tree.map(lambda p, i=i: jnp.sin(3 * p + i) * 5, a)
        ua, sa = ours.update(grads, sa, a)
        ub, sb = theirs.update(grads, sb, b)
        a, b = optax.apply_updates(a, ua), optax.apply_updates(b, ub)
    np.testing.assert_allclose(a["w_in"], b["w_in"], rtol=1e-6)


def test_no_clipping():
    params = {"w_in": jnp.ones(3)}
    clipped, free = (
        make_optimizer(Config().replace({"optim.clip": clip, "optim.eps": 1.0}), params) for clip in (1.0, None)
    )
    small, large = (tx.update({"w_in": jnp.full(3, 9.0)}, tx.init(params), params)[0] for tx in (clipped, free))
    assert (jnp.abs(large["w_in"]) > jnp.abs(small["w_in"])).all()


def train(config, params, state, count):
    tx = make_optimizer(config, params)
    state = tx.init(params) if state is None else state

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: ((p["w_in"] @ p["w_in"].T - 1) ** 2).sum() + (p["norm"]["scale"] ** 2).sum())(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "learning_rate")

    return jax.jit(lambda *carry: jax.lax.scan(step, carry, length=count))(params, state)


PARAMS = {"w_in": jnp.linspace(-1, 1, 6).reshape(2, 3), "norm": {"scale": jnp.ones(3)}}


def test_a_decay_may_branch_off_any_stable_checkpoint():
    stable = Config().replace({"train.steps": 10**6, "optim.warmup_tokens": 4096 * 5})
    branch = stable.replace({"train.steps": 30, "optim.decay_tokens": 4096 * 10})
    (whole, _), _ = train(branch, PARAMS, None, 30)
    (params, state), _ = train(stable, PARAMS, None, 20)
    (params, state), rates = train(branch, params, state, 10)
    for name, leaf in flat(params).items():
        # These are two compiled programs, so rounding may differ (with JAX 0.11.2, in the last bit).
        np.testing.assert_allclose(leaf, flat(whole)[name], rtol=1e-6, err_msg=name)
    assert int(optax.tree.get(state, "tokens")) == branch.total_tokens
    schedule = make_schedule(branch)  # the logged learning rate is the one that was used
    np.testing.assert_allclose(rates, schedule(jnp.arange(20, 30)), rtol=3e-7)


def test_the_optimizer_follows_the_tokens_of_another_batch():
    small, large = Config(), Config().replace({"data.B": 64})
    (params, state), _ = train(small, PARAMS, None, 20)
    (_, state), rates = train(large, params, state, 2)
    n = 20 * 4096 + 16384
    assert int(optax.tree.get(state, "tokens")) == n + 16384
    np.testing.assert_allclose(rates[1], min(0.02, 16 * n**-0.51), rtol=3e-7)
    tx = make_optimizer(small, PARAMS)
    _, state = tx.update(PARAMS, state, PARAMS, tokens=100)
    assert int(optax.tree.get(state, "tokens")) == n + 16384 + 100


@pytest.mark.parametrize("module", [optimizer, schedules])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
