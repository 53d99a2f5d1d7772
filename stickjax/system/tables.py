"""Tables that lose no number, however narrow the terminal is."""

import io

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Print a table without markup; if the terminal is too narrow for a word, print one line per cell.

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
