"""Tile sizes of kernels for each chip and op, from the file tuned.json.

For each chip and op, the file has a list of entries {"up_to": bounds, ..}, such as "up_to": {"T": 64}. For a call of
the op, the first entry is taken whose bounds are at least as large as the sizes of the call. So there is an entry for
lengths that were never measured, too. A kernel refuses a call if no entry has bounds that are large enough. A chip
without its own list takes the list of the chip "any".

The field "by" of an entry says where the entry comes from: a rule, a number read from the compiled kernel (such as
spilled registers), or a measurement with its chip and date.
"""

import functools
import json
from importlib import resources


@functools.cache
def _table() -> dict:
    """Return the contents of tuned.json: {chip: {op: list of entries}}."""
    return json.loads((resources.files(__package__) / "tuned.json").read_text())


def tuned(chip: str, op: str, **sizes: int) -> dict:
    """Return the entry of tuned.json with the tile sizes for a call of an op on a chip.

    `chip` is a compute capability, such as "sm_90". `op` is the name of a list in the file, such as "stick_breaking".
    `sizes` are the sizes of the call, by the names that "up_to" has in the file, such as T. The first entry of the list
    is returned whose bounds in "up_to" are at least as large as `sizes`. Raise LookupError if there is none.

    >>> tuned("sm_90", "stick_breaking", T=1000, width=256)["tiles"]
    [128, 64]
    """
    table = _table()
    for entry in table.get(chip, {}).get(op) or table["any"][op]:
        if all(sizes[name] <= most for name, most in entry["up_to"].items()):
            return entry
    raise LookupError(f"tuned.json has no tile sizes of {op} for the chip {chip} and a call of the sizes {sizes}")
