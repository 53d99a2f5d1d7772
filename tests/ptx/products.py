"""PTX instructions of the tensor cores: matrix products, and loads and stores of matrix fragments.

Hopper's wgmma is asynchronous. Before a thread has waited for the group of a wgmma, the thread must not access the
registers of this wgmma, and must not write to its operands in shared memory. The chip does not define the order in
which a tensor core adds; the machine adds in the order of NumPy.

A unit `u` is up to four warps of a block, whose lanes execute each instruction together (see machine.py).
"""

from functools import cache

import numpy as np

from .arithmetic import WARP
from .barriers import full_warps
from .copies import swizzled
from .decode import SHARED, Operand, UnknownInstruction, bfloat16_to_float32, instruction
from .faults import DivergentBarrier, Fault

WARPGROUP = 128


def _require_warpgroup(u, mask, text: str) -> None:
    if u.lanes != WARPGROUP or not (mask is None or mask.all()):
        raise DivergentBarrier(f"{u.name}: only a part of the warpgroup executes this instruction: {text}")


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """Convert the bits of numbers of type `kind` (bf16, f16 or tf32) to float32."""
    if kind == "bf16":
        return bfloat16_to_float32(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)  # tf32: the machine ignores the lowest 13 bits


@cache
def _accumulator(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, column): the place of each register of each thread in a wgmma accumulator [64, columns].

    Both are integer arrays [registers, 128 threads].
    """
    thread, register = np.arange(WARPGROUP)[None], np.arange(columns // 2)[:, None]
    row = thread // WARP * 16 + thread % WARP // 4 + register // 2 % 2 * 8
    return row, register // 4 * 8 + thread % 4 * 2 + register % 2


@cache
def _fragment() -> tuple[np.ndarray, np.ndarray]:
    """Return (row, column): where each 16-bit number in the registers belongs in a wgmma operand A [64, 16].

    Both are integer arrays [4 registers, 2 halves of a register, 128 threads].
    """
    thread, half, register = np.arange(WARPGROUP), np.arange(2)[:, None], np.arange(4)[:, None, None]
    row = thread // WARP * 16 + thread % WARP // 4 + register % 2 * 8
    return np.broadcast_to(row, (4, 2, WARPGROUP)), thread % 4 * 2 + half + register // 2 * 8


def matrix_bytes(descriptor: int, rows: int, depth: int, is_transposed: bool, text: str) -> np.ndarray:
    """Return the offsets in shared memory of the elements of a wgmma operand, an int array [rows, depth].

    An element has 16 bits. Its offset is the offset of its first byte.

    Args:
      descriptor: the matrix descriptor of the operand, as wgmma gets it.
      rows: the number of rows of A or of columns of B.
      depth: the size of the axis over which the product sums.
      is_transposed: True if the elements with the same depth index are contiguous in memory; False if the elements of
        a row are.
      text: the instruction, for error messages.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    span = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    if descriptor >> 49 & 7:
        raise UnknownInstruction(f"the PTX machine supports no matrix descriptor with a base offset: {text}")
    row, k = np.arange(rows)[:, None], np.arange(depth)[None]
    if not is_transposed:
        if span == 16:
            addresses = start + row // 8 * stride + k // 8 * leading + row % 8 * 16 + k % 8 * 2
        else:
            # The depth of one product lies within one swizzled span; the descriptor's start already contains the offset
            # in the span.
            addresses = start + row // 8 * stride + row % 8 * span + k * 2
    else:
        if span == 16:
            raise UnknownInstruction(f"the PTX machine supports no transposed operand without a swizzle: {text}")
        across = span // 2
        addresses = start + row // across * leading + k // 8 * stride + k % 8 * span + row % across * 2
    return swizzled(addresses, span) - SHARED


@instruction(r"wgmma\.fence\.sync\.aligned")
def wgmma_fence(decoder, x, match):
    def run(u, mask):
        _require_warpgroup(u, mask, x.text)
        u.written.clear()

    return run


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def wgmma_commit(decoder, x, match):
    def run(u, mask):
        _require_warpgroup(u, mask, x.text)
        u.block.clocks.groups[u.block.clocks.tensor + u.index] += 1

    return run


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def wgmma_wait(decoder, x, match):
    pending = x.operands[0].value

    def run(u, mask):
        _require_warpgroup(u, mask, x.text)
        clocks = u.block.clocks
        actor = clocks.tensor + u.index
        done = clocks.groups[actor] - pending
        clocks.wait_for(u.warps, actor, done)
        u.in_flight = {register: group for register, group in u.in_flight.items() if group > done}
        u.results &= u.in_flight.keys()

    return run


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k16\.f32\.(?P<a>bf16|f16)\.(?P<b>bf16|f16)")
def wgmma(decoder, x, match):
    """Decode instruction x, a wgmma.mma_async, into the function that executes it.

    A wgmma computes D = A @ B, or D = A @ B + D if its predicate operand is true. A [64, 16] is in registers or in
    shared memory, B [16, n] in shared memory, and D [64, n] in registers.
    """
    columns, kind = int(match["n"]), match["a"]
    target, a, b, adds, *flags = x.operands
    flags = [flag.value for flag in flags]
    signs, transposed = flags[:2], flags[2:]
    if match["b"] != kind or signs != [1, 1]:
        raise UnknownInstruction(f"the PTX machine does not support this instruction: {x.text}")
    in_registers = a.kind == "vector"
    transposed = [0, *transposed] if in_registers else transposed
    adds = decoder.read(adds, "pred")
    rows = [decoder.rows[part.text][1] for part in target.parts]
    if len(rows) != columns // 2:
        raise Fault(f"{len(rows)} registers cannot hold the {columns} columns of the result: {x.text}")
    a_reads = [decoder.read(part, "b32") for part in a.parts] if in_registers else None
    a_descriptor = None if in_registers else _descriptor(decoder, a)
    b_descriptor = _descriptor(decoder, b)
    row, column = _accumulator(columns)
    results, factors = ({part.text for part in o.parts} for o in (target, a))
    names = results | factors

    def run(u, mask):
        _require_warpgroup(u, mask, x.text)
        block, clocks = u.block, u.block.clocks
        actor = clocks.tensor + u.index
        group = int(clocks.groups[actor]) + 1
        if missing := names & u.written:
            raise Fault(f"{u.name}: wgmma.fence is missing between a write to {min(missing)} and this wgmma: {x.text}")
        running = u.in_flight.keys()
        if clash := factors & running & u.results or results & running - u.results:
            raise Fault(
                f"{u.name}: {min(clash)} is an operand of one wgmma and the result of another, and both would run at "
                f"the same time: {x.text}"
            )
        if in_registers:
            values = np.stack([np.broadcast_to(read(u), (u.lanes,)) for read in a_reads])
            halves = np.ascontiguousarray(values).view(np.uint16).reshape(4, WARPGROUP, 2).transpose(0, 2, 1)
            left = np.empty((64, 16), np.float32)
            left[_fragment()] = _numbers(np.ascontiguousarray(halves), kind)
        else:
            left = _operand(u, a_descriptor(u), 64, transposed[0], kind, actor, group, x.text)
        right = _operand(u, b_descriptor(u), columns, transposed[1], kind, actor, group, x.text)
        result = left @ right.T
        files = u.files["f32"]
        adding = np.broadcast_to(adds(u), (u.lanes,))
        if adding.all() != adding.any():
            raise Fault(f"the predicate of a wgmma is true in some lanes and false in others: {x.text}")
        for register, where in zip(rows, zip(row, column, strict=True), strict=True):
            own = result[where]
            files[register][...] = files[register] + own if adding[0] else own
        u.in_flight |= dict.fromkeys(names, group)
        u.results |= results
        block.changed = True

    return run


def _descriptor(decoder, operand: Operand):
    read = decoder.read(operand, "u64")

    def one(u):
        values = np.atleast_1d(read(u))
        if (values != values[0]).any():
            raise Fault(f"the lanes have different matrix descriptors in {operand.text}")
        return int(values[0])

    return one


def _operand(u, descriptor: int, rows: int, is_transposed: int, kind: str, actor: int, group: int, text: str):
    """Read an operand of a wgmma from shared memory, as the tensor cores do; return it as float32 [rows, 16].

    Args:
      u: the unit of warps that executes the wgmma.
      descriptor, rows, is_transposed: as for `matrix_bytes`.
      kind: the type of the elements, bf16 or f16.
      actor: the index of the tensor cores in the vector clocks (see clocks.py).
      group: the number of the group of the wgmma. It is also the time of the read on the clock of the tensor cores.
      text: the instruction, for error messages.
    """
    shared = u.block.shared
    at = matrix_bytes(descriptor, rows, 16, bool(is_transposed), text)
    if at.min() < 0 or at.max() + 2 > shared.size:
        raise Fault(f"a matrix reaches byte {at.max() + 1} of shared memory, which has {shared.size} bytes: {text}")
    at = (at[..., None] + np.arange(2)).reshape(-1)
    # The four warps issue the product together, so its operands must be complete for each of them.
    known = u.block.clocks.joined(u.warps)
    data = shared.read(at, actor, known, text, is_proxy=True, time=group)
    return _numbers(np.ascontiguousarray(data).view(np.uint16), kind).reshape(rows, 16)


@cache
def _matrix_lanes(is_transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, column), arrays [32 lanes, 2]: where the two elements of each lane belong in an 8 x 8 matrix.

    `is_transposed`: whether the instruction has the modifier .trans. Then rows and columns are exchanged.
    """
    lane, half = np.arange(WARP)[:, None], np.arange(2)[None]
    row, column = np.broadcast_to(lane // 4, (WARP, 2)), lane % 4 * 2 + half
    return (column, row) if is_transposed else (row, column)


_MATRIX = r"\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared(?:::cta)?\.b16"


def _require_registers(operand: Operand, count: int, text: str) -> None:
    if len(operand.parts) != count:
        raise UnknownInstruction(f"the operand has {len(operand.parts)} registers, but needs {count}: {text}")


def _row_bytes(u, mask, pointer, count: int, text: str):
    """Return which bytes of shared memory an ldmatrix or stmatrix accesses: `count` 8 x 8 matrices for each warp.

    Args:
      u, mask: the unit, and a bool array [lanes]: which lanes of the unit execute the instruction; None: all.
      pointer: pointer(u) returns an address for each lane. Lane 8 m + r of a warp has the address of row r of matrix m.
      count: the number of matrices.
      text: the instruction, for error messages.

    Returns:
      (offsets, warps, places), three integer arrays. W is the number of warps that execute the instruction.
      offsets: [W, count, 8 rows, 16 bytes], the offset of each byte in shared memory.
      warps: [W, count, 8 rows, 16 bytes], the warp that accesses each byte. A block numbers its warps from 0.
      places: [W], the position of each of the W warps in the unit, from 0 to 3.
    """
    warps = full_warps(u, mask, text)
    places = warps - u.warps[0]
    addresses = np.broadcast_to(pointer(u), (u.lanes,)).reshape(-1, WARP)[places, : 8 * count]
    offsets = u.block.shared.offsets(addresses.reshape(-1), 16, text).reshape(-1, count, 8, 16)
    return offsets, np.broadcast_to(warps[:, None, None, None], offsets.shape), places


@instruction("ldmatrix" + _MATRIX)
def load_matrices(decoder, x, match):
    target, source = x.operands
    count, lanes = int(match["count"]), _matrix_lanes(bool(match["trans"]))
    _require_registers(target, count, x.text)
    writes, pointer = [decoder.write(part, "b32") for part in target.parts], decoder.pointer(source)

    def run(u, mask):
        at, owners, places = _row_bytes(u, mask, pointer, count, x.text)
        owners = owners.reshape(-1)
        data = u.block.shared.read(at.reshape(-1), owners, owners, x.text)
        elements = np.ascontiguousarray(data).view(np.uint16).reshape(-1, count, 8, 8)
        for i, write in enumerate(writes):
            mine = np.ascontiguousarray(elements[:, i][:, lanes[0], lanes[1]])
            values = np.zeros((u.lanes // WARP, WARP), np.uint32)
            values[places] = mine.view(np.uint32)[..., 0]
            write(u, mask, values.reshape(-1))

    return run


@instruction("stmatrix" + _MATRIX)
def store_matrices(decoder, x, match):
    target, source = x.operands
    count, lanes = int(match["count"]), _matrix_lanes(bool(match["trans"]))
    _require_registers(source, count, x.text)
    reads, pointer = [decoder.read(part, "b32") for part in source.parts], decoder.pointer(target)

    def run(u, mask):
        at, owners, places = _row_bytes(u, mask, pointer, count, x.text)
        elements = np.empty((len(at), count, 8, 8), np.uint16)
        for i, read in enumerate(reads):
            mine = np.ascontiguousarray(np.broadcast_to(read(u), (u.lanes,))).view(np.uint16)
            elements[:, i][:, lanes[0], lanes[1]] = mine.reshape(-1, WARP, 2)[places]
        owners = owners.reshape(-1)
        u.block.shared.write(at.reshape(-1), elements.view(np.uint8).reshape(-1), owners, owners, x.text)

    return run


@instruction(r"mma\.sync\.aligned\.m16n8k(?P<k>8|16)\.row\.col\.f32\.(?P<kind>bf16|f16|tf32)\.(?P=kind)\.f32")
def mma(decoder, x, match):
    """Decode instruction x, an mma.sync, into the function that executes it: D = A @ B + C in each warp.

    A [16, k], B [k, 8], C and D [16, 8] are in registers.
    """
    kind, depth = match["kind"], int(match["k"])
    if (depth == 16) == (kind == "tf32"):
        raise UnknownInstruction(f"the PTX machine does not support this instruction: {x.text}")
    target, a, b, c = x.operands
    a, b = ([decoder.read(part, "b32") for part in o.parts] for o in (a, b))
    c, writes = [decoder.read(part, "f32") for part in c.parts], [decoder.write(part, "f32") for part in target.parts]
    lane = np.arange(WARP)
    group, place = lane // 4, lane % 4

    def matrix(u, reads, rows):
        """Return A, or B transposed, as float32 [warps, rows, k]. Each of `reads` reads one register.

        The first half of the registers has the first half of the axis k. A matrix with 8 rows has one register for each
        half of k. A matrix with 16 rows has two: first the register with rows 0 to 7, then the one with rows 8 to 15.
        """
        result = np.empty((u.lanes // WARP, rows, depth), np.float32)
        halves = rows // 8
        for i, read in enumerate(reads):
            bits = np.ascontiguousarray(np.broadcast_to(read(u), (u.lanes,)))
            row, start = group + i % halves * 8, i // halves * (depth // 2)
            if kind == "tf32":
                result[:, row, start + place] = _numbers(bits, kind).reshape(-1, WARP)
                continue
            pair = _numbers(bits.view(np.uint16), kind).reshape(-1, WARP, 2)
            for e in range(2):
                result[:, row, start + place * 2 + e] = pair[:, :, e]
        return result

    def run(u, mask):
        full_warps(u, mask, x.text)
        product = matrix(u, a, 16) @ matrix(u, b, 8).transpose(0, 2, 1)
        sums = [np.array(np.broadcast_to(read(u), (u.lanes,))) for read in c]
        for i, (write, before) in enumerate(zip(writes, sums, strict=True)):
            own = product[:, group + i // 2 * 8, place * 2 + i % 2].reshape(-1)
            write(u, mask, before + own)

    return run
