"""Write and read the metrics of a run, measure its speed, and look up the peak performance of the devices."""

import contextlib
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import jax

from stickjax.parallel.chips import of_kind
from stickjax.system.disk import write_file, writing
from stickjax.system.tables import Columns
from stickjax.system.text import json_text, printable

log = logging.getLogger(__name__)


def peak_flops(devices: int = 1) -> float | None:
    """Return the peak bf16 performance of `devices` devices together, in FLOP per second; None if it is not known.

    The function assumes that all devices are of the same kind as the first device of JAX.
    """
    chip = of_kind(jax.devices()[0].device_kind)
    return None if chip is None else devices * chip.flops


class Pace:
    """Measures the speed of a training run. The first step is not measured, because it takes longer.

    `tokens_per_step`: the number of tokens in a step.
    `flops_per_token`: the floating-point operations per token, of the forward and the backward pass together.
    `peak`: the peak performance of all devices together in FLOP per second; None if it is not known.

    The property `rate` is the number of tokens per second; it is None before two steps are done. The property `outside`
    is the share of the wall time that was spent outside the jitted step, from 0 to 1.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak: float | None):
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak
        self._measured, self._inside = -1, 0.0  # the number of steps after the first step, and their seconds
        self._started = self._now = time.perf_counter()

    def before(self) -> None:
        """Start the clock of a step. Call this before every step."""
        self._begun = time.perf_counter()

    def after(self) -> None:
        """Stop the clock of a step. Call this when the metrics of the step are on the host."""
        self._now = time.perf_counter()
        self._measured += 1
        if self._measured:
            self._inside += self._now - self._begun
        else:
            self._started = self._now

    @contextlib.contextmanager
    def paused(self):
        """Leave out the time that is spent inside this context, such as the time of a validation."""
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self._started, self._now = self._started + seconds, self._now + seconds

    def end(self) -> None:
        """End the measurement of the run.

        Call this after the last checkpoint is written. Then the time of writing counts as time outside the step.
        """
        self._now = time.perf_counter()

    @property
    def rate(self) -> float | None:
        return self._measured * self._tokens / self._seconds if self._measured > 0 else None

    @property
    def outside(self) -> float:
        return max(0.0, 1 - self._inside / self._seconds) if self._measured > 0 else 0.0

    @property
    def _seconds(self) -> float:
        return max(self._now - self._started, 1e-9)

    def row(self) -> dict[str, float]:
        """Return the speed for a row of metrics: {"tokens_per_second": number, "mfu": number}.

        `mfu` is the model's FLOP per second divided by the peak of the devices. It is left out if the peak is not
        known. The result is empty before two steps are done.
        """
        if (rate := self.rate) is None:
            return {}
        return {"tokens_per_second": rate} | ({"mfu": rate * self._flops / self._peak} if self._peak else {})


class MetricsLog:
    """Writes rows of metrics to `run_folder/metrics.jsonl`, one JSON object per line.

    The constructor deletes the rows of all steps after `after_step`, because a resumed run writes them again. It also
    deletes damaged lines (see `read_metrics`).
    """

    def __init__(self, run_folder: str | os.PathLike, after_step: int):
        self.path = Path(run_folder) / "metrics.jsonl"
        kept = [row for row in read_metrics(run_folder) if row["step"] <= after_step]
        write_file(self.path, "".join(json_text(row) + "\n" for row in kept))
        self._file = self.path.open("ab", buffering=0)

    def write(self, row: dict) -> None:
        line = json_text(row).encode() + b"\n"
        with writing(self.path):
            while line:  # on an almost full disk, `write` may write only a part of the line
                line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def read_metrics(run_folder: str | os.PathLike) -> list[dict]:
    """Return the rows of metrics.jsonl in a run folder. Each row has at least step, tokens, loss and learning_rate.

    A damaged line, or a line in which one of these four values is not a number, is left out, and a warning is logged.
    An incomplete last line, which a crash can leave, is left out without a warning. A JSON null becomes NaN. If there
    is no file, the result is an empty list.
    """
    path, rows, bad = Path(run_folder) / "metrics.jsonl", [], []
    *lines, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate([*lines, last], 1):
        try:
            row = {key: math.nan if value is None else value for key, value in json.loads(line).items()}
            numbers = [row[key] for key in ("step", "tokens", "loss", "learning_rate")]
            if type(numbers[0]) is not int or not all(map(_is_number, numbers)):
                raise ValueError("step must be an integer; tokens, loss and learning_rate must be numbers")
            rows.append(row)
        except (ValueError, KeyError, AttributeError, RecursionError):
            if number <= len(lines) and line.strip():
                bad.append(number)
    if bad:
        which = ", ".join(map(str, bad[:10])) + (", ..." if bad[10:] else "")
        s = "s"[len(bad) == 1 :]
        log.warning("%s: ignored %d line%s without complete metrics: line %s", printable(path), len(bad), s, which)
    return rows


def metrics_of(run_folder: str | os.PathLike) -> Columns:
    """Return the metrics of a run as columns, {name of a metric: NumPy array with one value per row of metrics.jsonl}.

    The columns step, tokens, loss and learning_rate come first. If a row lacks a metric, its value is NaN.
    """
    first = ("step", "tokens", "loss", "learning_rate")
    return Columns.of({name: row[name] for name in first} | row for row in read_metrics(run_folder))
