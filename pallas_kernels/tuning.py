"""Read the tile sizes of kernels for each chip and op from the file tuned.json.

For each chip and op, the file has a list of entries. An entry fits a call if every size of the call is at most its
bound in "up_to", such as T in "up_to": {"T": 64}. A size without a bound always fits. The first entry that fits is
used. A chip that has no list for an op uses the list of the chip "any".

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

    `chip` is the name of a GPU generation, such as "sm_90" for compute capability 9.0. `op` is the name of a list in
    the file, such as "stick_breaking". `sizes` are the sizes of the call, with the names that "up_to" has in the file,
    such as T. The result is the first entry of the list that fits the sizes. Raise LookupError if no entry fits.

    >>> tuned("sm_90", "stick_breaking", T=1000, width=256)["tiles"]
    [128, 64]
    """
    table = _table()
    for entry in table.get(chip, {}).get(op) or table["any"][op]:
        if all(sizes[name] <= most for name, most in entry["up_to"].items()):
            return entry
    raise LookupError(f"tuned.json has no entry for op={op!r}, chip={chip!r} that fits a call with the sizes {sizes}")
