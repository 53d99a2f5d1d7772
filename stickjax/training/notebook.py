"""Display a run in a notebook: text lines, a progress bar, and a plot of the loss that is updated during the run."""

import base64
import io
import sys
import time

from rich.console import Console
from rich.progress_bar import ProgressBar

from stickjax.config import Config
from stickjax.evaluation.plots import plot_training
from stickjax.training.metrics import read_metrics
from stickjax.training.progress import VALIDATED, Progress

BAR_SECONDS, PICTURE_SECONDS = 0.5, 3.0  # the shortest time between two updates of the bar, and of the plot
PICTURE_SHARE = 0.05  # the largest share of a run's time that is spent on making plots


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook. In an IPython shell in a terminal, return False."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def progress_of(run: str, config: Config, *, quiet: bool) -> Progress:
    """Return the display of the run in the folder `run`: a `NotebookProgress` in a notebook, otherwise a `Progress`.

    With `quiet`, the display shows nothing.
    """
    return NotebookProgress(run, config) if in_notebook() and not quiet else Progress(config, quiet=quiet)


class NotebookProgress(Progress):
    """The display of a run below a notebook cell: text lines, a progress bar, and a plot of the loss.

    The bar line also shows the newest row of metrics. The plot needs matplotlib.
    """

    _is_terminal = False  # a notebook kernel sets FORCE_COLOR, so rich would detect a terminal

    def __init__(self, run: str, config: Config):
        super().__init__(config)
        self._run, self._rows, self._handles, self._next = run, [], {}, {"bar": 0.0, "picture": 0.0}
        try:
            import matplotlib.figure  # noqa: F401, imported before the first step, because it takes a second
        except ImportError:
            self._draws = False
        else:
            self._draws = True

    def update(self, row: dict) -> None:
        # The first call reads metrics.jsonl, which already has `row`, and the earlier rows of a resumed run.
        self._rows = [*self._rows, row] if self._rows else read_metrics(self._run) or [row]
        self._show()

    def __exit__(self, *exception):
        if self._rows:
            self._show(last=True)
        super().__exit__(*exception)

    def _show(self, last: bool = False) -> None:
        begun = time.monotonic()
        if last or begun >= self._next["bar"]:
            self._next["bar"] = begun + BAR_SECONDS
            self._display("bar", {"text/plain": self._bar_line()})
        if self._draws and (last or begun >= self._next["picture"]):
            picture = io.BytesIO()
            plot_training({self._run: self._rows}, picture)
            content = base64.b64encode(picture.getvalue()).decode()
            self._display("picture", {"image/png": content, "text/plain": "the loss of the run"})
            now = time.monotonic()
            self._next["picture"] = now + max(PICTURE_SECONDS, (now - begun) / PICTURE_SHARE)

    def _bar_line(self) -> str:
        text = io.StringIO()
        validated = {name: value for row in self._rows for name, value in row.items() if name in VALIDATED}
        row = validated | self._rows[-1]
        bar = ProgressBar(total=self._steps, completed=row["step"], width=40)
        Console(file=text, force_jupyter=False, force_terminal=False, width=40).print(bar, end="")
        return f"{text.getvalue()} {row['step']}/{self._steps}  {self.words(row)}"

    def _display(self, name: str, content: dict[str, str]) -> None:
        """Show `content`, {MIME type: data}, below the notebook cell, as the bar or as the picture of the display.

        `name` is "bar" or "picture". `content` replaces what an earlier call with the same `name` has shown.
        """
        from IPython.display import display

        if name in self._handles:
            self._handles[name].update(content, raw=True)
        else:
            self._handles[name] = display(content, raw=True, display_id=True)
