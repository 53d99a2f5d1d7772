"""The result file of the GPU benchmark: each row is written as soon as it is measured. Later runs add missing rows."""

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
LEFT_OUT = "left out"  # key in `extra` of a row that was not measured before its deadline; the next run measures it


@functools.cache
def code() -> str:
    """Return a hash of the code of `benchmarks` and `pallas_kernels`. If this code changes, a run starts over."""
    files = [p for folder in (HERE, HERE.parent / "pallas_kernels") for p in folder.rglob("*") if _is_source(p)]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(HERE.parent)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _is_source(path: Path) -> bool:
    return path.suffix == ".py" or path.name == "tuned.json"


class Record:
    """The measured rows of a GPU run. They are also written to a JSON file, so that a later run can continue.

    `path`: the JSON file. `info`: facts about the machine and the code, which are written to the file. `finish`: a
    function that adds ratios and a summary to the rows before they are written. `fresh`: ignore the rows that the file
    has from earlier runs. The attribute `rows` is {(part, case, contestant): row}, in the order in which the rows were
    first added.
    """

    def __init__(self, path: Path, info: dict, finish: Callable[[list[Row]], list[Row]], *, fresh: bool = False):
        self.path, self.info, self.finish = Path(path), info, finish
        self.rows: dict[tuple[str, str, str], Row] = {} if fresh else {_key(row): row for row in self._before()}

    def _before(self) -> list[Row]:
        """Return the rows of the file that earlier runs measured.

        The rows of the summary are dropped, and also the rows that were not measured before their deadline (LEFT_OUT).
        Return [] if there is no file, or if a field of MUST_MATCH, such as "device", differs from `info`.
        Raise ValueError if the file is not valid JSON.
        """
        try:
            before = json.loads(self.path.read_text())
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise ValueError(
                f"{self.path} is not valid JSON ({error}); use --fresh without --only to start over"
            ) from None
        others = [name for name in MUST_MATCH if before.get(name) != self.info[name]]
        if others:
            print(f"{self.path} was measured with different {', '.join(others)}: this run starts over", file=sys.stderr)
            return []
        rows = [Row.from_dict(row) for row in before["rows"]]
        rows = [row for row in rows if row.part != "summary" and LEFT_OUT not in row.extra]
        print(
            f"{len(rows)} rows in {self.path} come from earlier runs; use --fresh to measure them again",
            file=sys.stderr,
        )
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
