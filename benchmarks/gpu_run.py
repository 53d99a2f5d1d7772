"""The rows of one run on a GPU: until the deadline, whatever a contestant raises becomes its row's note."""

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import cost
from .gpu_check import Errors
from .gpu_record import LEFT_OUT, Record
from .report import Row, ceiling_row
from .timing import Times, ceilings, forward_backward, rotating

HANGS = 90  # seconds: a row that takes longer waits for something that never comes
MACHINE = ("machine", "ceilings", "matrix product, copy")
PASSES = ("forward", "backward", "forward+backward")


class Case(NamedTuple):
    """One shape of one op: what each pass costs, and sets of (cotangent, *arguments), together larger than the L2."""

    part: str
    name: str
    work: dict[str, cost.Cost]
    sets: list[tuple]


def work_of(forward: cost.Cost, both: cost.Cost) -> dict[str, cost.Cost]:
    backward = cost.Cost(both.flops - forward.flops, both.bytes - forward.bytes)
    return dict(zip(PASSES, (forward, backward, both), strict=True))


def to_rotate(function: Callable, case: Case, passes: str, options: dict | None = None) -> tuple[Callable, list]:
    """What `rotating` takes for one pass. The backward pass alone applies a vjp whose residuals are already there."""
    plain = [tuple(arguments) for _, *arguments in case.sets]
    jit = partial(jax.jit, compiler_options=options)
    if passes == "forward":
        return jit(function), plain
    if passes == "forward+backward":
        return forward_backward(function, compiler_options=options), case.sets
    keep = jit(lambda *arguments: jax.vjp(function, *arguments)[1])
    vjps = [keep(*arguments) for arguments in plain]
    structure = jax.tree.structure(vjps[0])
    pull = jit(lambda residuals, cotangent: structure.unflatten(residuals)(cotangent))
    return pull, [(jax.tree.leaves(vjp), cotangent) for vjp, (cotangent, *_) in zip(vjps, case.sets, strict=True)]


@contextlib.contextmanager
def give_up_after(seconds: float, report: Callable[[], None], leave=os._exit) -> Iterator[None]:
    """If the body takes longer, report and end the process: nothing else stops a kernel that waits for ever."""

    def give_up():
        report()
        sys.stdout.flush()
        leave(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Run:
    """Makes rows into a record, as they come; those that are there already only if they run `again`."""

    def __init__(self, record: Record, *, quick: bool = False, again: bool = False):
        self.record, self.quick, self.again = record, quick, again
        self.seconds = 0.05 if quick else 0.4  # for the time of one row
        self.begun, self.end = time.monotonic(), float("inf")

    def until(self, seconds: float) -> None:
        """No row begins later than that after the run began."""
        self.end = self.begun + seconds

    @property
    def rows(self) -> list[Row]:
        return list(self.record.rows.values())

    @cached_property
    def ceilings(self) -> cost.Ceilings:
        """Measured once for the record: the shares of all its rows are of the same limits."""
        size, copied = (256, 2**20) if self.quick else (8192, 2**32)

        def make():
            measured = ceilings(size, jnp.bfloat16, copied, seconds=0.1 if self.quick else 2.0, queued=True)
            return dict(extra=ceiling_row(measured).extra)

        row = self.row(*MACHINE, make)
        if "TFLOP/s" not in row.extra:
            raise RuntimeError(f"without the ceilings of the machine nothing can be timed: {row.extra}")
        return cost.Ceilings(1e12 * row.extra["TFLOP/s"], 1e9 * row.extra["GB/s"])

    def row(self, part: str, case: str, contestant: str, make: Callable[[], dict]) -> Row:
        """A row of the fields that `make()` gives, or of the reason why it did not."""
        row = self.record.find(part, case, contestant)
        if row is not None and not self.again:
            return row
        print(f"{time.monotonic() - self.begun:4.0f} s  {part}: {case}, {contestant}", file=sys.stderr, flush=True)
        try:
            self.require_time()
            with give_up_after(HANGS, partial(self._hangs, part, case, contestant)):
                row = Row(part, case, contestant, **make())
        except Exception as error:  # out of memory, a peer that does not run here: said in the row, not hidden
            return self.failed(part, case, contestant, error)
        self.record.add(row)
        return row

    def require_time(self) -> None:
        if time.monotonic() > self.end:
            raise TimeoutError(f"no time left after {self.end - self.begun:.0f} s")

    def failed(self, part: str, case: str, contestant: str, error: Exception) -> Row:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:90]
        row = Row(part, case, contestant, extra={LEFT_OUT if isinstance(error, TimeoutError) else "failed": reason})
        self.record.add(row)
        return row

    def _hangs(self, part: str, case: str, contestant: str) -> None:
        """The next run goes on behind this row."""
        self.failed(part, case, contestant, RuntimeError(f"still running after {HANGS} s"))
        print(f"error: still running after {HANGS} s; run the same command again to go on", file=sys.stderr)

    def checked(self, part: str, case: str, contestant: str, dtype, check: Callable[[], Errors]) -> bool:
        """A row of the errors; whether they are within the tolerances. A failed check does not pass."""

        def make():
            found = check()
            return dict(extra=found.extra() | {"passed": "yes" if found.passes(dtype) else "NO"})

        return self.row(part, case, contestant, make).extra.get("passed") == "yes"

    def passes(self, case: Case, name: str, measure: Callable[[str], Times], extra: Callable = dict) -> None:
        """A row for every pass: TFLOP/s by the operations of the case, share of the larger limit, and `extra()`."""
        for passes, work in case.work.items():

            def make(passes=passes, work=work):
                times = measure(passes)
                limit = max(work.limits(self.ceilings).values())
                rates = {"TFLOP/s": work.flops / times.median / 1e9, "of limit": limit / times.median}
                return dict(milliseconds=times.median, best=times.best, extra=rates | extra())

            self.row(case.part, f"{case.name} {passes}", name, make)

    def jax(self, case: Case, name: str, function: Callable, extra: Callable = dict, options=None) -> None:
        """`options` are the compiler's."""

        def measure(passes):
            return rotating(*to_rotate(function, case, passes, options), seconds=self.seconds)

        self.passes(case, name, measure, extra)

    def torch(self, case: Case, peer: Callable, shape: dict) -> None:
        self.passes(case, peer.__name__, partial(peer, shape, seconds=self.seconds))

    def limits(self, case: Case) -> None:
        for passes, work in case.work.items():
            for name, milliseconds in work.limits(self.ceilings).items():
                self.record.add(Row(case.part, f"{case.name} {passes}", name, milliseconds))


def with_ratios(rows: list[Row], peers: tuple[str, ...]) -> list[Row]:
    """The rows, case by case in the order they came; times over those of every peer that ran in the same case.

    `ratio` is over the first of `peers` that did, the others stand in `extra`.
    """
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault((row.part, row.case), []).append(row)
    return [row for case in cases.values() for row in _compared(case, peers)]


def _compared(case: list[Row], peers: tuple[str, ...]):
    times = {row.contestant: row.milliseconds for row in case if row.milliseconds}
    present = [peer for peer in peers if peer in times]
    for row in case:
        others = [peer for peer in present if peer != row.contestant]
        if row.milliseconds is None or row.contestant.startswith("limit") or not others:
            yield row
            continue
        against, *rest = others
        extra = row.extra | {f"over {peer}": row.milliseconds / times[peer] for peer in rest}
        yield dataclasses.replace(row, ratio=row.milliseconds / times[against], against=against, extra=extra)
