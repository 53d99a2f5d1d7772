"""Sweeps: with muP, the activations and the best learning rate do not depend on the width; without muP they do.

The first tests use a small residual network, because it is fast. The last tests use the language model.
"""

import doctest
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stickjax import sweeps
from stickjax.config import Config
from stickjax.data.batches import train_loader
from stickjax.data.corpus import load_corpus
from stickjax.evaluation import plots
from stickjax.models.transformer import apply, init
from stickjax.sweeps import coordinate_check, fit_power_law, learning_rate_sweep, slopes
from stickjax.training import width as models
from stickjax.training.optimizer import make_optimizer
from stickjax.training.schedules import make_schedule
from stickjax.training.step import init_state, make_step
from stickjax.training.width import SMALL, at_width, final_loss, power_law_records, training, transformer

BASE, V, L = 32, 32, 1  # the width at which m_width is 1, vocabulary size, layers
WIDTHS = [64, 256]


def network(width, mup, learning_rate):
    """Return (parameters, optimizer, a function from parameters to (loss, activations)) of a small residual network.

    The network predicts a permutation of V tokens. It has an embedding, L residual layers and an output matrix. V and L
    are constants of this file. `mup`: whether the network is scaled by muP.
    """
    m_width = width / BASE if mup else 1.0
    changes = {"model.m_width": m_width, "optim.schedule": "constant", "optim.peak_lr": learning_rate}
    random = np.random.default_rng(0)
    normal = lambda shape, std: jnp.asarray(std * random.standard_normal(shape, np.float32))  # noqa: E731
    std = 0.1 / math.sqrt(m_width)
    params = {
        "embed": normal((V, width), 0.1),
        "unembed": normal((width, V), 0.1),
        "blocks": {
            "ffn": {
                "w_in": normal((L, width, width), std),
                "w_out": normal((L, width, width), std / math.sqrt(2 * L)),
            },
            "norm": {"scale": jnp.ones((L, width))},
        },
    }
    # The labels are smoothed, so that a too large learning rate increases the loss instead of fitting them better.
    target = 0.7 * random.permutation(np.eye(V, dtype=np.float32)) + 0.3 / V

    def forward(params):
        x = params["embed"] * 12
        activations = {"embedding": x}
        for i in range(L):
            ffn, scale = params["blocks"]["ffn"], params["blocks"]["norm"]["scale"][i]
            normed = scale[None] * x / jnp.sqrt((x**2).mean(-1, keepdims=True))
            branch = jax.nn.silu(normed @ ffn["w_in"][i]) @ ffn["w_out"][i]
            x = x + 0.3 * branch
            activations |= {f"branch {i}": branch, f"residual {i}": x}
        logits = x @ params["unembed"] / m_width
        loss = -(target * jax.nn.log_softmax(logits)).sum(-1).mean()
        return loss, activations | {"logits": logits}

    return params, make_optimizer(Config().replace(changes), params), forward


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Compile the programs of this file with few optimisations.

    Optimisation would take most of the time, and each program runs only for milliseconds.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def coordinates():
    return {mup: coordinate_check(WIDTHS, lambda width, mup=mup: network(width, mup, 0.005)) for mup in (True, False)}


def test_activations_keep_their_size_with_mup_only(coordinates):
    slope = slopes(coordinates[True])
    # Logits are sums of D products of independent numbers, divided by m_width. They start in proportion to width^-1/2
    # and become independent of the width during training.
    assert slopes(coordinates[True], step=0)["logits"] < slope.pop("logits") < 0.1
    assert all(abs(x) < 0.1 for x in slope.values()), slope
    assert max(slopes(coordinates[False]).values()) > 0.3


def test_records_of_the_coordinate_check(coordinates):
    records = coordinates[True]
    assert len(records) == len(WIDTHS) * 5 * (2 + 2 * L)
    assert set(records[0]) == {"width", "step", "name", "mean_abs"}
    assert {r["step"] for r in records} == set(range(5))
    # Before the training, the embedding is 12 * 0.1 * N(0, 1) at every width.
    first = [r["mean_abs"] for r in records if r["step"] == 0 and r["name"] == "embedding"]
    np.testing.assert_allclose(first, 1.2 * math.sqrt(2 / math.pi), rtol=0.05)


def test_slopes():
    records = [dict(width=w, step=s, name="x", mean_abs=3 * w**s) for w in (8, 16, 64) for s in (0, 1, 2)]
    assert slopes(records) == {"x": pytest.approx(2)}
    assert slopes(records, step=1) == {"x": pytest.approx(1)}
    with pytest.raises(ValueError, match="two widths"):
        slopes(records[:3])
    with pytest.raises(ValueError, match="'x' is zero or not finite at step 2"):
        slopes([*records, dict(width=8, step=2, name="x", mean_abs=math.nan)])


RATES = 2.0 ** np.arange(-11, 0)


@functools.cache
def losses(width, mup):
    """Return a dict from each learning rate in RATES to the loss after five steps of the small network.

    One vmap trains with all rates: each update is computed for learning rate 1 and multiplied by the rate.
    """
    params, optimizer, forward = network(width, mup, 1.0)

    def run(rate):
        def step(carry, _):
            params, state = carry
            grads, _ = jax.grad(forward, has_aux=True)(params)
            updates, state = optimizer.update(grads, state, params)
            return (jax.tree.map(lambda p, u: p + rate * u, params, updates), state), None

        (trained, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=5)
        return forward(trained)[0]

    return dict(zip(RATES, jax.jit(jax.vmap(run))(RATES), strict=True))


def test_the_best_learning_rate_stays_with_mup_only():
    records = learning_rate_sweep([BASE, 256], RATES, lambda width, rate, mup: losses(width, mup)[rate])
    assert set(records[0]) == {"width", "learning_rate", "loss", "mup"} and len(records) == 4 * len(RATES)
    best = {(r["mup"], r["width"]): r for r in sweeps.best_runs(records, "mup", "width")}
    assert best[True, BASE]["learning_rate"] == best[True, 256]["learning_rate"]
    assert best[True, 256]["loss"] < best[True, BASE]["loss"]  # wider is better
    assert best[False, BASE] == best[True, BASE] | dict(mup=False)  # the base width is the same model
    assert best[False, 256]["learning_rate"] <= best[False, BASE]["learning_rate"] / 2


def sweep(noise=0.0, **changes):
    """Return the records of an invented learning-rate sweep at four training lengths and three batch sizes.

    At batch size B, the best learning rate after T tokens is B * 4.6 * T^-0.51. If `noise` is above 0, the best rate is
    multiplied by a random factor. `changes` replace entries of the records.
    """
    random = np.random.default_rng(0)
    return [
        dict(tokens=tokens, batch_size=beta, learning_rate=rate, loss=2 + math.log(rate / best) ** 2, unused=None)
        | changes
        for tokens in (2e9, 8e9, 3.2e10, 1.28e11)
        for beta in (16, 64, 128)
        for best in [beta * 4.6 * tokens**-0.51 * math.exp(noise * random.normal())]
        for rate in best * 2.0 ** np.arange(-3, 4)
    ]


def test_fit_recovers_the_law_of_the_paper():
    law = fit_power_law(sweep())
    assert (law.a, law.b) == (pytest.approx(4.6, rel=1e-9), pytest.approx(-0.51, rel=1e-9))
    assert law.residuals.shape == (12,) and np.abs(law.residuals).max() < 1e-9


def test_fit_finds_minima_between_the_rates_of_a_coarse_sweep():
    best = lambda tokens: 4.6 * tokens**-0.51  # noqa: E731
    records = [
        dict(tokens=tokens, batch_size=1, learning_rate=rate, loss=math.log(rate / best(tokens)) ** 2)
        for tokens in (1e9, 3e9, 1e10)
        for rate in 2.0 ** np.arange(-22, -8)
    ]
    law = fit_power_law(records)
    assert (law.a, law.b) == (pytest.approx(4.6), pytest.approx(-0.51))
    assert [r["learning_rate"] for r in law.best] == pytest.approx([best(1e9), best(3e9), best(1e10)])


def test_fit_of_noisy_minima_and_diverged_runs():
    diverged = [dict(tokens=2e9, batch_size=16, learning_rate=9.0, loss=math.nan)]
    law = fit_power_law(sweep(noise=0.05) + diverged)
    assert law.b == pytest.approx(-0.51, abs=0.05) and 0.01 < law.residuals.std() < 0.1


@pytest.mark.parametrize("changes", [dict(tokens=1e9), dict(loss=math.inf)])
def test_fit_needs_two_numbers_of_tokens(changes):
    with pytest.raises(ValueError, match="two or more training lengths"):
        fit_power_law(sweep(**changes))


def test_plots(tmp_path, coordinates):
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    sweeps.plot_coordinate_check({"muP": coordinates[True], "without muP": coordinates[False]}, paths[0])
    run = lambda width, rate, mup: (math.log2(rate * (64 if mup else width)) ** 2 / 10 + 1) / width**0.1  # noqa: E731
    rates = [2.0**e for e in range(-12, -2)]
    diverging = lambda width, rate, mup: math.nan if rate > 0.1 else run(width, rate, mup)  # noqa: E731
    learning_rate_sweep(WIDTHS, rates, diverging, plot=paths[1])
    fit_power_law(sweep(noise=0.1), plot=paths[2])
    config = Config().replace({"train.steps": 2000, "optim.warmup_tokens": 4096 * 50, "optim.decay_tokens": 4096 * 400})
    names = ["power", "wsd", "cosine", "constant"]
    schedules = {name: make_schedule(config.replace({"optim.schedule": name})) for name in names}
    for log, path in ((False, paths[3]), (True, paths[4])):
        plots.plot_schedule(schedules, path, tokens_per_step=4096, total_tokens=config.total_tokens, log=log)
    make = lambda width: (jnp.ones(width), optax.sgd(0.1), lambda p: (p.sum(), {"sum": p.sum()[None]}))  # noqa: E731
    coordinate_check(WIDTHS, make, plot=paths[5])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


# The model itself

TINY = SMALL.replace({"model.L": 1, "data.T": 32, "data.B": 4, "train.steps": 4, "model.implementation": "reference"})
EXPERTS = {
    "model.experts.E": 4,
    "model.experts.k": 2,
    "model.F": 64,
    "model.experts.z_weight": 0.001,
    "model.experts.bias_rate": 0.01,
}


def test_at_width_differs_by_mup_alone():
    config = Config().replace(
        {"model.m_width": 0.5, "model.logits_scaling": 2.0, "model.experts.E": 4, "model.experts.k": 2}
    )
    assert at_width(config, 128, mup=True) == config
    wide, narrow = at_width(config, 512, mup=True), at_width(config, 64, mup=False)
    assert wide.diff(at_width(config, 512, mup=False)) == [
        "model.m_width: 2.0 -> 1.0", "model.logits_scaling: 8.0 -> 4.0"
    ]  # fmt: skip
    m = narrow.model
    assert (m.D, m.N, m.K, m.H, m.F, m.m_width, m.scale) == (64, 2, 2, 32, 192, 1.0, config.model.scale)
    assert at_width(config, 512, mup=True, base=128).model.m_width == 4
    assert wide.optim == config.optim


def test_activations_are_those_of_the_model():
    config = TINY.replace({"model.L": 2, "data.B": 2} | EXPERTS)
    batch = next(train_loader(load_corpus(config.data)[0], config.data))
    model = init(config.model, jax.random.key(0, impl="rbg"))
    seen = jax.jit(models.activations)(model, batch)
    parts = [f"{part} {i}" for i in range(2) for part in ("attention", "ffn", "residual")]
    assert list(seen) == sorted(["embedding", *parts, "logits"])  # jit sorts a dictionary
    logits = jnp.einsum("BTD,VD->BTV", model.norm(seen["residual 1"]), model.embed[...])
    np.testing.assert_allclose(logits, apply(model, batch).logits, rtol=1e-4, atol=1e-4)
    streams = [seen[name] for name in ("embedding", "residual 0", "residual 1")]
    for i in range(2):
        branches = config.model.m_res * (seen[f"attention {i}"] + seen[f"ffn {i}"])
        np.testing.assert_allclose(streams[i] + branches, streams[i + 1], rtol=1e-4, atol=1e-4)


# `changes` is empty for the dense model. The tests above already check a dense network, so this case is left out of
# `make test`.
EXHAUSTIVE = {"test_the_model_keeps_its_activations_with_mup_only": lambda changes: not changes}


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
def test_the_model_keeps_its_activations_with_mup_only(changes):
    config = TINY.replace(changes)
    check = lambda width, mup: coordinate_check([width], lambda width: transformer(config, width, mup))  # noqa: E731
    base = check(64, True)  # the same model without muP
    slope = slopes(base + check(256, True))
    assert slope.pop("logits") < 0.1
    assert all(abs(x) < 0.1 for x in slope.values()), slope
    slope = slopes(base + check(256, False))
    assert min(slope["attention 0"], slope["ffn 0"], slope["logits"]) > 0.3, slope


def test_a_training_of_any_rate_is_that_of_the_step():
    config = at_width(TINY, 16, mup=True).replace(EXPERTS | {"optim.schedule": "constant", "optim.warmup_tokens": 256})
    config = config.replace({"optim.peak_lr": 0.03})
    state, expected = jax.jit(lambda: init_state(config, jax.random.key(0, impl="rbg")))(), []
    step, loader = jax.jit(make_step(config)), train_loader(load_corpus(config.data)[0], config.data)
    for _ in range(4):
        state, metrics = step(state, next(loader))
        expected.append(float(metrics["loss"]))
    run = training(config.replace({"optim.peak_lr": 1.0, "optim.schedule": "power"}))
    np.testing.assert_allclose(run(0.03), expected, rtol=1e-5)
    assert run(0.03)[-1] != run(0.001)[-1]


def test_sweeps_of_the_model():
    run = lambda width, rate, mup: final_loss(TINY, width, rate, mup)  # noqa: E731
    records = learning_rate_sweep([16], [0.001, 0.01], run, mup=[True])
    assert len(records) == 2 and all(0 < r["loss"] < 10 for r in records)
    narrow = at_width(TINY, 16, mup=True)
    records = power_law_records(narrow, [0.001, 0.01], tokens=[512, 128])
    assert [(r["tokens"], r["batch_size"], r["learning_rate"]) for r in records] == [
        (n, 128 / 4096, rate) for rate in (0.001, 0.01) for n in (128, 512)
    ]
    losses = training(narrow)(0.01)
    assert len(losses) == 4 and [r["loss"] for r in records[2:]] == [losses[0], losses[3]]


@pytest.fixture
def toy(monkeypatch):
    """Make the command line of `stickjax.sweeps` use the small network instead of the language model."""
    monkeypatch.setattr(models, "transformer", lambda config, width, mup: network(width, mup, 0.005))
    monkeypatch.setattr(models, "final_loss", lambda config, width, rate, mup: losses(width, mup)[rate])
    loss = lambda n, rate: math.log(rate / n**-0.5) ** 2  # noqa: E731
    records = lambda config, rates, *, tokens, batch_sizes: [  # noqa: E731
        dict(tokens=n, batch_size=0.125, learning_rate=rate, loss=loss(n, rate)) for n in tokens for rate in rates
    ]
    monkeypatch.setattr(models, "power_law_records", records)


@pytest.mark.parametrize("command", ["coordinate", "learning-rate", "power-law"])
def test_command_line(command, toy, tmp_path, capsys):
    rates = [f"--rates={','.join(map(str, RATES))}"]
    assert sweeps.main([command, "--out", str(tmp_path), "--widths=32,256", "--train.steps=2", *rates]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/{command}.png" in out
    assert {"coordinate": "residual 0", "learning-rate": "*", "power-law": "T^-0.5"}[command] in out
    assert (tmp_path / f"{command}.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / f"{command}.json").read_text())
    assert result["config"]["train"]["steps"] == 2 and result["records"]
    # With too few rates, the best rate is at the edge of the range, and the table says so.
    if command != "coordinate":
        sweeps.main([command, "--out", str(tmp_path), "--widths=32", "--rates", str(RATES[0])])
        assert "wider" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["coordinate", "--widths=48,x"], "--widths=48,x: expected positive whole numbers separated by commas"),
        (["power-law", "--rates=0.1,-1"], "--rates=0.1,-1: expected positive numbers separated by commas"),
        (["power-law", "--batch-sizes=4,0"], "--batch-sizes=4,0: expected positive whole numbers separated by commas"),
        (["power-law", "--batch-sizes=4096"], "is less than one step of B=4096 x T="),
        (["coordinate", "--widths=33"], "N=4, K=4 and F=128 are multiplied by width / D = 33/"),
        (["learning-rate", "--model.V=100", "--widths=16"], "V=100 is smaller than the 257 ids of tokenizer='byte'"),
        (["coordinate", "--model.WIDTH=3"], "unknown config key 'model.WIDTH'"),
        (["coordinate", "--widths=64000000"], "does NOT fit"),
        (["coordinate", "--config=nowhere.py"], "nowhere.py does not exist; a config is a name ("),
    ],
)
def test_command_line_says_what_is_wrong(words, message, tmp_path, capsys):
    assert sweeps.main([*words, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_power_law_needs_whole_steps():
    with pytest.raises(ValueError, match="tokens=100 is less than one step of B=4 x T=32 tokens"):
        power_law_records(TINY, [0.01], tokens=[100, 1000])


@pytest.mark.slow
def test_commands_on_the_model(tmp_path):
    tiny = ["--model.L=1", "--train.steps=2", "--data.T=16", "--out", str(tmp_path), "--rates=0.001,0.004,0.016"]
    tiny += ["--model.D=16", "--model.H=4", "--model.F=16"]
    own = dict(coordinate="--widths=16,32", **{"learning-rate": "--widths=16", "power-law": "--batch-sizes=4,8"})
    for command, word in own.items():
        assert sweeps.main([command, word, *tiny]) == 0
    assert len(list(tmp_path.iterdir())) == 6
    records = json.loads((tmp_path / "power-law.json").read_text())["records"]
    betas = {B * 16 / 4096 for B in (4, 8)}  # sequences of 4096 tokens
    assert {r["batch_size"] for r in records} == betas and len(records) == 2 * 3 * 4  # batch sizes, rates, lengths


def test_examples():
    result = doctest.testmod(sweeps)
    assert result.attempted and not result.failed
