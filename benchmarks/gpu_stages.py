"""The checks of the GPU benchmark, for each call of an op in `gpu_cases.py`. They have three stages.

"lower": JAX can lower the call for this GPU. "correct": its results agree with the reference, and two runs give the
same bits. "exit": a call with `skip_below`, which stops early, gives the same bits in RUNS runs.

Programs are lowered one after the other. At the same time, threads compile the lowered programs and compute the results
of the reference, so that the first kernels run soon.
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
# {stage: deadline, in seconds after the start of the run}. `Checks.chosen` begins no row of the stage later. The next
# run measures the rows that are left out. `Checks.others` runs after the timing and has the deadline of the timing.
ENDS = {LOWER: 210, CORRECT: 280, EXIT: 310}
RUNS = 1000  # how often the stage "exit" repeats a call


class Checks:
    """The three stages of checks. Each check adds a row to the record of `run`.

    `wanted(stage, name)` returns whether to check the call `name` of `gpu_cases` in this stage.
    """

    def __init__(self, run: Run, wanted: Callable[[str, str], bool]):
        names = QUICK if run.quick else tuple(CALLS)
        exits = tuple(name for name in EXITS if not run.quick or name in QUICK)
        self.run, self.wanted = run, wanted
        self.names = {LOWER: tuple(dict.fromkeys(names + exits)), CORRECT: names, EXIT: exits}
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._compiled: dict[tuple[str, str], Future] = {}
        self._expected: dict[str, Future] = {}

    def chosen(self) -> None:
        """Check each call with the kernel that its op chooses by default. A stage ends before the next one begins."""
        for stage in STAGES:
            self.run.until(ENDS[stage])
            for name in self._wanted(stage):
                self._row(stage, name, _call(name).implementations()[0])
        self.close()

    def others(self) -> None:
        """Check each call with the kernels that could run it but that the dispatch does not choose.

        All stages of a call run before the next call.
        """
        for name in self.names[LOWER]:
            for implementation in _call(name).implementations()[1:]:
                for stage in STAGES:
                    if name in self._wanted(stage):
                        self._row(stage, name, implementation)
            self._forget()

    def close(self) -> None:
        """Stop the threads and drop the compiled programs. No thread may run during the timing or after Ctrl-C."""
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
        """Lower the call `name` with an implementation, and compile it in a thread. Return a future of the program."""
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
    """Return the inputs (cotangent, *arrays) of the call `name`: new arrays, which always have the same numbers."""
    return _call(name).inputs(jax.random.key(0))


def _expected(name: str):
    """Compute the call `name` with the reference in fp32. Return (outputs, gradients), copied to the host."""
    return jax.device_get(_call(name).program("reference")(*gpu_check.fp32(_inputs(name))))
