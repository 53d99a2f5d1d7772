"""Trackers of experiments get every row of metrics. Tests of a tracker's own files need its package."""

import contextlib
import math
import sys

import pytest

from stickjax import Config
from stickjax.train import fit, main
from stickjax.training.metrics import read_metrics
from stickjax.training.trackers import tracker

TINY = Config().replace(
    {
        "model.D": 8, "model.L": 1, "model.N": 2, "model.K": 1, "model.H": 4, "model.F": 16, "optim.warmup_tokens": 0,
        "data.source": "recall", "data.examples": 100, "data.T": 16, "data.B": 2, "train.steps": 2,
        "train.log_every": 1,
    }
)  # fmt: skip
ROWS = [{"step": 3, "tokens": 96, "loss": 2.5}, {"step": 6, "tokens": 192, "loss": math.nan, "heldout_loss": 2.25}]
FAKE = """
calls = []
def init(**options): calls.append(("init", options))
def log(row, step): calls.append(("log", row, step))
def finish(): calls.append(("finish",))
"""


@contextlib.contextmanager
def package(name: str, folder, monkeypatch):
    """Replace the package of the tracker `name` by a fake that records its calls."""
    (folder / f"{name}.py").write_text(FAKE)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.delitem(sys.modules, name, raising=False)
        yield
        sys.modules.pop(name, None)


def test_every_row_is_logged(tmp_path, monkeypatch):
    with package("trackio", tmp_path, monkeypatch):
        fit(TINY.replace({"train.track": "trackio"}), str(tmp_path / "mine"), quiet=True)
        calls = sys.modules["trackio"].calls
    first, *logged, last = calls
    assert (first[0], first[1]["project"], first[1]["name"], last) == ("init", "stickjax", "mine", ("finish",))
    assert first[1]["config"]["train"]["track"] == "trackio"
    assert [{"step": step} | row for _, row, step in logged] == read_metrics(tmp_path / "mine")


def test_an_error_closes_the_tracker(tmp_path, monkeypatch):
    with package("wandb", tmp_path, monkeypatch):
        with pytest.raises(FloatingPointError), tracker(TINY.replace({"train.track": "wandb"}), "run"):
            raise FloatingPointError
        assert sys.modules["wandb"].calls[-1] == ("finish",)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    words = [str(tmp_path / "tiny.json"), "--run", str(tmp_path / "run")]
    assert main([*words, "--train.track=trackio"]) == 1
    error = "error: train.track='trackio' needs the package trackio: pip install 'stickjax[trackio]'\n"
    assert capsys.readouterr().err == error and not (tmp_path / "run").exists()
    assert main([*words, "--train.track=wandbb"]) == 1
    assert "did you mean 'wandb'?" in capsys.readouterr().err


def test_tensorboard_reads_the_rows_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(rows):
        with tracker(TINY.replace({"train.track": "tensorboard"}), str(tmp_path)) as log:
            for row in rows:
                log(row)

    write(ROWS)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("tokens")] == [(3, 96), (6, 192)]
    assert [(e.step, e.value) for e in events.Scalars("heldout_loss")] == [(6, 2.25)]
    write([ROWS[1] | {"tokens": 200.0}])  # a resumed run writes step 6 again
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("tokens")] == [(3, 96), (6, 200)]


def test_wandb_writes_a_folder_when_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with tracker(TINY.replace({"train.track": "wandb"}), str(tmp_path)) as log:
        for row in ROWS:
            log(row)
    sys.modules["wandb"].teardown()  # waits until the file is written
    (file,) = tmp_path.rglob("*.wandb")
    assert b"heldout_loss" in file.read_bytes()
