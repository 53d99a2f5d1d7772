"""Validation during a training: its numbers, the best checkpoint, and that it changes nothing else."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same_state, wait_for_step

import stickjax
from stickjax import Config, DataConfig, evaluate
from stickjax.config import OrderedMemoryConfig
from stickjax.data.examples import examples_of
from stickjax.data.readers import training_data
from stickjax.evaluation import plots
from stickjax.evaluation.held_out import target_sums
from stickjax.evaluation.validation import Validation, validation_of
from stickjax.models.families import family_of
from stickjax.models.parameters import shardings
from stickjax.parallel.mesh import make_mesh
from stickjax.storage.checkpoints import Checkpoints
from stickjax.storage.run_folder import load
from stickjax.training import loop
from stickjax.training.loop import fit
from stickjax.training.metrics import read_metrics

VALIDATED = {"train.eval_every": 5, "train.eval_tokens": 300}
SMALL = Config().replace(
    {
        "model.V": 264, "model.D": 16, "model.L": 2, "model.N": 2, "model.K": 2, "model.H": 8, "model.F": 16,
        "model.experts.E": 4, "model.experts.k": 2, "model.experts.sample_topk": 1,
        "data.source": "recall", "data.examples": 600, "data.T": 32, "data.B": 4, "train.accumulate": 2,
        "train.steps": 12, "train.log_every": 2, "train.checkpoint_every": 4, "train.keep": 1,
        "optim.peak_lr": 0.01, "optim.warmup_tokens": 128,
    }
)  # fmt: skip
LISTOPS = Config(
    OrderedMemoryConfig(V=18, D=6, H=5, N=3, sentences=1, hidden=False, classes=10),
    DataConfig(source="listops", examples=400, T=8, B=4, valid_every=5),
).replace({"train.steps": 3, "train.eval_every": 2, "train.log_every": 10, "optim.warmup_tokens": 0})


def rows(run, *without: str) -> list[dict]:
    """Return the logged metrics of a run, one dictionary per logged step.

    `tokens_per_second` and the metrics whose names are in `without` are left out.
    """
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", *without)} for row in read_metrics(run)]


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """Train SMALL with validation. Return folder, last state, rows that `on_metrics` got, number of compilations."""
    run, seen, before = str(tmp_path_factory.mktemp("validated") / "run"), [], target_sums._cache_size()
    result = fit(SMALL.replace(VALIDATED), run, quiet=True, on_metrics=seen.append)
    return run, result.state, seen, target_sums._cache_size() - before


def test_validation_changes_nothing_else(validated, tmp_path):
    run, state, _, compilations = validated
    result = fit(SMALL.replace({"train.log_every": 1}), str(tmp_path / "plain"), quiet=True)
    plain = {row["step"]: row for row in rows(tmp_path / "plain")}
    own = rows(run, "heldout_loss", "heldout_bits_per_byte")
    assert [row["step"] for row in own] == [2, 4, 5, 6, 8, 10, 12]  # step 5 has a row only for its validation
    assert own == [plain[row["step"]] for row in own]
    assert_same_state(state, result.state)
    assert compilations == 1


def test_the_numbers_are_those_of_evaluate(validated):
    run, _, seen, _ = validated
    scored = {row["step"]: row for row in read_metrics(run) if "heldout_loss" in row}
    assert list(scored) == [5, 10, 12]
    model = stickjax.load(run)
    (record,) = evaluate.evaluate(model.model, model.config, lengths=(1,), max_tokens=300)
    assert 0 < record["tokens"] <= 300
    np.testing.assert_allclose(scored[12]["heldout_bits_per_byte"], record["bits_per_byte"], rtol=1e-5)
    np.testing.assert_allclose(scored[12]["heldout_loss"], record["bits_per_token"] * math.log(2), rtol=1e-5)
    assert np.isnan(model.metrics["heldout_loss"]).tolist() == [True, True, False, True, True, False, False]
    assert seen == read_metrics(run)


class Killed(Exception):
    pass


EXHAUSTIVE = {  # the program that is killed ends at step 5
    "test_stopped_and_started_again_it_has_the_same_numbers": lambda at: at == 5
}


@pytest.mark.parametrize("at", [5, 10])
def test_stopped_and_started_again_it_has_the_same_numbers(validated, tmp_path, monkeypatch, at):
    """A run that fails at step `at` and is started again has the numbers of a run without an interruption.

    The first run fails after the metrics of this step are written, and before its checkpoint is saved.
    """

    def end(row):
        if row["step"] == at:
            raise Killed

    config, run = SMALL.replace(VALIDATED), str(tmp_path / "run")
    with pytest.raises(Killed):
        fit(config, run, quiet=True, on_metrics=end)
    assert read_metrics(run)[-1]["step"] == at
    result = fit(config, run, quiet=True)
    assert rows(run) == rows(validated[0])
    assert_same_state(result.state, validated[1])
    assert Checkpoints(run).steps() == Checkpoints(validated[0]).steps()
    assert Checkpoints(run).best() == Checkpoints(validated[0]).best()


@pytest.mark.slow
def test_killed_and_started_again_it_has_the_same_numbers(validated, tmp_path):
    config, run = SMALL.replace(VALIDATED), tmp_path / "run"
    (tmp_path / "config.json").write_text(config.to_json())
    command = [sys.executable, "-m", "stickjax.train", str(tmp_path / "config.json"), "--run", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(run, 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    fit(config, str(run), quiet=True)
    assert rows(run) == rows(validated[0])


def save_all(folder, scores: dict, keep=1) -> Checkpoints:
    with Checkpoints(folder, keep) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, {"w": jnp.full(3, float(step))}, {}, score)
    return checkpoints


def test_the_best_is_kept_beside_the_newest(tmp_path):
    checkpoints = save_all(tmp_path, {1: 3.0, 2: 1.0, 3: None, 4: math.nan, 5: 1.0, 6: 2.0, 7: None})
    assert checkpoints.steps() == [2, 7] and checkpoints.best() == 2  # of two equal scores, the earlier one
    assert checkpoints.restore({"w": jnp.zeros(3)}, step=2).state["w"].tolist() == [2.0] * 3
    assert checkpoints.best(before=2) is None
    assert checkpoints.is_best(8, 0.5) and not checkpoints.is_best(8, 1.0) and not checkpoints.is_best(8, math.nan)
    assert checkpoints.is_best(2, 9.0)  # step 2 is trained again, so its old score does not count
    plain = save_all(tmp_path / "plain", dict.fromkeys(range(1, 5)), keep=2)
    assert plain.steps() == [3, 4] and plain.best() is None
    manifest = tmp_path / "checkpoints" / "2" / "manifest.json"
    assert json.loads(manifest.read_text())["manifest"]["score"] == 1.0
    manifest.write_text("{")
    assert checkpoints.best() is None


def test_the_best_checkpoint_is_loaded(tmp_path, monkeypatch, capsys):
    run, losses = str(tmp_path / "run"), iter([3.0, 1.0, 2.0, 2.5])
    scripted = Validation(lambda model: {"heldout_loss": next(losses)}, "heldout_loss", 1, "numbers of a test")
    monkeypatch.setattr(loop, "validation_of", lambda *_: scripted)
    fit(SMALL.replace({"train.eval_every": 3, "train.checkpoint_every": 100}), run, quiet=True)
    assert Checkpoints(run).steps() == [6, 12]
    best = stickjax.load(run, step="best")
    assert best.step == 6
    np.testing.assert_array_equal(best.model.embed[...], load(run, step=6).model.embed[...])
    words = [run, "--lengths=1", "--max-tokens=100"]
    assert evaluate.main([*words, "--step=best"]) == 0
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["step"] == 6
    assert evaluate.main([*words, "--step", "bset"]) == 2
    assert "'bset' is neither the number of a step nor the word best" in capsys.readouterr().err


def test_without_validation_there_is_no_best(tmp_path, capsys):
    run = str(tmp_path / "run")
    fit(SMALL.replace({"train.steps": 1}), run, quiet=True)
    with pytest.raises(ValueError, match="has no best checkpoint, because none was validated"):
        load(run, step="best")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match="has no best checkpoint"):
        load(run, step="best")


def test_a_mesh_gives_the_same_numbers():
    config = SMALL.replace(VALIDATED | {f"mesh.{axis}": 2 for axis in ("fsdp", "context", "tensor")})
    data, mesh = training_data(config), make_mesh(config)
    model = family_of(config.model).init(config.model, jax.random.key(0))
    expected = validation_of(config, data).measure(model)
    found = validation_of(config, data).measure(jax.device_put(model, shardings(mesh, model)))
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def test_a_classifier_is_scored_by_its_accuracy(tmp_path, capsys):
    run = str(tmp_path / "run")
    fit(LISTOPS, run)
    assert re.search(r"validation: \d+ sentences of listops\n", capsys.readouterr().out)
    scored = [row for row in read_metrics(run) if "valid_accuracy" in row]
    assert [row["step"] for row in scored] == [2, 3]
    loaded = load(run)
    rows = [*examples_of(LISTOPS, "valid")]
    tokens = np.stack([row["tokens"] for row in rows])
    logits = jax.jit(family_of(LISTOPS.model).apply)(loaded.model, {"tokens": tokens}).logits
    right = [answer == row["label"] for answer, row in zip(logits.argmax(-1), rows, strict=True)]
    assert len(rows) > 10 and scored[1]["valid_accuracy"] == pytest.approx(np.mean(right))
    few = validation_of(LISTOPS.replace({"train.eval_tokens": 1}), training_data(LISTOPS))
    assert few.summary == "1 sentences of listops" and few.measure(loaded.model)["valid_accuracy"] in (0, 1)


def test_without_validation_examples_a_line_says_so(tmp_path, monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(loop, "_train", lambda run, *_: runs.append(run))
    fit(LISTOPS.replace({"data.valid_every": 0}), str(tmp_path / "run"))
    out = capsys.readouterr().out
    assert "validation is not available: valid_every=0 leaves no examples for validation; set data.valid_ever" in out
    assert runs[0].validate(2, None) == ({}, None)


def test_the_curves(tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr(plots, "save", lambda page, path: pages.append(page))
    one = dict(step=1, tokens=8, loss=math.log(2), learning_rate=0.1)
    plots.plot_training({"run": [one, one | dict(tokens=16, heldout_loss=2 * math.log(2)), one]}, None)
    plots.plot_training({"run": [one | dict(valid_accuracy=0.25)]}, None)
    loss, _ = pages[0].axes
    assert [line.get_label() for line in loss.lines] == ["run", "run, held out"]
    np.testing.assert_allclose(loss.lines[1].get_xydata(), [[16, 2]])
    assert [axes.get_title() for axes in pages[1].axes][2] == "validation accuracy"
    np.testing.assert_allclose(pages[1].axes[2].lines[0].get_xydata(), [[8, 0.25]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.eval_every": -1}, "eval_every=-1 must be at least 0"),
        ({"train.eval_tokens": 0}, "eval_tokens=0 must be at least 1"),
    ],
)
def test_wrong_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        SMALL.replace(change)
