"""The checks at the beginning of a GPU run: each call lowers, agrees with the reference, and repeats to the bit.

Programs are lowered one after the other. Meanwhile threads compile them and compute what the reference expects, so that
the kernels themselves are soon run.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from . import gpu_check
from .gpu_cases import CALLS, EXITS, QUICK
from .gpu_run import Run

LOWER, CORRECT, EXIT = STAGES = ("lower", "correct", "exit")
# Seconds from the beginning of a run after which no row of a stage begins. What is left out runs the next time.
ENDS = {LOWER: 210, CORRECT: 280, EXIT: 310}
RUNS = 1000  # of a call that stops early


class Checks:
    """The stages, of those calls that are `wanted(stage, name)`."""

    def __init__(self, run: Run, wanted: Callable[[str, str], bool]):
        names = QUICK if run.quick else tuple(CALLS)
        exits = tuple(name for name in EXITS if not run.quick or name in QUICK)
        self.run, self.wanted = run, wanted
        self.names = {LOWER: tuple(dict.fromkeys(names + exits)), CORRECT: names, EXIT: exits}
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._compiled: dict[tuple[str, str], Future] = {}
        self._expected: dict[str, Future] = {}

    def chosen(self) -> None:
        """What dispatch chooses for each call, stage by stage."""
        for stage in STAGES:
            self.run.until(ENDS[stage])
            for name in self._wanted(stage):
                self._row(stage, name, _call(name).implementations()[0])
        self.close()

    def others(self) -> None:
        """The other kernels that take a call: all stages of one call after the other."""
        for name in self.names[LOWER]:
            for implementation in _call(name).implementations()[1:]:
                for stage in STAGES:
                    if name in self._wanted(stage):
                        self._row(stage, name, implementation)
            self._forget()

    def close(self) -> None:
        """No thread works on: not while something else is timed, and not after Ctrl-C."""
        self._pool.shutdown(cancel_futures=True)
        self._pool = ThreadPoolExecutor(1)
        self._forget()

    def _forget(self) -> None:
        self._compiled.clear()
        self._expected.clear()

    def _wanted(self, stage: str) -> list[str]:
        return [name for name in self.names[stage] if self.wanted(stage, name)]

    def _row(self, stage: str, name: str, implementation: str) -> None:
        check = {LOWER: self._lower, CORRECT: self._correct, EXIT: self._exit}[stage]
        self.run.row(stage, name, implementation, lambda: dict(extra=check(name, implementation)))

    def _lower(self, name: str, implementation: str) -> dict:
        begun = time.monotonic()
        self._program(name, implementation)
        seconds = time.monotonic() - begun
        if name in self.names[CORRECT]:
            self._reference(name)
        return {"passed": "yes", "seconds": seconds}

    def _correct(self, name: str, implementation: str) -> dict:
        call, program, reference = _call(name), self._program(name, implementation), self._reference(name)
        found = gpu_check.compared(program.result(), reference.result(), _inputs(name))
        return found.extra() | {"passed": "yes" if found.passes(call.dtype) else "NO"}

    def _exit(self, name: str, implementation: str) -> dict:
        runs = 20 if self.run.quick else RUNS
        different = gpu_check.differing(self._program(name, implementation).result(), _inputs(name), runs)
        return {"runs": runs, "unlike the first": different, "passed": "NO" if different else "yes"}

    def _program(self, name: str, implementation: str) -> Future:
        """Lowered now, compiled in a thread."""
        key = name, implementation
        if key not in self._compiled:
            call = _call(name)
            lowered = call.program(implementation).trace(*call.shapes()).lower()
            self._compiled[key] = self._pool.submit(lowered.compile)
        return self._compiled[key]

    def _reference(self, name: str) -> Future:
        if name not in self._expected:
            self._expected[name] = self._pool.submit(_expected, name)
        return self._expected[name]


def _call(name: str):
    return (CALLS | EXITS)[name]


def _inputs(name: str):
    """(cotangent, *arrays), new ones at every call."""
    return _call(name).inputs(jax.random.key(0))


def _expected(name: str):
    """What the reference gives for these numbers in fp32, on the host."""
    return jax.device_get(_call(name).program("reference")(*gpu_check.fp32(_inputs(name))))
