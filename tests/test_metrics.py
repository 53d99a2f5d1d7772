"""metrics.jsonl contains strict JSON, and a reader skips invalid lines in it."""

import json
import math

import pytest

from stickjax.evaluation import plots
from stickjax.system.text import json_text
from stickjax.training.metrics import MetricsLog, read_metrics


def row(step: int, /, **values) -> dict:
    return dict(step=step, tokens=32 * step, loss=1.5, learning_rate=0.1) | values


def write(run, *rows) -> None:
    log = MetricsLog(run, after_step=0)
    for one in rows:
        log.write(one)
    log.close()


def test_what_is_not_finite_is_null_and_read_as_nan(tmp_path):
    write(tmp_path, row(1, grad_norm=math.inf), row(2, loss=math.nan), row(3, parts=[-math.inf, {"x": math.nan}]))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for line in lines:
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    first, second, third = read_metrics(tmp_path)
    assert math.isnan(first["grad_norm"]) and math.isnan(second["loss"]) and third["parts"] == [None, {"x": None}]
    plots.plot_training({"run": [first, second, third]}, tmp_path / "p.png")
    MetricsLog(tmp_path, after_step=3).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines
    assert json_text((math.nan, 2, "NaN", None, True)) == '[null, 2, "NaN", null, true]'


DAMAGED = {
    2: b"\xff\xfe",
    3: b"3",
    4: b'{"a": 1}',
    6: b'{"step": 2, "tok',
    7: b"[" * 100_000,
    8: json_text(row(2, step=True)).encode(),
    9: json_text(row(2, loss="low")).encode(),
    10: b'[1, {"step": 2}]',
    11: b'{"step": "2"}',
    12: json_text(row(2, tokens=10**400)).encode(),
}


def damaged(run) -> None:
    """Write a metrics.jsonl with valid and invalid lines into the folder `run`.

    Rows 1, 2 and 3 are in lines 1, 5 and 13. The lines between them are not valid. The last line is an incomplete row.
    """
    good = {1: row(1), 5: row(2), 13: row(3)}
    lines = [DAMAGED.get(n) or json_text(good[n]).encode() for n in range(1, 14)]
    (run / "metrics.jsonl").write_bytes(b"\n".join([*lines, b"", b'{"step": 4, "loss"']))


def test_damaged_and_foreign_lines_are_left_out_and_named(tmp_path, caplog):
    damaged(tmp_path)
    assert read_metrics(tmp_path) == [row(1), row(2), row(3)]
    assert (
        f"metrics.jsonl: ignored {len(DAMAGED)} lines without complete metrics: line 2, 3, 4, 6, 7, 8, 9, 10, 11, 12"
        in caplog.text
    )


def test_a_resumed_log_is_cut_behind_damage_too(tmp_path):
    damaged(tmp_path)
    log = MetricsLog(tmp_path, after_step=2)
    log.write(row(3, loss=9.0))
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [row(1), row(2), row(3, loss=9.0)]


def test_a_torn_last_line_is_nothing_to_speak_of(tmp_path, caplog):
    write(tmp_path, row(1))
    for torn in (b'{"step": 2, "lo', b"\xff", b"   ", b""):
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(torn)
        assert read_metrics(tmp_path) == [row(1)]
        MetricsLog(tmp_path, after_step=9).close()
    assert not caplog.text and read_metrics(tmp_path / "none") == []
