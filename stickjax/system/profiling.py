"""Write a profiler trace of a few steps of a training run. The trace shows where a step spends its time."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from stickjax.system.disk import remove, writing

STEPS = 3  # the number of steps in a trace
WARMUP = 3  # the number of steps before the trace, if the run has enough steps


class StepTrace(contextlib.AbstractContextManager):
    """A context for a training loop that writes a profiler trace of STEPS training steps into a folder.

    The loop calls `before` and `after` for each step. The trace begins after WARMUP steps of the loop, or earlier if
    the loop has fewer than WARMUP + STEPS steps. The trace is written after its last step, or at the end of the `with`
    block if the run stops earlier. Then `say` prints which steps were traced.

    Args:
      folder: the folder for the trace; None: nothing is traced.
      first: the number of training steps that were done before this loop. It is not 0 if a run is resumed.
      last: the number of training steps that are done when the loop ends, including the `first` steps.
      say: a function that prints one line of text.
    """

    def __init__(self, folder: Path | None, first: int, last: int, say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._begin = max(first, min(first + WARMUP, last - STEPS))
        self._begun = self._done = None  # numbers of done steps: when the trace began, and now

    def before(self, step: int) -> None:
        """Start the trace if the next step is the first step to trace. Call this before each step.

        `step` is the number of training steps that are done.
        """
        if self._folder and step == self._begin:
            jax.profiler.start_trace(str(self._folder))
            self._begun = self._done = step

    def after(self, step: int) -> None:
        """Stop and write the trace if this step was the last step to trace. Call this after each step.

        `step` is the number of training steps that are done, including this step.
        """
        if self._begun is not None:
            self._done = step
            if step == self._begun + STEPS:
                self._stop()

    def __exit__(self, *error) -> None:
        if self._begun is not None:
            self._stop()
        elif self._folder and self._done is None:
            self._say(f"no step was traced: the run ended before step {self._begin + 1}")

    def _stop(self) -> None:
        begun, self._begun = self._begun, None
        stop_trace(self._folder)
        steps = f"steps {begun + 1} to {self._done}" if self._done > begun else "no complete step"
        self._say(f"{self._folder} has the trace of {steps}")


def stop_trace(folder: Path) -> None:
    """Stop the trace that `jax.profiler.start_trace(folder)` has started, and write its files into the folder.

    If the files cannot be written, delete the incomplete files and raise OSError.
    """
    before = set(folder.rglob("*"))
    try:
        with writing(folder):
            jax.profiler.stop_trace()
    except OSError:
        for path in set(folder.rglob("*")) - before:
            remove(path)
        raise
