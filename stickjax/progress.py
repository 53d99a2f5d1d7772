"""What a person sees while a run goes on: a bar on a terminal, plain lines otherwise, nothing when quiet."""

import math

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from stickjax.config import Config


class Progress:
    """`say` prints a line, `update` shows a row of metrics."""

    def __init__(self, config: Config, *, quiet: bool = False):
        self._steps, self._quiet, self._tokens_per_step = config.train.steps, quiet, config.data.tokens_per_step
        self._console = Console(highlight=False, soft_wrap=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        live = self._console.is_terminal and not quiet
        self._bar = Bar(*columns, console=self._console) if live else None
        self._task = self._bar.add_task("", total=self._steps) if self._bar else None

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception):
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, markup=False)

    def update(self, row: dict) -> None:
        share = f"{row['accuracy']:.1%} right" if "accuracy" in row else f"{row['loss'] / math.log(2):.3f} bits/token"
        words = f"loss {row['loss']:.4f} ({share})  lr {row['learning_rate']:.2e}"
        words += f"  {row['tokens_per_second']:,.0f} tokens/s"
        words += f"  mfu {row['mfu']:.1%}" if "mfu" in row else ""
        if self._bar:
            self._bar.update(self._task, completed=row["step"], description=words)
        elif not self._quiet:
            left = (self._steps - row["step"]) * self._tokens_per_step / max(row["tokens_per_second"], 1e-9)
            self._console.print(f"step {row['step']}/{self._steps}  {words}  {left:,.0f} s left", markup=False)
