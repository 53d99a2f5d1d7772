"""The pure step: microbatches are the batch, seams cost nothing, and a step that is not finite changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import GRADIENT, assert_close, assert_same_state

from stickjax import step as step_module
from stickjax import train
from stickjax.checkpoint import Checkpoints
from stickjax.config import Config
from stickjax.step import init_state, loss_and_metrics, make_step
from stickjax.train import fit, main

DENSE = Config().replace(
    {
        "model.V": 257, "model.D": 16, "model.L": 2, "model.N": 2, "model.K": 1, "model.H": 8, "model.F": 16,
        "data.T": 32, "data.B": 4, "train.log_every": 1, "train.checkpoint_every": 5,
        "optim.peak_lr": 0.01, "optim.warmup_tokens": 128,
    }
)  # fmt: skip
EXPERTS = DENSE.replace({"model.L": 1, "model.E": 4, "model.k": 2, "model.bias_rate": 0.01, "model.z_weight": 0.001})


def test_accumulation_is_the_whole_batch():
    """The gradient of two microbatches is that of their union, seams and all."""
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
    loss = jax.jit(lambda batch: loss_and_metrics(EXPERTS, state.params, batch, None)[0])
    a = loss(batch)
    assert loss(batch | {"targets": tokens.at[0, 5:].set(99)}) == a
    assert loss(batch | {"targets": tokens.at[0, 4:].set(99)}) != a


def test_steps_that_are_not_finite_are_skipped(tmp_path, monkeypatch, capsys):
    """Skipped and counted; after max_bad_steps in a row the run stops and keeps its last good checkpoint."""
    poison, loss_of, jit_of = [True], step_module.loss_and_metrics, step_module.jit_step

    def poisoned_loss(config, params, batch, key):
        loss, metrics = loss_of(config, params, batch, key)
        return loss * jnp.where(batch["poison"][0], jnp.nan, 1.0), metrics

    def poisoned_step(*arguments):
        step = jit_of(*arguments)
        return lambda state, batch: step(state, batch | {"poison": jnp.asarray(poison)})

    monkeypatch.setattr(step_module, "loss_and_metrics", poisoned_loss)
    monkeypatch.setattr(train, "jit_step", poisoned_step)
    config = EXPERTS.replace({"train.max_bad_steps": 3, "train.steps": 6})
    state = init_state(config, jax.random.key(0))
    tokens = jnp.zeros((4, 32), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "segment_ids": tokens, "loss_mask": tokens == 0}
    step = poisoned_step(config, None, state)
    after, metrics = step(jax.tree.map(jnp.copy, state), batch)  # a step is given its state to overwrite
    assert int(after.bad_steps) == 1 and int(after.step) == 1 and not np.isfinite(metrics["grad_norm"])
    assert_same_state(after._replace(bad_steps=state.bad_steps, step=state.step), state)
    poison[0] = False
    good, _ = step(after, batch)
    assert int(good.bad_steps) == 0

    run = tmp_path / "run"
    fit(config, str(run), quiet=True)
    poison[0] = True
    (tmp_path / "config.json").write_text(config.replace({"train.steps": 24}).to_json())
    assert main([str(tmp_path / "config.json"), "--run", str(run)]) == 1
    assert "step 9: 3 steps in a row were not finite; the last good checkpoint is step 6" in capsys.readouterr().err
    assert Checkpoints(run).steps()[-1] == 6
