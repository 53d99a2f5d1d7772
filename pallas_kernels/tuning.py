"""Tile sizes for each chip and op, from the file tuned.json.

The file has a list of entries {"up_to": bounds, ..} for each chip and op, such as "up_to": {"T": 64}. The first entry
is taken whose bounds are not exceeded by the sizes of a call. A chip without its own list takes the list of "any". The
bounds form buckets, so a length that was never measured has an entry too. Kernels refuse a call that exceeds the last
bounds. "by" says where an entry comes from: a rule, a static count, or a measurement with its chip and date.
"""

import functools
import json
from importlib import resources


@functools.cache
def _table() -> dict:
    """Return the contents of tuned.json: {chip: {op: list of entries}}."""
    return json.loads((resources.files(__package__) / "tuned.json").read_text())


def tuned(chip: str, op: str, **sizes: int) -> dict:
    """Return the first entry in tuned.json for an op on a chip that the sizes of a call do not exceed.

    `sizes` are the sizes of the call by the names in "up_to", such as T=1000. Raise LookupError if no entry fits.

    >>> tuned("sm_90", "stick_breaking", T=1000, width=256)["tiles"]
    [128, 64]
    """
    table = _table()
    for entry in table.get(chip, {}).get(op) or table["any"][op]:
        if all(sizes[name] <= most for name, most in entry["up_to"].items()):
            return entry
    raise LookupError(f"tuned.json has no entry of {op} for {chip} that fits {sizes}")
