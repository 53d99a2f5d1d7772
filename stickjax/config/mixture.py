"""The value of the config field `data.mixture`: a table with a row (source, path, weight) for each source of text."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from stickjax.config.fields import checked, shown

_ROW = "SOURCE:PATH:WEIGHT or SOURCE:WEIGHT"


class Part(NamedTuple):
    """A row of the table of a mixture.

    `source`: the name of a source, as in the config field `data.source`. `path`: the file or folder that the source
    reads, or None. `weight`: a number above 0.
    """

    source: str
    path: str | None
    weight: float

    def __str__(self) -> str:
        words = self.source, self.path, f"{self.weight:.15g}"
        return ":".join(word for word in words if word is not None)


def mixture_of(value: Any) -> tuple[Part, ...] | None:
    """Convert a value of the config field `data.mixture` to the table of a mixture, and check it. None stays None.

    `value` is a list or tuple of rows (source, path, weight), or a text as on the command line. In a text, a row is
    SOURCE:PATH:WEIGHT or SOURCE:WEIGHT, and commas separate the rows. So a path that contains a comma must be given in
    a list.

    Raises ValueError if `value` has another form or no rows, if a weight is not a number above 0, or if two rows have
    the same source and path.

    >>> mixture_of("text:books:5,stdlib:2")
    (Part(source='text', path='books', weight=5.0), Part(source='stdlib', path=None, weight=2.0))
    >>> mixture_of([("text", "books", 0)])
    Traceback (most recent call last):
    ValueError: mixture=[('text', 'books', 0)]: weight=0.0 must be above 0
    """
    if value is None:
        return None
    try:
        rows = [_row(text) for text in value.split(",")] if isinstance(value, str) else value
        if not isinstance(rows, list | tuple) or not rows:
            raise ValueError("data.mixture must be a list with a row (source, path, weight) for every source")
        parts = tuple(_part(row) for row in rows)
        for i, part in enumerate(parts):
            if part[:2] in [other[:2] for other in parts[:i]]:
                raise ValueError(
                    f"two rows have the source {part.source!r} and the path {part.path!r}; "
                    "use one row with the sum of the weights"
                )
    except ValueError as error:
        raise ValueError(f"mixture={shown(value)}: {error}") from error
    return parts


def names_of(table: Sequence[Part]) -> list[str]:
    """Return a short name for each row of a mixture, for the names of metrics.

    The name is the name of the file or folder of the row, up to the first dot. If this is empty, or if the row has no
    path, the name is the source. If several rows would have the same name, the number of the row, counted from 1, is
    added to each of these names.

    >>> names_of(mixture_of("text:data/books.txt:5,text:more/books:3,stdlib:2"))
    ['books.1', 'books.2', 'stdlib']
    """
    names = [PurePath(part.path).name.partition(".")[0] or part.source if part.path else part.source for part in table]
    return [f"{name}.{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def _row(text: str) -> tuple[str, str | None, float]:
    """Split the text "SOURCE:PATH:WEIGHT" or "SOURCE:WEIGHT" of a row, and return (source, path or None, weight).

    The path may contain colons.
    """
    head, _, weight = text.strip().rpartition(":")
    source, _, path = head.partition(":")
    try:
        number = float(weight)
    except ValueError as error:
        raise ValueError(f"weight={shown(weight)} of {shown(text)} must be a number; a row is {_ROW}") from error
    if not source:
        raise ValueError(f"{shown(text)} names no source; a row is {_ROW}")
    return source, path or None, number


def _part(row: Any) -> Part:
    if not isinstance(row, list | tuple) or len(row) != 3:
        raise ValueError(f"{shown(row)} is not a row (source, path, weight)")
    source, path, weight = row
    return Part(
        checked("source", source, (str,), {}),
        checked("path", path, (str, type(None)), {}),
        checked("weight", weight, (float,), {"above": 0}),
    )
