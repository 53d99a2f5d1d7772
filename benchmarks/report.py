"""The rows of a benchmark, and how they are printed as tables and written as JSON."""

import dataclasses
import datetime
import json
import os
import platform
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from .cost import Ceilings
from .timing import Times

PASSES = ("forward", "forward+backward")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: the result of one contestant, such as an implementation of an op, in one case.

    `part`: the part of the benchmark, such as "experts". `case`: the sizes and the pass. `against`: the contestant with
    which this row is compared. `ratio`: the time of this row divided by the time of `against`. But if `at_least` is
    given, `ratio` compares speeds: it is the time of `against` divided by the time of this row. `at_most` and
    `at_least`: bounds on the ratio. `extra`: further results by name.
    """

    part: str
    case: str
    contestant: str
    milliseconds: float | None = None  # median
    best: float | None = None  # the shortest time, in milliseconds
    ratio: float | None = None
    against: str | None = None
    at_most: float | None = None
    at_least: float | None = None
    extra: dict = dataclasses.field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """Whether the ratio is within its bounds; None if the row has no ratio or no bound."""
        if self.ratio is None or (self.at_most is None and self.at_least is None):
            return None
        return self.ratio <= (self.at_most or float("inf")) and self.ratio >= (self.at_least or 0)

    @classmethod
    def timed(cls, part: str, case: str, contestant: str, times: Times, **fields) -> "Row":
        return cls(part, case, contestant, times.median, times.best, **fields)

    @classmethod
    def from_dict(cls, row: dict) -> "Row":
        """Return the row from a dictionary that `to_dict` has returned."""
        return cls(**{name: value for name, value in row.items() if name != "holds"})

    def to_dict(self) -> dict:
        row = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, {})}
        return row | ({} if self.holds is None else {"holds": self.holds})


def compared(
    part: str, case: str, times: dict[str, Times], against: str, bounds: dict[str, float], limits: dict[str, float]
) -> list[Row]:
    """Return the rows of one case: a row for each contestant, and a row for each lower bound of the time.

    `times`: {contestant: its times}. The ratio of a row compares its time with the time of the contestant `against`.
    `bounds`: {contestant: the largest allowed ratio}. `limits`: {name: milliseconds}, the least times that the hardware
    permits, as `cost.Cost.limits` returns them.
    """
    rows = [
        Row.timed(part, case, name, t)
        if name == against
        else Row.timed(part, case, name, t, ratio=t.over(times[against]), against=against, at_most=bounds.get(name))
        for name, t in times.items()
    ]
    return rows + [Row(part, case, name, milliseconds) for name, milliseconds in limits.items()]


def machine() -> dict:
    """Return the date and facts about the machine for the result file: device, number of CPUs, load, JAX version.

    Call this function before the benchmark runs. Then the load comes only from other programs.
    """
    return {
        "machine": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def ceiling_row(ceilings: Ceilings) -> Row:
    extra = {"TFLOP/s": ceilings.flops / 1e12, "GB/s": ceilings.bytes / 1e9}
    return Row("machine", "ceilings", "matrix product, copy", extra=extra)


def write_json(path: str | Path, info: dict, rows: list[Row]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")  # written first, so that `path` is complete even if this process is killed
    new.write_text(json.dumps(info | {"rows": [row.to_dict() for row in rows]}, indent=1) + "\n")
    new.replace(path)


def print_table(rows: list[Row], console: Console | None = None) -> None:
    console = console or Console(width=160, soft_wrap=False)
    for part in dict.fromkeys(row.part for row in rows):
        table = Table("case", "contestant", title=part, title_justify="left")
        for column in ("median ms", "best ms", "ratio over", "bound"):
            table.add_column(column, justify="right")
        table.add_column("")
        last = None
        for row in (r for r in rows if r.part == part):
            if last not in (None, row.case):
                table.add_section()
            table.add_row("" if row.case == last else row.case, row.contestant, *_cells(row))
            last = row.case
        console.print(table)


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:,.3f}" if abs(x) < 1 else f"{x:,.2f}" if x < 1000 else f"{x:,.0f}"


def _cells(row: Row):
    yield from (_number(row.milliseconds), _number(row.best))
    yield _number(row.ratio) if row.against is None else f"{_number(row.ratio)} {row.against}"
    verdict = {True: "yes", False: "[bold]NO[/bold]", None: ""}[row.holds]
    bounds = (("<=", row.at_most), (">=", row.at_least))
    yield " ".join([f"{sign} {bound:.2f}" for sign, bound in bounds if bound is not None] + [verdict])
    values = {k: v if isinstance(v, str) else f"{v:.2e}" if 0 < v < 0.01 else _number(v) for k, v in row.extra.items()}
    yield ", ".join(f"{name} {value}" for name, value in values.items())
