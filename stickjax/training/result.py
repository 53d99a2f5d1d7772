"""The result of a training: what `fit` returns."""

from typing import NamedTuple

from stickjax.system.tables import Columns
from stickjax.training.metrics import metrics_of
from stickjax.training.step import TrainState


class Result(NamedTuple):
    """The result of `fit`: the last training state, and how the training ended.

    `state`: the last training state; None if a Ctrl-C during the start of the run, or a second Ctrl-C, ended
      `stickjax.fit`.
    `finished`: whether the last step was reached.
    `tokens_per_second`: the speed, measured after the first step; None if fewer than two steps ran, or if `state` is
      None. The time of validations does not count.
    `outside`: the share of the wall time that was spent outside the jitted step, from 0 to 1. The time of the first
      step and of validations does not count. It is 0 if `tokens_per_second` is None.
    `stopped_by`: the number of the signal that stopped the run before its last step, or 0.
    `run`: the run folder.
    """

    state: TrainState | None
    finished: bool
    tokens_per_second: float | None
    outside: float
    stopped_by: int = 0
    run: str = ""

    @property
    def metrics(self) -> Columns:
        """All rows of metrics.jsonl in the run folder as columns, {name of a metric: NumPy array}."""
        return metrics_of(self.run)

    def __repr__(self) -> str:  # for notebooks; the full state would be too long to print
        step = None if self.state is None else int(self.state.step)
        rate = self.tokens_per_second and round(self.tokens_per_second)
        return (
            f"Result(step={step}, finished={self.finished}, tokens_per_second={rate}, outside={self.outside:.3f}, "
            f"stopped_by={self.stopped_by}, run={self.run!r})"
        )
