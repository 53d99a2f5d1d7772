"""Tile sizes for each chip and op. tuned.json has a list of entries {"up_to": bounds, ..} for each chip and op.

The first entry whose bounds hold is taken. A chip without its own list takes the list of "any". The bounds form
buckets, so a length that was never seen before has an entry too. Kernels refuse a call that exceeds the last bounds.
"by" says where an entry comes from: a rule, a static count, or a measurement with its chip and date.
"""

import functools
import json
from importlib import resources


@functools.cache
def _table() -> dict:
    return json.loads((resources.files(__package__) / "tuned.json").read_text())


def tuned(chip: str, op: str, **sizes: int) -> dict:
    """Return the first entry of an op on a chip whose bounds hold. Raise LookupError if there is none.

    >>> tuned("sm_90", "stick_breaking", T=1000, width=256)["tiles"]
    [128, 64]
    """
    table = _table()
    for entry in table.get(chip, {}).get(op) or table["any"][op]:
        if all(sizes[name] <= most for name, most in entry["up_to"].items()):
            return entry
    raise LookupError(f"no entry of {op} for {chip} fits {sizes}")
