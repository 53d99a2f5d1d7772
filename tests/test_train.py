"""Training: a run that was interrupted gives bitwise the same result, and every error is one clear line."""

import json
import operator
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same_state, wait_for_step

from stickjax import train
from stickjax.config import Config, field_names
from stickjax.data.corpus import load_corpus
from stickjax.storage.checkpoints import Checkpoints
from stickjax.system.lock import Lock
from stickjax.train import fit, main
from stickjax.training import loop
from stickjax.training.metrics import read_metrics

# A small config with everything that has a state: sampled routing, the router's bias, accumulation, packed documents.
SMALL = Config().replace(
    {
        "model.V": 257, "model.D": 16, "model.L": 2, "model.N": 2, "model.K": 1, "model.H": 8, "model.F": 16,
        "model.experts.E": 4, "model.experts.k": 2, "model.experts.sample_topk": 1,
        "model.experts.bias_rate": 0.01, "model.experts.z_weight": 0.001,
        "data.T": 32, "data.B": 4, "train.accumulate": 2, "train.steps": 24, "train.log_every": 1,
        "train.checkpoint_every": 5, "train.keep": 5, "optim.peak_lr": 0.01, "optim.warmup_tokens": 128,
    }
)  # fmt: skip


def words(config: Config) -> list[str]:
    return [f"--{name}={operator.attrgetter(name)(config)}" for name in field_names(type(config.model))]


def rows(run) -> list[dict]:
    """Return the metrics of a run as a list of rows, without `tokens_per_second`, which differs between equal runs."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(run)]


def start(run, config=SMALL, **environment) -> subprocess.Popen:
    path = Path(run).parent / "config.json"
    path.write_text(config.to_json())
    command = [sys.executable, "-m", "stickjax.train", str(path), "--run", str(run)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    result = fit(SMALL, str(run), quiet=True)
    assert result.finished
    return run, result.state


@pytest.mark.slow
def test_killed_at_any_step_and_started_again_it_is_the_same_run(uninterrupted, tmp_path):
    run = tmp_path / "run"
    for step in (3, 8):  # before the first checkpoint, and between two checkpoints
        # The first training compiles without the cache: another compilation must not change the results.
        process = start(run, JAX_ENABLE_COMPILATION_CACHE="false" if step == 3 else "true")
        wait_for_step(run, step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    result = fit(SMALL, str(run), quiet=True)
    assert rows(run) == rows(uninterrupted[0])
    assert_same_state(result.state, uninterrupted[1])


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(uninterrupted, tmp_path):
    run = tmp_path / "run"
    process = start(run, SMALL.replace({"train.checkpoint_every": 1000}))
    wait_for_step(run, 4, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "run the same command again" in out
    (saved,) = Checkpoints(run).steps()
    assert [row["step"] for row in rows(run)] == list(range(1, saved + 1))
    fit(SMALL, str(run), quiet=True)
    assert rows(run) == rows(uninterrupted[0])


def test_two_runs_are_equal_bit_for_bit(uninterrupted, tmp_path):
    result = fit(SMALL, str(tmp_path / "run"), quiet=True)
    assert rows(tmp_path / "run") == rows(uninterrupted[0])
    assert_same_state(result.state, uninterrupted[1])


def test_loss_falls_and_metrics_are_complete(uninterrupted):
    log = rows(uninterrupted[0])
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert log[-1]["tokens"] == 24 * 4 * 32
    assert {"step", "loss", "grad_norm", "learning_rate", "bad_steps", "switch", "z", "mutual_information"} <= set(
        log[0]
    )


def copy_run(source, target):
    import shutil

    shutil.copytree(source, target)
    return target


def flip(path: Path, place=-1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path, damage):
    run = copy_run(uninterrupted[0], tmp_path / "run")
    newest = run / "checkpoints" / "24"
    largest = max((p for p in (newest / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "flip":
        flip(largest, largest.stat().st_size // 2)
    else:
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.warns(UserWarning, match="damaged checkpoint.*24|step .* is trained again"):
        result = fit(SMALL, str(run), quiet=True)
    assert rows(run) == rows(uninterrupted[0])
    assert_same_state(result.state, uninterrupted[1])


def test_not_finite_parameters_are_refused(uninterrupted, tmp_path, capsys):
    run = tmp_path / "run"
    state = uninterrupted[1]
    broken = jax.tree.map(lambda x: x, state.params)
    broken.norm.scale = type(broken.norm.scale)(jnp.full(16, jnp.nan))
    (run).mkdir()
    (run / "config.json").write_text(SMALL.to_json())
    extra = {"data": {"next_index": 5}, "corpus": load_corpus(SMALL.data)[0].hash, "tokens": 0, "config": {}}
    with Checkpoints(run) as checkpoints:
        checkpoints.save(5, state._replace(params=broken), extra)
    (tmp_path / "config.json").write_text(SMALL.to_json())
    assert main([str(tmp_path / "config.json"), "--run", str(run)]) == 1
    assert "16 of 16 values of norm/scale are not finite" in capsys.readouterr().err


def test_init_from_takes_the_parameters_alone(uninterrupted, tmp_path):
    result = fit(SMALL.replace({"train.steps": 1}), str(tmp_path / "run"), init_from=str(uninterrupted[0]), quiet=True)
    (row,) = rows(tmp_path / "run")
    assert int(result.state.step) == 1 and row["learning_rate"] == 0  # the warmup begins again at zero
    np.testing.assert_array_equal(result.state.params.embed[...], uninterrupted[1].params.embed[...])
    assert row["loss"] < rows(uninterrupted[0])[0]["loss"] - 0.5
    with pytest.raises(ValueError, match="model.D: 16 -> 32"):
        fit(SMALL.replace({"model.D": 32}), str(tmp_path / "other"), init_from=str(uninterrupted[0]), quiet=True)


def test_the_step_is_compiled_once_with_parameters_of_another_run(uninterrupted, tmp_path, caplog):
    with jax.log_compiles():
        fit(SMALL.replace({"train.steps": 3}), str(tmp_path / "run"), init_from=str(uninterrupted[0]), quiet=True)
    assert sum("Compiling jit(step)" in message for message in caplog.messages) == 1


def test_a_longer_run_goes_on(uninterrupted, tmp_path):
    run = copy_run(uninterrupted[0], tmp_path / "run")
    result = fit(SMALL.replace({"train.steps": 26}), str(run), quiet=True)
    assert int(result.state.step) == 26 and len(rows(run)) == 26


def test_a_finished_run_does_nothing(uninterrupted, tmp_path):
    run = copy_run(uninterrupted[0], tmp_path / "run")
    assert fit(SMALL, str(run), quiet=True).finished
    assert rows(run) == rows(uninterrupted[0])


def test_banner_and_lines(tmp_path, capsys):
    fit(SMALL.replace({"train.steps": 2}), str(tmp_path / "run"))
    text = capsys.readouterr().out
    for part in (
        "parameters",
        "FLOP per token",
        "stick_breaking_attention: xla",
        "expert_mlp: xla",
        "step 2/2  loss",
        "tokens/s",
        "outside the jitted step",
    ):
        assert part in text


@pytest.mark.parametrize("steps, traced", [(8, "4 to 6"), (5, "3 to 5"), (2, "1 to 2")])
def test_profile_writes_a_trace(steps, traced, tmp_path, capsys):
    fit(SMALL.replace({"train.steps": steps}), str(tmp_path / "run"), profile=True)
    assert any((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert f"/run/profile has the trace of steps {traced}\n" in capsys.readouterr().out


def test_a_run_that_stops_before_its_last_step_writes_its_trace(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise FloatingPointError("at step 5")

    monkeypatch.setattr(loop, "all_finite", fail)  # called at the checkpoint of step 5
    with pytest.raises(FloatingPointError, match="at step 5"):
        fit(SMALL, str(tmp_path / "run"), profile=True)
    assert any((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert "/run/profile has the trace of steps 4 to 5\n" in capsys.readouterr().out


def test_a_changed_held_out_text_is_refused(tmp_path, monkeypatch):
    text, heldout, save = tmp_path / "text", tmp_path / "heldout", Checkpoints.save
    text.write_text("to train on " * 100)
    heldout.write_text("to validate on " * 10)
    config = SMALL.replace({"data.source": "text", "data.path": str(text), "data.heldout_path": str(heldout)})

    def fit_to(run: str, steps: int) -> None:
        fit(config.replace({"train.steps": steps}), str(tmp_path / run), quiet=True)

    fit_to("run", 2)
    with monkeypatch.context() as older:  # a run of an older version, which recorded no held-out text
        older.setattr(Checkpoints, "save", lambda *args: save(*args[:3], _without_heldout(args[3]), *args[4:]))
        fit_to("old", 2)
    heldout.write_text("another text " * 10)
    with pytest.raises(
        ValueError, match="the held-out text has changed: the hash of .*heldout is now [0-9a-f]{16}, .*run@2 was "
    ):
        fit_to("run", 3)
    fit_to("old", 3)
    with pytest.raises(ValueError, match="the held-out text has changed"):
        heldout.write_text("a third text " * 10)
        fit_to("old", 4)


def _without_heldout(extra: dict) -> dict:
    return {name: value for name, value in extra.items() if name != "heldout"}


def test_a_run_folder_holds_data_only(uninterrupted):
    suffixes = {p.suffix for p in uninterrupted[0].rglob("*") if p.is_file()}
    assert not suffixes & {".py", ".pkl", ".pickle", ".so"}
    json.loads((uninterrupted[0] / "config.json").read_text())


def bad_runs(tmp_path, uninterrupted):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "no.py").write_text("x = 1\n")
    yield [str(tmp_path / "none.py")], "none.py"
    yield [str(tmp_path / "no.py")], "defines no function get_config()"
    yield [], "CONFIG is missing"
    yield ["--train.stesp=3", "CONFIG"], "did you mean 'train.steps'?"
    yield ["CONFIG", "--model.V=100"], "V=100 is smaller than the 257 ids of"
    yield ["CONFIG", "--data.source=text", f"--data.path={tmp_path / 'short.txt'}"], "T=32 needs at least 33 tokens"
    yield ["CONFIG", "--data.source=text", f"--data.path={tmp_path / 'none.txt'}"], "does not exist"
    yield ["CONFIG", f"--run={uninterrupted[0]}", "--model.D=8", "--data.seed=3"], "model.D: 16 -> 8; data.seed: 0 -> 3"
    yield ["CONFIG", "--from", "nowhere@3"], "--from needs a new folder"
    yield ["CONFIG", "--from", f"{uninterrupted[0]}@7", "--run", str(tmp_path / "b")], "no checkpoint of step 7"
    yield ["CONFIG", "--from", f"{uninterrupted[0]}@4", "--run", str(uninterrupted[0])], "name the same folder"
    yield ["CONFIG", "--init-from", str(tmp_path)], "nor a model on the hub (org/name): it has no config.json"
    nowhere, missing = ["--init-from", str(tmp_path / "none")], "nor a model on the hub (org/name): it does not exist"
    yield ["CONFIG", *nowhere], missing
    yield ["CONFIG", "--data.source=text", f"--data.path={tmp_path / 'none.txt'}", *nowhere], missing
    yield ["CONFIG", "--model.implementation=mosaic"], "implementation mosaic: needs compute capability 9.0, found cpu"
    yield ["CONFIG", "--model.implementation=xal"], "did you mean 'xla'?"


def test_bad_input_is_one_clear_line(uninterrupted, tmp_path, capsys):
    (tmp_path / "small.json").write_text(SMALL.to_json())
    before = {p: p.stat().st_mtime_ns for p in uninterrupted[0].rglob("*")}
    for number, (argv, message) in enumerate(bad_runs(tmp_path, uninterrupted)):
        argv = [str(tmp_path / "small.json") if word == "CONFIG" else word for word in argv]
        if not any(word.startswith(("--run", "--from")) for word in argv):
            argv += ["--run", str(tmp_path / f"run{number}")]
        assert main(argv) == 1, argv
        err = capsys.readouterr().err
        assert not (tmp_path / f"run{number}").exists(), argv
        assert message in err and err.startswith("error: ") and err.count("\n") == 1, (argv, err)
    assert {p: p.stat().st_mtime_ns for p in uninterrupted[0].rglob("*")} == before, "a refused run changed a folder"


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line(tmp_path):
    """If the disk is full, the command prints one error line, and the metrics that were written remain.

    Files are limited to 100 kB, so the checkpoint does not fit.
    """
    dense = {
        "model.D": 64,
        "model.L": 1,
        "model.experts.E": 0,
        "model.experts.k": 0,
        "model.experts.sample_topk": 0,
        "model.experts.bias_rate": 0.0,
    }
    (tmp_path / "small.json").write_text(SMALL.replace(dense | {"train.accumulate": 1}).to_json())
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from stickjax.train import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "small.json"), "--run", str(tmp_path / "run")]
    quick = {"JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quick)
    assert done.returncode == 1
    assert "error: " in done.stderr and "was not saved" in done.stderr and "Traceback" not in done.stderr
    assert len(rows(tmp_path / "run")) >= 5


def test_a_second_training_in_a_folder_is_refused(uninterrupted, tmp_path, capsys):
    (tmp_path / "longer.json").write_text(SMALL.replace({"train.steps": 30}).to_json())
    run = copy_run(uninterrupted[0], tmp_path / "run")
    lock = Lock(run)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert main([str(tmp_path / "longer.json"), "--run", str(run)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {run} is being written by process {os.getpid()} on ") and err.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    lock.release()
    assert not (uninterrupted[0] / "lock").exists()


def test_help_lists_the_fields(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--model.skip_below=None" in text and "--init-from" in text


def test_words_round_trip():
    assert train.parse(Config(), words(SMALL)) == SMALL
