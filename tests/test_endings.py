"""Test how a training begins and ends: its messages, its checkpoints, and its exit code."""

import io
import os
import signal
import sys

import jax
import pytest
from conftest import assert_same_state, without_check

from stickjax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from stickjax.storage.checkpoints import Checkpoints
from stickjax.train import fit, main
from stickjax.training import loop
from stickjax.training.metrics import read_metrics
from stickjax.training.progress import Progress
from stickjax.training.step import init_state

CONFIG = Config(
    ModelConfig(V=257, D=16, L=1, N=2, K=1, H=8, F=16),
    DataConfig(source="text", path=__file__, T=16, B=4),
    OptimConfig(peak_lr=0.01),
    TrainConfig(steps=8, log_every=1, checkpoint_every=1000),
)


@pytest.fixture
def words(tmp_path):
    """Return the command-line arguments that train CONFIG in the run folder `run`."""
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    return [str(tmp_path / "config.json"), "--run", str(tmp_path / "run")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit(CONFIG, str(tmp_path_factory.mktemp("whole") / "run"), quiet=True)


@pytest.fixture
def at_step(monkeypatch):
    """Return a function (step, action) that makes the training call `action` when it prints step `step`.

    If the action requests a stop, the training ends one step later.
    """
    update = Progress.update

    def register(step, action):
        def watched(self, row):
            update(self, row)
            if row["step"] == step:
                action()

        monkeypatch.setattr(Progress, "update", watched)

    return register


@pytest.fixture
def in_a_terminal():
    """Set SIGHUP to its default during the test, as in a terminal.

    Under nohup, the tests would inherit a SIGHUP that is ignored.
    """
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


@pytest.mark.usefixtures("in_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_exit_code_is_its_own(words, uninterrupted, at_step, capsys, tmp_path, number):
    before = signal.getsignal(number)
    at_step(4, lambda: signal.raise_signal(number))
    assert main(words) == 128 + number
    assert "stopped at step 5, saved at 5; run the same command again to go on" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "run").steps() == [5] and signal.getsignal(number) == before
    if number == signal.SIGHUP:
        assert main(words) == 0
        restored = Checkpoints(tmp_path / "run").restore(jax.eval_shape(lambda: init_state(CONFIG, jax.random.key(0))))
        assert_same_state(restored.state, uninterrupted.state)


def test_a_terminal_that_is_left_on_purpose_stops_nothing(words, at_step, tmp_path):
    """A training that was started with nohup ignores SIGHUP and trains to its end."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(4, lambda: signal.raise_signal(signal.SIGHUP))
        assert main(words) == 0
    finally:
        signal.signal(signal.SIGHUP, old)
    assert Checkpoints(tmp_path / "run").steps() == [8]


def test_a_closed_pipe_saves_and_stops(words, at_step, tmp_path, monkeypatch, capfd):
    """If the reader of the output closes the pipe, the training saves a checkpoint and ends without an error message.

    This happens in `train | head`, for example.
    """
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    at_step(3, lambda: os.close(reader))
    assert main(words) == 128 + signal.SIGPIPE
    sys.stdout.close()  # as Python does at its end
    assert Checkpoints(tmp_path / "run").steps() == [5]  # nobody could read the line of step 4
    assert capfd.readouterr().err == ""


def test_a_dead_terminal_is_no_error(words, tmp_path, monkeypatch):
    class Dead(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

        flush = write

        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Dead())
    monkeypatch.setattr(Dead, "flush", lambda self: None)
    assert main(words) == 0
    assert Checkpoints(tmp_path / "run").steps() == [8]


def test_a_stop_before_the_first_step_has_nothing_to_save(words, monkeypatch, tmp_path, capsys):
    compiled = loop.check_program
    monkeypatch.setattr(loop, "check_program", lambda *a: (compiled(*a), signal.raise_signal(signal.SIGTERM)))
    monkeypatch.setattr(loop, "_new", without_check(loop._new, monkeypatch))
    assert main(words) == 143
    assert "stopped at step 0, with nothing to save; run the same command again" in capsys.readouterr().out


def test_no_rate_and_no_time_left_before_two_steps_are_measured(words, capsys, tmp_path):
    def lines():
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]

    assert main([*words, "--train.steps=3"]) == 0
    first, second, third, _ = lines()
    assert first.endswith("- tokens/s  - left") and second.endswith(" s left") and third.endswith(" 0 s left")
    assert main([*words, "--train.steps=5"]) == 0
    fourth, fifth, _ = lines()
    assert fourth.endswith("- tokens/s  - left") and fifth.endswith(" 0 s left")
    assert main([*words, "--train.steps=6"]) == 0
    (sixth,) = lines()
    assert sixth.endswith("- tokens/s  - left")
    assert ["tokens_per_second" in row for row in read_metrics(tmp_path / "run")] == [0, 1, 1, 0, 1, 0]


def test_what_takes_long_is_said_before_it_begins(words, capsys):
    assert main([*words, "--train.steps=2"]) == 0
    out = capsys.readouterr().out
    places = [out.index(said) for said in ("parameters", "making the parameters", "compiling the step", "step 1/2")]
    assert places == sorted(places)


def test_a_finished_run_says_so_and_nothing_else(words, capsys, tmp_path):
    assert main([*words, "--train.steps=2"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != "lock"}
    capsys.readouterr()
    assert main([*words, "--train.steps=2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'} is finished: it is at step 2 of 2\n"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_branch_without_steps_is_refused(words, capsys, tmp_path):
    """A branch gives an error if its checkpoint has already reached train.steps, because no step is left to train.

    No run folder is made.
    """
    assert main([*words, "--train.steps=2"]) == 0
    assert main([*words[:1], "--from", words[2], "--run", str(tmp_path / "branch"), "--train.steps=2"]) == 1
    assert "run@2: train.steps=2 must be more than 2, the step of the checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "branch").exists()


def test_a_result_is_shown_in_one_line(uninterrupted):
    text = repr(uninterrupted)
    assert text.startswith("Result(step=8, finished=True, tokens_per_second=") and len(text) < 160
    assert uninterrupted.stopped_by == 0


def test_nothing_to_train_is_refused(words, capsys, tmp_path):
    assert main([*words, "--optim.trainable=!*"]) == 1
    assert capsys.readouterr().err == "error: optim.trainable='!*' freezes every parameter: nothing would be trained\n"
    assert not (tmp_path / "run").exists()
