"""Sweeps on a small residual network: muP keeps activations and the best learning rate, its absence does not."""

import doctest
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stickjax import sweeps
from stickjax.config import Config
from stickjax.optim import make_optimizer, make_schedule
from stickjax.sweeps import coordinate_check, fit_power_law, learning_rate_sweep, slopes

BASE, V, L = 32, 32, 1  # width where m_width is 1, vocabulary, layers
WIDTHS = [64, 256]


def network(width, mup, learning_rate):
    """Predict a permutation of V tokens; an embedding, L residual layers and an output matrix."""
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
    # Smoothed, so that too large a learning rate is punished instead of fitting the labels all the better.
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


@pytest.fixture(scope="module")
def coordinates():
    return {mup: coordinate_check(WIDTHS, lambda width, mup=mup: network(width, mup, 0.005)) for mup in (True, False)}


def test_activations_keep_their_size_with_mup_only(coordinates):
    slope = slopes(coordinates[True])
    # Sums of D products of independent numbers over m_width: logits start at width^-1/2 and join as they learn.
    assert slopes(coordinates[True], step=0)["logits"] < slope.pop("logits") < 0.1
    assert all(abs(x) < 0.1 for x in slope.values()), slope
    assert max(slopes(coordinates[False]).values()) > 0.3


def test_records_of_the_coordinate_check(coordinates):
    records = coordinates[True]
    assert len(records) == len(WIDTHS) * 5 * (2 + 2 * L)
    assert set(records[0]) == {"width", "step", "name", "mean_abs"}
    assert {r["step"] for r in records} == set(range(5))
    # Nothing has been learned yet: the embedding is 12 * 0.1 * N(0, 1) at every width.
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
    """The loss after a few steps for all RATES at once: the update of a rate of one, times each rate."""
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
    """Losses with a minimum exactly on the law gamma = 4.6 T^-0.51, at three batch sizes."""
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


def test_fit_of_noisy_minima_and_diverged_runs():
    diverged = [dict(tokens=2e9, batch_size=16, learning_rate=9.0, loss=math.nan)]
    law = fit_power_law(sweep(noise=0.05) + diverged)
    assert law.b == pytest.approx(-0.51, abs=0.05) and 0.01 < law.residuals.std() < 0.1


@pytest.mark.parametrize("changes", [dict(tokens=1e9), dict(loss=math.inf)])
def test_fit_needs_two_numbers_of_tokens(changes):
    with pytest.raises(ValueError, match="two numbers of tokens"):
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
        sweeps.plot_schedule(schedules, path, tokens_per_step=4096, total_tokens=config.total_tokens, log=log)
    make = lambda width: (jnp.ones(width), optax.sgd(0.1), lambda p: (p.sum(), {"sum": p.sum()[None]}))  # noqa: E731
    coordinate_check(WIDTHS, make, plot=paths[5])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_examples():
    result = doctest.testmod(sweeps)
    assert result.attempted and not result.failed
