"""Convert paths to text that a terminal can print, and values to JSON text that other programs can read."""

import json
import math
import os
from typing import Any


def printable(path: str | os.PathLike) -> str:
    r"""Return a path as one line of printable characters, for messages. Other characters are escaped.

    >>> print(printable("two\nlines"))
    two\nlines
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fspath(path))


def json_text(value: Any, **options) -> str:
    """Return `value` as JSON text. Infinity and NaN are written as null, because JSON has no number for them.

    `value` consists of dictionaries, lists, strings and numbers. `options` are keyword arguments of `json.dumps`.

    >>> json_text({"step": 3, "loss": math.nan})
    '{"step": 3, "loss": null}'
    """

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [finite(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False, **options)
