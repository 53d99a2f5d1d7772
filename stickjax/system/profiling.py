"""A profiler trace of a few steps of a training run."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from stickjax.system.disk import remove, writing

STEPS = 3  # the number of steps in a trace
WARMUP = 3  # a long run is traced after this many steps


class StepTrace(contextlib.AbstractContextManager):
    """A context that writes a profiler trace of STEPS training steps; of all steps, if the run is shorter.

    The trace begins after WARMUP steps, or earlier if the run would end before the trace is complete. The trace is
    written after its last step, or at the end of the `with` block if the run stops earlier.

    Args:
      folder: the folder for the trace; None: nothing is traced.
      first: the number of steps that are done when the run starts or is resumed.
      last: the number of steps that are done when the run ends.
      say: a function that prints one line, which names the traced steps.
    """

    def __init__(self, folder: Path | None, first: int, last: int, say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._begin = max(first, min(first + WARMUP, last - STEPS))
        self._begun = self._done = None  # steps done when the trace began, and steps done now

    def before(self, step: int) -> None:
        """Start the trace if it begins with the next step. Call this before each step; `step` steps are done."""
        if self._folder and step == self._begin:
            jax.profiler.start_trace(str(self._folder))
            self._begun = self._done = step

    def after(self, step: int) -> None:
        """Stop the trace if it has all its steps. Call this after each step; `step` steps are done."""
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
    """Write the trace that `jax.profiler.start_trace(folder)` began.

    If the trace cannot be written, delete its files and raise OSError.
    """
    before = set(folder.rglob("*"))
    try:
        with writing(folder):
            jax.profiler.stop_trace()
    except OSError:
        for path in set(folder.rglob("*")) - before:
            remove(path)
        raise
