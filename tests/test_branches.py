"""A branch continues a checkpoint of another run with another schedule or batch size."""

import jax
import numpy as np
import pytest

from stickjax.config import Config
from stickjax.storage.checkpoints import Checkpoints
from stickjax.train import fit
from stickjax.training.metrics import read_metrics
from stickjax.training.step import init_state

PLAIN = Config().replace(
    {
        "model.V": 257, "model.D": 16, "model.L": 1, "model.N": 2, "model.K": 1, "model.H": 8, "model.F": 16,
        "model.attention": "softmax", "data.T": 32, "data.B": 4, "train.steps": 8, "train.log_every": 1,
        "train.checkpoint_every": 8, "optim.schedule": "wsd", "optim.peak_lr": 0.002,
    }
)  # fmt: skip
# `make test` checks two branches: one with a larger batch, and one with a smaller batch of longer sequences.
EXHAUSTIVE = {
    "test_a_branch_decays_over_its_own_tokens_whatever_their_batch": lambda B, T: (B, T) not in ((8, 32), (2, 64))
}


def rows(run) -> list[dict]:
    """Return the metrics of a run as a list of rows, without `tokens_per_second`, which differs between equal runs."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(run)]


def test_a_branch_with_a_decay_is_the_run_that_had_planned_it(tmp_path):
    """A branch that adds a decay to a checkpoint equals a run that planned this decay from its beginning.

    The Power schedule makes this possible: until the decay, it does not depend on the length of the run.
    """
    power = PLAIN.replace({"optim.schedule": "power", "optim.peak_lr": 0.01, "optim.warmup_tokens": 128})
    fit(power.replace({"train.steps": 11, "train.checkpoint_every": 5}), str(tmp_path / "whole"), quiet=True)
    decay = power.replace({"train.steps": 15, "optim.decay_tokens": 5 * 128})
    fit(decay, str(tmp_path / "branch"), branch=f"{tmp_path / 'whole'}@10", quiet=True)
    fit(decay, str(tmp_path / "planned"), quiet=True)
    # These are two programs, one with the decay from the beginning: they are equal up to rounding, not bitwise.
    planned = [row for row in rows(tmp_path / "planned") if row["step"] > 10]
    for row, wanted in zip(rows(tmp_path / "branch"), planned, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)
    assert rows(tmp_path / "branch")[-1]["learning_rate"] < rows(tmp_path / "whole")[9]["learning_rate"] / 2


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """Train four steps of warmup, then four at a constant learning rate, of 128 tokens each. Return the run folder."""
    run = tmp_path_factory.mktemp("stable") / "run"
    fit(PLAIN.replace({"optim.warmup_tokens": 512}), str(run), quiet=True)
    return run


@pytest.mark.parametrize(("B", "T"), [(4, 32), (8, 32), (2, 32), (2, 64), (1, 32)])
def test_a_branch_decays_over_its_own_tokens_whatever_their_batch(stable, tmp_path, B, T):
    """A branch with another batch size decays over exactly the tokens on which it is trained.

    The schedule adds up the tokens of all steps. For B=1 and T=32, there are 1024 tokens of the old run and 8 * 32
    tokens of the branch. The product steps * B * T = 16 * 32 = 512 would be wrong.
    """
    changes = {"data.B": B, "data.T": T, "train.steps": 16, "optim.warmup_tokens": 512, "optim.decay_tokens": 8 * B * T}
    fit(PLAIN.replace(changes), str(tmp_path / "run"), branch=f"{stable}@8", quiet=True)
    found = rows(tmp_path / "run")
    assert [row["tokens"] for row in found] == [1024 + i * B * T for i in range(1, 9)]
    left = 1 - np.arange(8) / 8
    expected = 0.002 * np.expm1(left) / np.expm1(1)
    np.testing.assert_allclose([row["learning_rate"] for row in found], expected, rtol=1e-5)
    assert expected[-1] == pytest.approx(0.000155, rel=1e-3)
    restored = Checkpoints(tmp_path / "run").restore(jax.eval_shape(lambda: init_state(PLAIN, jax.random.key(0))))
    assert restored.extra["tokens"] == 1024 + 8 * B * T
    if T == 32:  # after the sequences already used: 32 before the branch, 8 * B in it
        assert restored.extra["data"]["next_index"] == 32 // B + 8


def test_a_branch_of_another_batch_follows_the_cosine_to_its_end(stable, tmp_path):
    """A branch with another batch size follows the cosine schedule to its end.

    The whole run has 512 tokens of warmup and then 1024 tokens of the cosine. The branch begins after 1024 tokens, so
    half of the cosine is left.
    """
    changes = {"data.B": 2, "train.steps": 16, "optim.warmup_tokens": 512, "optim.schedule": "cosine"}
    fit(PLAIN.replace(changes), str(tmp_path / "run"), branch=str(stable), quiet=True)
    expected = 0.002 * np.sin(np.pi / 2 * (0.5 - np.arange(8) / 16)) ** 2
    np.testing.assert_allclose([row["learning_rate"] for row in rows(tmp_path / "run")], expected, rtol=1e-5)


def test_a_branch_too_short_for_its_decay_is_refused(stable, tmp_path):
    changes = {"data.B": 1, "train.steps": 16, "optim.warmup_tokens": 1000, "optim.decay_tokens": 500}
    with pytest.raises(ValueError, match=r"exceed the run of 1024 \+ \(steps - 8\) \* B \* T = 1280 tokens"):
        fit(PLAIN.replace(changes), str(tmp_path / "run"), branch=str(stable), quiet=True)
    with pytest.raises(ValueError, match=r"warmup_tokens=1000 and .* exceed the run of steps \* B \* T = 512 tokens"):
        fit(PLAIN.replace(changes | {"optim.decay_tokens": 0}), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()
