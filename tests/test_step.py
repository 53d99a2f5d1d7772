"""The training step: microbatches give the gradient of the whole batch, and a non-finite loss changes nothing."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GRADIENT, assert_close, assert_same_state

from stickjax.config import Config
from stickjax.models.decoder import Decoder
from stickjax.models.families import family_of
from stickjax.storage.checkpoints import Checkpoints
from stickjax.train import fit, main
from stickjax.training import loop
from stickjax.training import step as step_module
from stickjax.training.progress import Progress
from stickjax.training.step import init_state, make_step, tokens_of

DENSE = Config().replace(
    {
        "model.V": 257, "model.D": 16, "model.L": 2, "model.N": 2, "model.K": 1, "model.H": 8, "model.F": 16,
        "model.attention": "softmax", "data.T": 32, "data.B": 4, "train.log_every": 1, "train.checkpoint_every": 5,
        "optim.peak_lr": 0.01, "optim.warmup_tokens": 128,
    }
)  # fmt: skip
EXPERTS = DENSE.replace(
    {
        "model.L": 1,
        "model.experts.E": 4,
        "model.experts.k": 2,
        "model.experts.bias_rate": 0.01,
        "model.experts.z_weight": 0.001,
    }
)


def test_accumulation_is_the_whole_batch():
    """Two microbatches give the loss and the gradient of the whole batch, although their numbers of targets differ."""
    state = init_state(DENSE, jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 257, (4, 32)), "targets": rng.integers(0, 257, (4, 32)),
        "segment_ids": np.zeros((4, 32), np.int32),
        "loss_mask": rng.random((4, 32)) < np.array([[0.9], [0.1], [0.5], [0.3]]),
    }  # fmt: skip
    batch = {k: jnp.asarray(v) for k, v in batch.items()}
    parts = DENSE.replace({"train.accumulate": 2})
    (a, metrics_a), (b, metrics_b) = (jax.jit(make_step(c))(state, batch) for c in (parts, DENSE))
    assert abs(metrics_a["loss"] - metrics_b["loss"]) < 1e-5
    for x, y in zip(jax.tree.leaves(a.opt_state), jax.tree.leaves(b.opt_state), strict=True):
        assert_close(x, y, GRADIENT["float32"] * 10)  # second moments are squares: twice the error of a gradient


def test_the_loss_masks_the_seams():
    state = init_state(EXPERTS, jax.random.key(0))
    tokens = jnp.zeros((2, 32), jnp.int32)
    batch = {
        "tokens": tokens,
        "targets": tokens,
        "segment_ids": tokens,
        "loss_mask": jnp.arange(32)[None] < jnp.array([[5], [32]]),
    }
    loss = jax.jit(lambda batch: family_of(EXPERTS.model).loss(state.params, batch, None)[0])
    a = loss(batch)
    assert loss(batch | {"targets": tokens.at[0, 5:].set(99)}) == a
    assert loss(batch | {"targets": tokens.at[0, 4:].set(99)}) != a


@pytest.fixture
def poison(monkeypatch):
    """Return a list with one bool. While it is True, the loss of every new batch is NaN."""
    poison, loss_of, shard_batch = [True], Decoder.loss, loop.shard_batch

    def poisoned_loss(self, params, batch, key):
        loss, metrics = loss_of(self, params, batch, key)
        return loss * jnp.where(batch["poison"][0], jnp.nan, 1.0), metrics

    monkeypatch.setattr(Decoder, "loss", poisoned_loss)
    monkeypatch.setattr(loop, "shard_batch", lambda *a: shard_batch(*a) | {"poison": np.array(poison)})
    return poison


def test_steps_that_are_not_finite_are_skipped(tmp_path, poison, capsys):
    """A step with a non-finite loss or gradient is counted and changes neither parameters nor optimizer state.

    After max_bad_steps such steps in a row, the run stops with an error and keeps its last checkpoint.
    """
    config = EXPERTS.replace({"train.max_bad_steps": 3, "train.steps": 6})
    state = init_state(config, jax.random.key(0))
    tokens = jnp.zeros((4, 32), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": tokens, "loss_mask": tokens == 0}
    step = jax.jit(make_step(config))
    after, metrics = step(state, batch | {"poison": jnp.array([True])})
    assert int(after.bad_steps) == 1 and int(after.step) == 1 and not np.isfinite(metrics["grad_norm"])
    assert_same_state(after._replace(bad_steps=state.bad_steps, step=state.step), state)
    good, _ = step(after, batch | {"poison": jnp.array([False])})
    assert int(good.bad_steps) == 0 and tokens_of(good) == 128  # the tokens of the skipped step do not count

    run = tmp_path / "run"
    poison[0] = False
    fit(config, str(run), quiet=True)
    poison[0] = True
    (tmp_path / "config.json").write_text(config.replace({"train.steps": 24}).to_json())
    assert main([str(tmp_path / "config.json"), "--run", str(run)]) == 1
    said = "step 9: the loss or the gradient was not finite in 3 steps in a row; the last good checkpoint is step 6"
    assert said in capsys.readouterr().err
    assert Checkpoints(run).steps()[-1] == 6


def test_a_run_without_a_finite_step_fails(tmp_path, poison, capsys):
    (tmp_path / "config.json").write_text(DENSE.replace({"train.steps": 3}).to_json())
    assert main([str(tmp_path / "config.json"), "--run", str(tmp_path / "run")]) == 1
    assert (
        capsys.readouterr().err == "error: no step from 1 to 3 had a finite loss and gradient; there is no checkpoint\n"
    )
    assert not Checkpoints(tmp_path / "run").steps()


@pytest.mark.parametrize("end", ["finished", "stopped"])
def test_what_was_learnt_before_bad_steps_is_saved(tmp_path, poison, monkeypatch, capsys, end):
    """If the last steps of a run are skipped, the run still saves the parameters of its last good step.

    A step is skipped if its loss or gradient is not finite. `end`: the run finishes, or a signal stops it.
    """
    poison[0], update = False, Progress.update

    def watched(self, row):
        update(self, row)
        poison[0] = row["step"] >= 2  # affects the batch after the next, which is already prepared
        if end == "stopped" and row["step"] == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Progress, "update", watched)
    config, run = DENSE.replace({"train.steps": 6 if end == "finished" else 9}), tmp_path / "run"
    result = fit(config.replace({"train.checkpoint_every": 100}), str(run))
    step = 6 if end == "finished" else 5
    out = capsys.readouterr().out
    assert f"the last {step - 3} steps were skipped, because their loss or gradient was not finite" in out
    assert Checkpoints(run).steps() == [step] and result.stopped_by == (0 if end == "finished" else signal.SIGTERM)
    assert int(result.state.bad_steps) == step - 3 and tokens_of(result.state) == 3 * 128


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """If the loss is finite but the new parameters are not, the run stops with an error and saves nothing."""
    spoil = lambda params, updates: jax.tree.map(lambda x: x * jnp.inf, params)  # noqa: E731
    monkeypatch.setattr(step_module.optax, "apply_updates", spoil)
    with pytest.raises(
        FloatingPointError, match="step 1: the loss was finite, but the new parameters are not; there is no"
    ):
        fit(DENSE.replace({"train.steps": 1}), str(tmp_path / "run"), quiet=True)
    assert not Checkpoints(tmp_path / "run").steps()
