"""Write a profiler trace of a few steps of a training run, to find out what takes the time of a step."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from stickjax.system.disk import remove, writing

STEPS = 3  # the number of steps in a trace
WARMUP = 3  # a long run is traced after this many steps


class StepTrace(contextlib.AbstractContextManager):
    """A context around a training loop, which writes a profiler trace of STEPS training steps into a folder.

    The trace begins after WARMUP steps, or earlier if fewer than WARMUP + STEPS steps are left. It is written after
    its last step, or at the end of the `with` block if the run stops earlier. Then `say` prints which steps were
    traced. The loop calls `before` and `after` for each step.

    Args:
      folder: the folder for the trace; None: nothing is traced.
      first: the number of training steps that were done before this loop, which is not 0 if a run is resumed.
      last: the number of training steps that will be done at the end of the loop.
      say: a function that prints one line of text.
    """

    def __init__(self, folder: Path | None, first: int, last: int, say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._begin = max(first, min(first + WARMUP, last - STEPS))
        self._begun = self._done = None  # number of steps done when the trace began, and number done now

    def before(self, step: int) -> None:
        """Call this before each step. It starts the trace if the next step is the first to trace.

        `step` is the number of training steps that are done.
        """
        if self._folder and step == self._begin:
            jax.profiler.start_trace(str(self._folder))
            self._begun = self._done = step

    def after(self, step: int) -> None:
        """Call this after each step. It stops and writes the trace if this step was the last to trace.

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
