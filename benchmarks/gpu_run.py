"""The rows of one run on a GPU: until the deadline, whatever a contestant raises becomes its row's note."""

import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax

from . import cost
from .gpu_check import Errors
from .report import Row
from .timing import Times, forward_backward, rotating

DEADLINE = 480  # seconds
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


class Run:
    """Collects rows, in `rows` as they come: a caller that gives up has those so far."""

    def __init__(self, ceilings: cost.Ceilings, seconds: float, rows: list[Row]):
        self.rows, self.ceilings, self.seconds = rows, ceilings, seconds
        self.end = time.monotonic() + DEADLINE

    def row(self, part: str, case: str, contestant: str, make: Callable[[], dict]) -> Row:
        """A row of the fields that `make()` gives, or of the reason why it did not."""
        # If something hangs, it is the last one printed.
        print(f"{part}: {case}, {contestant}", file=sys.stderr, flush=True)
        try:
            self.require_time()
            self.rows.append(Row(part, case, contestant, **make()))
        except Exception as error:  # out of memory, a peer that does not run here: said in the row, not hidden
            self.failed(part, case, contestant, error)
        return self.rows[-1]

    def require_time(self) -> None:
        if time.monotonic() > self.end:
            raise TimeoutError(f"left out after {DEADLINE} s")

    def failed(self, part: str, case: str, contestant: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:90]
        self.rows.append(Row(part, case, contestant, extra={"failed": reason}))

    def checked(self, part: str, case: str, contestant: str, dtype, check: Callable[[], Errors]) -> bool:
        """A row of the errors; whether they are within the tolerances. A failed check does not pass."""

        def make():
            found = check()
            return dict(extra=found.extra() | {"passed": "yes" if found.passes(dtype) else "NO"})

        return self.row(part, case, contestant, make).extra.get("passed") == "yes"

    def passes(self, case: Case, name: str, measure: Callable[[str], Times], extra: dict | None = None) -> None:
        """A row for every pass: TFLOP/s by the operations of the case, share of the larger limit."""
        for passes, work in case.work.items():

            def make(passes=passes, work=work):
                times = measure(passes)
                limit = max(work.limits(self.ceilings).values())
                rates = {"TFLOP/s": work.flops / times.median / 1e9, "of limit": limit / times.median}
                return dict(milliseconds=times.median, best=times.best, extra=rates | (extra or {}))

            self.row(case.part, f"{case.name} {passes}", name, make)

    def jax(self, case: Case, name: str, function: Callable, extra: dict | None = None, options=None) -> None:
        """`options` are the compiler's."""

        def measure(passes):
            return rotating(*to_rotate(function, case, passes, options), seconds=self.seconds)

        self.passes(case, name, measure, extra)

    def torch(self, case: Case, peer: Callable, shape: dict) -> None:
        self.passes(case, peer.__name__, partial(peer, shape, seconds=self.seconds))

    def limits(self, case: Case) -> None:
        for passes, work in case.work.items():
            for name, milliseconds in work.limits(self.ceilings).items():
                self.rows.append(Row(case.part, f"{case.name} {passes}", name, milliseconds))


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
