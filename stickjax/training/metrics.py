"""What a run reports: metrics.jsonl, and the peak of the chip."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import jax

from stickjax.parallel.chips import of_kind
from stickjax.system.disk import write_file, writing
from stickjax.system.text import json_text, printable

log = logging.getLogger(__name__)


def peak_flops(devices: int = 1) -> float | None:
    """The bf16 peak of `devices` devices together; None if the chip is not known."""
    chip = of_kind(jax.devices()[0].device_kind)
    return None if chip is None else devices * chip.flops


class MetricsLog:
    """One JSON object per line, in `run_folder/metrics.jsonl`.

    Rows after `after_step` are deleted first, because a resumed run writes them again. Lines that `read_metrics` leaves
    out are deleted too.
    """

    def __init__(self, run_folder: str | os.PathLike, after_step: int):
        self.path = Path(run_folder) / "metrics.jsonl"
        kept = [row for row in read_metrics(run_folder) if row["step"] <= after_step]
        write_file(self.path, "".join(json_text(row) + "\n" for row in kept))
        self._file = self.path.open("ab", buffering=0)

    def write(self, row: dict) -> None:
        line = json_text(row).encode() + b"\n"
        with writing(self.path):
            while line:  # a disk that becomes full writes only a part
                line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def read_metrics(run_folder: str | os.PathLike) -> list[dict]:
    """The rows of a run's metrics.jsonl, each with at least step, tokens, loss and learning_rate; null becomes NaN.

    Damaged lines, and lines that are not rows of metrics, are left out and logged. An incomplete last line, which a
    crash leaves, is left out without a message.
    """
    path, rows, bad = Path(run_folder) / "metrics.jsonl", [], []
    *lines, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate([*lines, last], 1):
        try:
            row = {key: math.nan if value is None else value for key, value in json.loads(line).items()}
            numbers = [row[key] for key in ("step", "tokens", "loss", "learning_rate")]
            if type(numbers[0]) is not int or not all(map(_is_number, numbers)):
                raise ValueError("not a row of metrics")
            rows.append(row)
        except (ValueError, KeyError, AttributeError, RecursionError):
            if number <= len(lines) and line.strip():
                bad.append(number)
    if bad:
        which = ", ".join(map(str, bad[:10])) + (", ..." if bad[10:] else "")
        s = "s"[len(bad) == 1 :]
        log.warning("%s: left out %d damaged or foreign line%s: %s", printable(path), len(bad), s, which)
    return rows
