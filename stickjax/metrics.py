"""What a run reports: metrics.jsonl, floating-point operations, the share of the chip's peak."""

import json
import os
from pathlib import Path

import jax

from stickjax.config import ModelConfig, SutConfig
from stickjax.disk import remove, write_file, writing
from stickjax.models.family import parameter_counts
from stickjax.plan.chips import of_kind


def flops_per_token(config: ModelConfig | SutConfig, T: int) -> float:
    """Floating-point operations of a training step (forward and backward), per token, at context T.

    Six for every active parameter, and for the causal attention 3 * 2 products of 2 * N * H * T / 2 per layer, twice
    that where it looks both ways. A Universal Transformer is counted as if no token halted before its last step. What a
    remat policy computes again is not counted.
    """
    _, active = parameter_counts(config)
    if config.family == "sut":
        heads, ways = config.attention_k * config.K, 1 if config.attention == "stick_breaking" else 2
        return config.L * (6 * active + 6 * ways * heads * config.H * T)
    if config.tied:
        active += config.vocabulary * config.D  # the embedding works as output matrix
    return 6 * active + 6 * config.L * config.N * config.H * T


def peak_flops(devices: int = 1) -> float | None:
    """The bf16 peak of so many devices together, or None when the chip is not known."""
    chip = of_kind(jax.devices()[0].device_kind)
    return None if chip is None else devices * chip.flops


class MetricsLog:
    """One JSON object per line, in `run_folder/metrics.jsonl`.

    Opened at `after_step`, what was logged after that step is cut off: a resumed run writes it again. A last line
    that was cut off by a crash goes with it.
    """

    def __init__(self, run_folder: str | os.PathLike, after_step: int):
        self.path = Path(run_folder) / "metrics.jsonl"
        kept = [row for row in read_metrics(run_folder) if row["step"] <= after_step]
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("ab", buffering=0)

    def write(self, row: dict) -> None:
        line = json.dumps(row).encode() + b"\n"
        with writing(self.path):
            while line:  # a disk that becomes full takes a part of it
                line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


def read_metrics(run_folder: str | os.PathLike) -> list[dict]:
    """All complete lines of a run's metrics.jsonl."""
    path, rows = Path(run_folder) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # torn by a crash; nothing behind it can be trusted
    return rows


def stop_trace(folder: Path) -> None:
    """Write the trace that `jax.profiler.start_trace(folder)` began; OSError, and no part of it, when that fails."""
    before = set(folder.rglob("*"))
    try:
        with writing(folder):
            jax.profiler.stop_trace()
    except OSError:
        for path in set(folder.rglob("*")) - before:
            remove(path)
        raise
