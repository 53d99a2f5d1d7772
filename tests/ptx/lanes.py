"""PTX instructions that exchange registers between the lanes of a warp, and instructions on bits and bytes.

A unit `u` is up to four warps of a block, whose lanes execute each instruction together (see machine.py).
"""

import numpy as np

from .arithmetic import WARP
from .decode import instruction
from .faults import Fault


def _lanes_present(u, mask, text, members) -> np.ndarray:
    """Return a bool array [warps, 32] that says which lanes execute the instruction `text`.

    `mask` [lanes] says which lanes of the unit `u` execute the instruction; None: all. `members` is the member mask of
    the instruction: bit i is set if lane i of the warp must execute it. Raises Fault if the lanes that execute the
    instruction are not the lanes of the member mask.
    """
    present = (np.ones(u.lanes, bool) if mask is None else mask).reshape(-1, WARP)
    members = np.broadcast_to(np.asarray(members, np.uint32), (u.lanes,)).reshape(-1, WARP)
    is_named = (members[:, :, None] >> np.arange(WARP, dtype=np.uint32)) & np.uint32(1) == 1  # [warps, by, lane]
    if (present[:, :, None] & is_named & ~present[:, None, :]).any():
        raise Fault(f"{u.name}: the member mask names lanes that do not execute this instruction: {text}")
    if (present[:, :, None] & ~is_named & present[:, None, :]).any():
        raise Fault(f"{u.name}: the member mask does not name all lanes that execute this instruction: {text}")
    return present


@instruction(r"shfl\.sync\.(?P<how>bfly|idx|up|down)\.b32")
def shuffle(decoder, x, match):
    target, source, by, clamp, members = x.operands
    how = match["how"]
    targets = target.parts if target.kind == "pair" else (target,)
    write = decoder.write(targets[0], "b32")
    inside_to = decoder.write(targets[1], "pred") if len(targets) == 2 else None
    source, by, clamp, members = (decoder.read(o, "u32") for o in (source, by, clamp, members))

    def run(u, mask):
        _lanes_present(u, mask, x.text, members(u))
        lane = np.arange(u.lanes, dtype=np.int64) % WARP
        first = np.arange(u.lanes, dtype=np.int64) - lane
        b, c = np.asarray(by(u), np.int64) & 31, np.asarray(clamp(u), np.int64)
        segment, limit = (c >> 8) & 31, c & 31
        most = (lane & segment) | (limit & ~segment)
        least = lane & segment
        partner = {"bfly": lane ^ b, "idx": least | (b & ~segment), "up": lane - b, "down": lane + b}[how]
        inside = partner >= most if how == "up" else partner <= most
        partner = np.where(inside, partner, lane)
        if mask is not None and not mask[first + partner][mask].all():
            raise Fault(f"{u.name}: reads a register of a lane that does not execute this shuffle: {x.text}")
        write(u, mask, np.asarray(np.broadcast_to(source(u), (u.lanes,)))[first + partner])
        if inside_to:
            inside_to(u, mask, inside)

    return run


@instruction(r"elect\.sync")
def elect(decoder, x, match):
    """Decode instruction x, an elect.sync, into the function that executes it.

    An elect.sync chooses one lane of each warp: the lowest lane that executes it.
    """
    target, members = x.operands
    leader, chosen = target.parts
    members = decoder.read(members, "u32")
    writes = decoder.write(leader, "b32"), decoder.write(chosen, "pred")

    def run(u, mask):
        lowest = np.repeat(_lanes_present(u, mask, x.text, members(u)).argmax(1), WARP)
        writes[0](u, mask, lowest.astype(np.uint32))
        writes[1](u, mask, np.arange(u.lanes) % WARP == lowest)

    return run


@instruction(r"vote\.sync\.(?:(?P<how>any|all)\.pred|ballot\.b32)")
def vote(decoder, x, match):
    target, source, members = x.operands
    source, members = decoder.read(source, "pred"), decoder.read(members, "u32")
    how = match["how"]
    write = decoder.write(target, "pred" if how else "b32")

    def run(u, mask):
        present = _lanes_present(u, mask, x.text, members(u))
        votes = np.broadcast_to(source(u), (u.lanes,)).reshape(-1, WARP)
        votes = votes | ~present if how == "all" else votes & present
        if not how:
            weights = np.uint64(1) << np.arange(WARP, dtype=np.uint64)
            result = (votes * weights).sum(1).astype(np.uint32)
        else:
            result = votes.any(1) if how == "any" else votes.all(1)
        write(u, mask, np.repeat(result, WARP))

    return run


@instruction(r"bfe\.(?P<kind>[us]32)")
def bit_field(decoder, x, match):
    """Decode instruction x, a bfe, which extracts a field of bits from a number, into the function that executes it.

    For a signed type, the highest bit of the field is its sign.
    """
    kind = match["kind"]
    write, value = decoder.write(x.operands[0], kind), decoder.read(x.operands[1], kind)
    start, length = (decoder.read(o, "u32") for o in x.operands[2:])

    def run(u, mask):
        a, b, c = (np.asarray(read(u), np.int64) for read in (value, start, length))
        c = np.minimum(c & 255, 32)
        field = a >> np.minimum(b & 255, 63) & (1 << c) - 1
        if kind == "s32":
            field = field - ((field >> np.maximum(c - 1, 0) & 1) << c)
        write(u, mask, field.astype(f"{kind[0].replace('s', 'i')}4"))

    return run


@instruction(r"lop3\.b32")
def three_input_logic(decoder, x, match):
    """Decode instruction x, a lop3, into the function that executes it.

    A lop3 computes a bitwise function of three operands. The last operand is its table: if the bits of the operands are
    a, b and c, the result is bit 4 a + 2 b + c of the table.
    """
    write = decoder.write(x.operands[0], "b32")
    reads = [decoder.read(o, "b32") for o in x.operands[1:4]]
    table = int(x.operands[4].value)

    def run(u, mask):
        a, b, c = (np.asarray(read(u), np.uint32) for read in reads)
        result = np.uint32(0)
        for i in range(8):
            if table >> i & 1:
                bits = [v if i & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1))]
                result = result | (bits[0] & bits[1] & bits[2])
        write(u, mask, result)

    return run


@instruction(r"prmt\.b32")
def permute_bytes(decoder, x, match):
    """Decode instruction x, a prmt, into the function that executes it.

    A prmt makes a register from four bytes, which it selects from the eight bytes of two registers. The last operand
    has four bits for each byte of the result. The lowest three of these bits are the number of the selected byte. If
    the fourth bit is 0, the byte of the result is the selected byte. If the fourth bit is 1, the byte of the result is
    eight copies of the highest bit of the selected byte.
    """
    write, a, b, choice = decoder.write(x.operands[0], "b32"), *(decoder.read(o, "b32") for o in x.operands[1:])

    def run(u, mask):
        low, high, chosen = (np.asarray(read(u), np.uint64) for read in (a, b, choice))
        both, result = low | high << np.uint64(32), np.uint64(0)
        for i in range(4):
            pick = chosen >> np.uint64(4 * i)
            byte = both >> ((pick & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            byte = np.where(pick & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
            result = result | byte << np.uint64(8 * i)
        write(u, mask, result.astype(np.uint32))

    return run
