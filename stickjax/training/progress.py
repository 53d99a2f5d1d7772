"""Display a training run: with a progress bar in a terminal, or with plain lines in a file or a pipe."""

import math
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from stickjax.config import Config
from stickjax.config.command import drop_output

VALIDATED = ("heldout_loss", "heldout_bits_per_byte", "valid_accuracy")  # the metrics of a validation


class Progress:
    """The display of a run: `say` prints a line, `update` shows a row of metrics. With `quiet`, both do nothing."""

    _is_terminal: bool | None = None  # None: rich detects it

    def __init__(self, config: Config, *, quiet: bool = False):
        self._steps, self._quiet, self._tokens_per_step = config.train.steps, quiet, config.data.tokens_per_step
        self._output = _Output(sys.stdout)
        self._validated: dict = {}  # the results of the last validation: a bar shows them until the next one
        plain = dict(highlight=False, markup=False, emoji=False, soft_wrap=True)
        kind = dict(force_jupyter=False, force_terminal=self._is_terminal)
        self._console = Console(file=self._output, **kind, **plain)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
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

    @property
    def unread(self) -> bool:
        """Whether the program that reads the output has closed it, as `head` does in `... | head`."""
        return self._output.unread

    def say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text)

    def words(self, row: dict) -> str:
        """Return a row of metrics, {name: value}, as one line: loss, learning rate, speed, validation, time left.

        The line also has the model FLOPs utilisation (mfu), and the epoch of each source of a mixture, if the row has
        them. If the row has no `tokens_per_second`, the speed and the remaining time are "-".
        """
        share = f"{row['accuracy']:.1%} right" if "accuracy" in row else f"{row['loss'] / math.log(2):.3f} bits/token"
        rate = row.get("tokens_per_second")
        left = "-" if rate is None else f"{(self._steps - row['step']) * self._tokens_per_step / rate:,.0f} s"
        words = f"loss {row['loss']:.4f} ({share})  lr {row['learning_rate']:.2e}"
        words += f"  {'-' if rate is None else f'{rate:,.0f}'} tokens/s"
        words += f"  mfu {row['mfu']:.1%}" if "mfu" in row else ""
        words += f"  held out {row['heldout_loss']:.4f}" if "heldout_loss" in row else ""
        bits = row.get("heldout_bits_per_byte", math.nan)
        words += "" if math.isnan(bits) else f" ({bits:.3f} bits/byte)"
        words += f"  valid {row['valid_accuracy']:.1%} right" if "valid_accuracy" in row else ""
        epochs = [
            f"{name.removeprefix('epoch/')} {value:.2f}" for name, value in row.items() if name.startswith("epoch/")
        ]
        words += f"  epochs: {', '.join(epochs)}" if epochs else ""
        return words + f"  {left} left"

    def update(self, row: dict) -> None:
        """Show a row of metrics, {name: value}: next to the progress bar in a terminal, otherwise as a line."""
        self._validated |= {name: row[name] for name in VALIDATED if name in row}
        if self._bar:
            self._bar.update(self._task, completed=row["step"], description=self.words(self._validated | row))
        elif not self._quiet:
            self._console.print(f"step {row['step']}/{self._steps}  {self.words(row)}")


class _Output:
    """Writes text to `stream`, and ignores write errors. `unread` becomes True when the reader has closed `stream`."""

    def __init__(self, stream):
        self._stream, self.unread = stream, False

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, function, *arguments) -> None:
        try:
            function(*arguments)
        except OSError as error:
            self.unread = self.unread or isinstance(error, BrokenPipeError)
            drop_output()

    def __getattr__(self, name):
        return getattr(self._stream, name)
