"""Sizes that were chosen per chip, from tuned.json: lists of {"up_to": bounds, ..}, of which the first that fits holds.

A chip without a list of its own has that of "any". Bounds make buckets, so that a length never seen before has a value
too; what exceeds the last ones is a call that no kernel takes.
"by" says where an entry comes from: a rule, a static count, or a measurement with its chip and date.
"""

import functools
import json
from importlib import resources


@functools.cache
def _table() -> dict:
    return json.loads((resources.files(__package__) / "tuned.json").read_text())


def tuned(chip: str, op: str, **sizes: int) -> dict:
    """The first entry of an op on a chip whose bounds hold.

    >>> tuned("sm_90", "stick_breaking", T=1000, width=256)["tiles"]
    [128, 64]
    """
    table = _table()
    for entry in table.get(chip, {}).get(op) or table["any"][op]:
        if all(sizes[name] <= most for name, most in entry["up_to"].items()):
            return entry
    raise LookupError(f"no entry of {op} for {chip} fits {sizes}")
