"""The result file of a GPU run. Every row is written as soon as it is measured, and a later run does not repeat it."""

import functools
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from . import report
from .report import Row

HERE = Path(__file__).parent
MUST_MATCH = ("code", "device", "jax", "quick")  # a run continues an earlier file only if all of these are equal
LEFT_OUT = "left out"  # the key in `extra` of a row for which no time was left; such a row runs the next time


@functools.cache
def code() -> str:
    """Return a fingerprint of all files of this repository that a row depends on."""
    files = [p for folder in (HERE, HERE.parent / "pallas_kernels") for p in folder.rglob("*") if _is_source(p)]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(HERE.parent)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _is_source(path: Path) -> bool:
    return path.suffix == ".py" or path.name == "tuned.json"


class Record:
    """The rows of a run by (part, case, contestant), in the order in which they were first added.

    `finish` adds the ratios and a summary; its result is written to the file.
    """

    def __init__(self, path: Path, info: dict, finish: Callable[[list[Row]], list[Row]], *, fresh: bool = False):
        self.path, self.info, self.finish = Path(path), info, finish
        self.rows: dict[tuple[str, str, str], Row] = {} if fresh else {_key(row): row for row in self._before()}

    def _before(self) -> list[Row]:
        """Return the rows of the earlier run; none if a field of MUST_MATCH differs there."""
        try:
            before = json.loads(self.path.read_text())
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise ValueError(f"{self.path} is no JSON ({error}); --fresh starts over") from None
        others = [name for name in MUST_MATCH if before.get(name) != self.info[name]]
        if others:
            print(f"{self.path} is of other {', '.join(others)}: this run starts over", file=sys.stderr)
            return []
        rows = [Row.from_dict(row) for row in before["rows"]]
        rows = [row for row in rows if row.part != "summary" and LEFT_OUT not in row.extra]
        print(f"{len(rows)} rows are in {self.path} and do not run again; --fresh starts over", file=sys.stderr)
        return rows

    def find(self, part: str, case: str, contestant: str) -> Row | None:
        return self.rows.get((part, case, contestant))

    def add(self, row: Row) -> None:
        self.rows[_key(row)] = row
        self.write()

    def finished(self) -> list[Row]:
        return self.finish(list(self.rows.values()))

    def write(self) -> None:
        report.write_json(self.path, self.info, self.finished())


def _key(row: Row) -> tuple[str, str, str]:
    return row.part, row.case, row.contestant
