"""Test the control of the GPU benchmark: the order of its stages, and its result file after an early end.

A CPU replaces the GPU, and a few small calls replace the measured ones.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as cli
from benchmarks import gpu, gpu_cases, gpu_check, gpu_record, gpu_run, gpu_stages, report
from pallas_kernels import explain, platform, triton_call

INFO = {"code": "abc", "device": "cpu", "jax": "1", "quick": True}
# A program that benchmarks the CPU as if it were a GPU, with two calls in the stages and one timed row.
STAND_IN = """
import sys, time
from benchmarks import __main__ as cli, gpu, gpu_cases, gpu_stages
gpu.available = lambda: True
gpu_cases.QUICK = gpu_stages.QUICK = ("one token", "decode, skip")
gpu._time = lambda run, part, shape, *_, **__: run.row("speed", part.PART, "x", lambda: dict(milliseconds=1.0))
"""


@pytest.fixture
def record(tmp_path):
    def make(**settings):
        return gpu_record.Record(tmp_path / "rows.json", INFO, list, **settings)

    return make


def saved(path) -> dict:
    """Return the rows of a result file as a dict, by (part, case)."""
    return {(row["part"], row["case"]): row for row in json.loads(Path(path).read_text())["rows"]}


# The record.


def test_a_row_is_in_the_file_at_once_and_does_not_run_again(record):
    run = gpu_run.Run(record())
    run.row("p", "a", "x", lambda: dict(milliseconds=1.0, extra={"passed": "yes"}))
    run.row("p", "b", "x", lambda: 1 / 0)
    assert saved(run.record.path)["p", "b"]["extra"] == {"failed": "ZeroDivisionError: division by zero"}
    again = gpu_run.Run(record())
    row = again.row("p", "a", "x", lambda: dict(milliseconds=2.0))
    assert (row.milliseconds, row.extra) == (1.0, {"passed": "yes"})
    assert gpu_run.Run(record(), again=True).row("p", "a", "x", lambda: dict(milliseconds=2.0)).milliseconds == 2.0
    assert list(saved(run.record.path)) == [("p", "a"), ("p", "b")]
    assert not record(fresh=True).rows


def test_a_row_without_time_runs_the_next_time(record):
    run = gpu_run.Run(record())
    run.until(-1)
    assert gpu_record.LEFT_OUT in run.row("p", "a", "x", dict).extra
    assert gpu_run.Run(record()).row("p", "a", "x", lambda: dict(milliseconds=1.0)).milliseconds == 1.0


@pytest.mark.parametrize("name, value", [("code", "abd"), ("device", "gpu"), ("jax", "2"), ("quick", False)])
def test_rows_of_something_else_are_not_taken(name, value, record, tmp_path, capsys):
    record().add(report.Row("p", "a", "x", 1.0))
    other = gpu_record.Record(tmp_path / "rows.json", INFO | {name: value}, list)
    assert not other.rows and f"was measured with different {name}: this run starts over" in capsys.readouterr().err


def test_a_file_that_is_no_record_stays(record, tmp_path):
    (tmp_path / "rows.json").write_text("{")
    with pytest.raises(ValueError, match="rows.json is not valid JSON .*; use --fresh without --only to start over"):
        record()
    assert (tmp_path / "rows.json").read_text() == "{"


def test_the_code_of_a_row_is_all_that_it_depends_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_record, "HERE", tmp_path / "benchmarks")
    kernel = tmp_path / "pallas_kernels" / "deep" / "a.py"
    for path in (kernel, tmp_path / "benchmarks" / "b.py"):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    code = gpu_record.code.__wrapped__
    before = code()
    (tmp_path / "benchmarks" / "results.json").write_text("2")
    assert code() == before
    kernel.write_text("2")
    assert code() != before


def test_a_row_that_hangs_is_recorded_and_not_tried_again(record, monkeypatch, capsys):
    left = []
    monkeypatch.setattr(gpu_run, "HANG_SECONDS", 0.05)
    monkeypatch.setattr(gpu_run.give_up_after.__wrapped__, "__defaults__", (left.append,))

    def hangs():
        while not left:
            time.sleep(0.01)
        raise KeyboardInterrupt  # in place of the end of the process

    run = gpu_run.Run(record())
    with pytest.raises(KeyboardInterrupt):
        run.row("p", "a", "x", hangs)
    assert left == [1] and "run the same command again" in capsys.readouterr().err
    assert gpu_run.Run(record()).row("p", "a", "x", dict).extra["failed"].startswith("RuntimeError: still running")


# The checks.


def test_a_run_that_differs_is_counted():
    calls = []

    def program(x):
        calls.append(x)
        return x if len(calls) % 10 else x.at[3].add(1)

    assert gpu_check.differing(program, (jnp.arange(8.0),), 100) == 10
    assert gpu_check.differing(lambda x: (x, x / x), (jnp.zeros(8),), 5) == 0  # NaN equals NaN


def test_what_is_left_under_skip_below_is_compared_as_a_share_of_the_stick():
    left = jnp.full(4, 2.0**-24)
    out, share = gpu_check.attended(lambda: (jnp.ones(4), left, None))()
    np.testing.assert_array_equal(share, 1 - left)


def test_every_name_is_that_of_one_thing():
    names = gpu.names()
    assert len(set(names) - set(gpu_cases.EXITS)) == len(names) - 2 * len(gpu_cases.EXITS) + 1
    assert not gpu.is_one("correct") and not gpu.is_one("experts") and gpu.is_one("small plain")


@pytest.mark.parametrize("name", gpu_cases.FEATURES)
def test_features_are_calls_the_kernels_take(name, monkeypatch):
    case = gpu_cases.FEATURES[name]
    arrays = jax.eval_shape(lambda: case.arrays(jax.random.key(0)))
    monkeypatch.setattr(triton_call, "_missing", tuple)
    with platform.absent_gpu():
        for kernels in ("mosaic", "triton"):
            said = explain("stick_breaking_attention", *arrays, **case.options(), implementation=kernels)
            assert ("decoding" in said) == case.forward_only


def test_every_call_is_one_for_the_ops(monkeypatch):
    """On a Hopper GPU without Triton, dispatch chooses an implementation for every call of the GPU benchmark.

    It chooses mosaic if mosaic supports the call, and xla for the others.
    """
    monkeypatch.setattr(triton_call, "_missing", lambda: ("triton",))
    with platform.absent_gpu():
        chosen = {name: call.implementations() for name, call in (gpu_cases.CALLS | gpu_cases.EXITS).items()}
    others = {name for name, found in chosen.items() if found != ("mosaic",)}
    refused = "odd-widths", "fp32-odd-widths", "fp32-offsets", "fp32-saturated"
    assert others == {f"small {name}" for name in refused} and {chosen[name] for name in others} == {("xla",)}


# The command.


def command(tmp_path, *arguments, code=""):
    program = f"{STAND_IN}\n{code}\nsys.exit(cli.main({['--gpu', '--quick', '--json', 'rows.json', *arguments]}))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def rows_begun(said: str) -> list[str]:
    return [line.split(" s  ")[1] for line in said.splitlines() if " s  " in line]


def test_a_run_that_is_killed_loses_no_row_and_the_next_goes_on(tmp_path):
    """If a benchmark is killed, its finished rows are in the file, and the next run continues after them.

    Here it is killed while it compares the second call with the reference.
    """
    code = """
real = gpu_stages.Checks._correct
def slow(self, name, implementation):
    return real(self, name, implementation) if name == "one token" else time.sleep(600)
gpu_stages.Checks._correct = slow
"""
    first = command(tmp_path, code=code)
    for line in first.stderr:
        if "correct: decode, skip" in line:
            break
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = saved(tmp_path / "rows.json")
    done = [("lower", "one token"), ("lower", "decode, skip"), ("correct", "one token")]
    assert list(before) == [*done, ("summary", "logits"), ("summary", "checks")]
    assert all(before[row]["extra"]["passed"] == "yes" for row in done)

    second = command(tmp_path)
    out, said = second.communicate()
    assert second.returncode == 0, said
    assert "3 rows in rows.json come from earlier runs" in said
    assert rows_begun(said)[:2] == ["correct: decode, skip, xla", "exit: decode, skip, xla"]
    assert all(row.startswith("speed") for row in rows_begun(said)[2:])
    after = saved(tmp_path / "rows.json")
    assert all(after[row] == before[row] for row in done)
    assert after["exit", "decode, skip"]["extra"] == {"runs": 20, "unlike the first": 0, "passed": "yes"}
    assert after["summary", "checks"]["extra"] == {"passed": 5, "did not pass": "none", "left out": 0}
    assert "passed 5" in out and "decode, skip" not in out, "passed checks are not in the table"
    assert not list(tmp_path.glob("*.new"))


def test_only_one_case_runs_again_and_keeps_the_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "available", lambda: True)
    path = tmp_path / "rows.json"
    for name in ("one token", "lower", "one token"):
        assert cli.main(["--gpu", "--quick", "--json", str(path), "--only", name]) == 0
    said = rows_begun(capsys.readouterr().err)
    one = ["lower: one token, xla", "correct: one token, xla"]
    others = [f"lower: {name}, xla" for name in gpu_stages.QUICK[1:]]
    assert said == [*one, *others, *one]
    assert len(saved(path)) == len(gpu_stages.QUICK) + 1 + 2


@pytest.mark.parametrize("name, hint", [("decode skip", "'decode, skip'"), ("corect", "'correct'"), ("xyz", "one of")])
def test_only_a_name_that_there_is(name, hint, capsys):
    assert cli.main(["--gpu", "--only", name]) == 2
    assert f"error: --only {name!r} is an unknown name" in (said := capsys.readouterr().err) and hint in said


def test_a_check_that_does_not_pass_is_in_the_table_and_in_the_exit_status(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "available", lambda: True)
    monkeypatch.setattr(gpu_check, "compared", lambda *_: gpu_check.Errors(0.5, None, True))
    path = tmp_path / "rows.json"
    assert cli.main(["--gpu", "--quick", "--json", str(path), "--only", "one token"]) == 1
    assert "did not pass correct one token (xla)" in capsys.readouterr().out
