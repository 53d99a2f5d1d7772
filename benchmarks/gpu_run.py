"""Measure the rows of the GPU benchmark until a deadline.

A row is the result of one contestant, such as an implementation of an op, in one case, such as a shape. If a contestant
raises an error, its row records the error, and the next row is measured.
"""

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

HANG_SECONDS = 90  # if one row takes longer, the program ends, because the kernel may never end
MACHINE = ("machine", "ceilings", "matrix product, copy")
PASSES = ("forward", "backward", "forward+backward")


class Case(NamedTuple):
    """One shape of one op, with its cost and its inputs.

    `part`: the part of the benchmark, such as "experts". `name`: the sizes, for the tables. `work`: {pass: its cost},
    for the passes "forward", "backward" and "forward+backward". `sets`: several sets of inputs (cotangent, *arguments),
    which the calls use in turn. All sets together are larger than the L2 cache of the GPU, so that no call finds its
    inputs in the cache.
    """

    part: str
    name: str
    work: dict[str, cost.Cost]
    sets: list[tuple]


def work_of(forward: cost.Cost, both: cost.Cost) -> dict[str, cost.Cost]:
    backward = cost.Cost(both.flops - forward.flops, both.bytes - forward.bytes)
    return dict(zip(PASSES, (forward, backward, both), strict=True))


def to_rotate(function: Callable, case: Case, passes: str, options: dict | None = None) -> tuple[Callable, list]:
    """Return (jitted function, sets of inputs): the arguments with which `timing.rotating` times a pass of `function`.

    `passes`: "forward", "backward" or "forward+backward". For "backward", the forward pass runs here, once for each set
    of inputs. The returned function computes the gradients from the residuals of the forward pass, and the returned
    sets are pairs (residuals, cotangent). `options`: compiler options of XLA.
    """
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
    """Call `report` and end the process if the body of the `with` statement takes longer than `seconds`.

    Nothing else stops a kernel that waits for ever. `leave`: the function that ends the process.
    """

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
    """A run of the GPU benchmark. It measures rows, and adds each row to `record` as soon as it is measured.

    `quick`: measure for a short time, to test that the code runs. `again`: also measure the rows that are already in
    the record.
    """

    def __init__(self, record: Record, *, quick: bool = False, again: bool = False):
        self.record, self.quick, self.again = record, quick, again
        self.seconds = 0.05 if quick else 0.4  # how long one row is timed
        self.begun, self.end = time.monotonic(), float("inf")

    def until(self, seconds: float) -> None:
        """Set the deadline, in seconds after the start of the run. No row begins after the deadline."""
        self.end = self.begun + seconds

    @property
    def rows(self) -> list[Row]:
        return list(self.record.rows.values())

    @cached_property
    def ceilings(self) -> cost.Ceilings:
        """The largest FLOP/s and bytes/s of the machine, measured once, so that all rows have the same limits."""
        size, copied = (256, 2**20) if self.quick else (8192, 2**32)

        def make():
            measured = ceilings(size, jnp.bfloat16, copied, seconds=0.1 if self.quick else 2.0, queued=True)
            return dict(extra=ceiling_row(measured).extra)

        row = self.row(*MACHINE, make)
        if "TFLOP/s" not in row.extra:
            raise RuntimeError(f"the speed of the machine was not measured: {'; '.join(map(str, row.extra.values()))}")
        return cost.Ceilings(1e12 * row.extra["TFLOP/s"], 1e9 * row.extra["GB/s"])

    def row(self, part: str, case: str, contestant: str, make: Callable[[], dict]) -> Row:
        """Return the row with these names from the record. If it is not there, measure the row and add it first.

        `make()` measures the row and returns the other fields of `Row`. If `make()` raises an error, or the deadline
        has passed, the row records this instead. If `self.again` is set, the row is always measured.
        """
        row = self.record.find(part, case, contestant)
        if row is not None and not self.again:
            return row
        print(f"{time.monotonic() - self.begun:4.0f} s  {part}: {case}, {contestant}", file=sys.stderr, flush=True)
        try:
            self.require_time()
            with give_up_after(HANG_SECONDS, partial(self._hangs, part, case, contestant)):
                row = Row(part, case, contestant, **make())
        except Exception as error:  # for example too little memory, or a peer that does not run on this machine
            return self.failed(part, case, contestant, error)
        self.record.add(row)
        return row

    def require_time(self) -> None:
        if time.monotonic() > self.end:
            raise TimeoutError(f"the deadline, {self.end - self.begun:.0f} s after the start, has passed")

    def failed(self, part: str, case: str, contestant: str, error: Exception) -> Row:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:90]
        row = Row(part, case, contestant, extra={LEFT_OUT if isinstance(error, TimeoutError) else "failed": reason})
        self.record.add(row)
        return row

    def _hangs(self, part: str, case: str, contestant: str) -> None:
        """Record and print that a row takes too long. The next run does not measure this row again."""
        self.failed(part, case, contestant, RuntimeError(f"still running after {HANG_SECONDS} s"))
        print(
            f"error: {part}: {case}, {contestant} is still running after {HANG_SECONDS} s, so this run ends; "
            "run the same command again (without --fresh) to measure the other rows",
            file=sys.stderr,
        )

    def checked(self, part: str, case: str, contestant: str, dtype, check: Callable[[], Errors]) -> bool:
        """Run `check` and add a row with the errors that it returns. Return whether the check passes.

        The check passes if the errors are within the tolerances for inputs of type `dtype`, and two runs gave the same
        bits. Return False if `check` raises an error, or if the deadline has passed. If the record has the row already,
        take the result from there and do not run `check`, unless `self.again` is set.
        """

        def make():
            found = check()
            return dict(extra=found.extra() | {"passed": "yes" if found.passes(dtype) else "NO"})

        return self.row(part, case, contestant, make).extra.get("passed") == "yes"

    def passes(self, case: Case, name: str, measure: Callable[[str], Times], extra: Callable = dict) -> None:
        """Time the passes of a case for the contestant `name`, and add one row per pass.

        `measure(pass)` times a pass, such as "forward". A row has the time, the TFLOP/s, the entry "of limit", and the
        entries of `extra()`. "of limit" is the least possible time (the larger of the two numbers in `Cost.limits`),
        divided by the measured time.
        """
        for passes, work in case.work.items():

            def make(passes=passes, work=work):
                times = measure(passes)
                limit = max(work.limits(self.ceilings).values())
                rates = {"TFLOP/s": work.flops / times.median / 1e9, "of limit": limit / times.median}
                return dict(milliseconds=times.median, best=times.best, extra=rates | extra())

            self.row(case.part, f"{case.name} {passes}", name, make)

    def jax(self, case: Case, name: str, function: Callable, extra: Callable = dict, options=None) -> None:
        """Time all passes of a JAX function as the contestant `name`, and add one row per pass.

        `options`: compiler options of XLA. `extra()` returns further entries for the rows.
        """

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
    """Return the rows grouped by case, with the ratios of their times to the times of the peers in the same case.

    `peers`: names of contestants, the most important first. A row is compared with all peers that were timed in its
    case, but not with itself. The field `ratio` is its time divided by the time of the first of these peers. The field
    `extra` has the ratios to the others.
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
