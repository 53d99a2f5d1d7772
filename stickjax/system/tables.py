"""Print tables in terminals of any width without cutting words, and store a table as one NumPy array per column."""

import html
import io
import math
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Print a table of the Python package rich. If the terminal is so narrow that words are cut, print a cell per line.

    Square brackets in a cell are printed unchanged: they are not read as markup.

    >>> table = Table("run", "loss", title="training")
    >>> table.add_row("a-name-of-many-letters" * 20, "2.5")
    >>> print_table(table)  # doctest: +ELLIPSIS
    training
    run: a-name-of-many-letters...
      loss: 2.5
    """
    options = dict(highlight=False, markup=False, emoji=False)
    console, tried = Console(**options), io.StringIO()
    names = [str(column.header).replace("\n", " ") for column in table.columns]
    rows = list(zip(*(map(str, column.cells) for column in table.columns), strict=True))
    Console(**options, width=console.width, file=tried).print(table)
    if all(word in tried.getvalue() for cells in (names, *rows) for cell in cells for word in cell.split()):
        console.print(table)
        return
    print(table.title or "")
    for first, *cells in rows:
        print(f"{names[0]}: {first}" if names[0] else first)
        for name, cell in zip(names[1:], cells, strict=True):
            print(f"  {name}: {cell}")
    if table.caption:
        print(table.caption)


class Columns(dict):
    """A table whose columns are NumPy arrays: {name of a column: array}. All arrays have the same length.

    Its repr is the table as text. If the table has more than SHOWN rows, the text has only the first and the last rows.
    If pandas is installed, `pandas.DataFrame(columns)` converts the table to a data frame.

    >>> Columns.of([{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "rate": 7.0}])
    step  loss  rate
       1   2.5   nan
       2  2.25     7
    """

    SHOWN = 10  # a longer table is shown with only this number of rows

    @classmethod
    def of(cls, rows: Iterable[dict]) -> "Columns":
        """Make a table from rows. A row is {name of a column: value}. A missing value becomes NaN."""
        rows = list(rows)
        names = dict.fromkeys(name for row in rows for name in row)
        return cls({name: np.array([row.get(name, math.nan) for row in rows]) for name in names})

    def _cells(self) -> list[list[str]]:
        """Return the cells to show as text: first the list of the column names, then one list for each row to show.

        If the table is long, only the first and the last rows are shown, with a row of "..." between them.
        """
        count, half = len(next(iter(self.values()), ())), self.SHOWN // 2
        which = range(count) if count <= self.SHOWN else [*range(half), None, *range(count - half, count)]
        return [list(self), *(["..." if i is None else _cell(column[i]) for column in self.values()] for i in which)]

    def __repr__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(word.rjust(n) for word, n in zip(row, widths, strict=True)) for row in cells)
        return "\n".join(lines) or "an empty table"

    def _repr_html_(self) -> str:
        head, *rows = ([html.escape(word) for word in row] for row in self._cells())
        lines = [f"<th>{'</th><th>'.join(head)}</th>", *(f"<td>{'</td><td>'.join(row)}</td>" for row in rows)]
        return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def _cell(value) -> str:
    return f"{value:.5g}" if isinstance(value, np.floating) else str(value)
