"""PTX instructions that move data: loads, stores, cp.async, and the bulk copies of the copy engine.

A unit `u` is up to four warps of a block, whose lanes execute each instruction together (see machine.py).
"""

from functools import cache

import numpy as np

from .barriers import find_mbarrier, lanes_of
from .decode import (
    ARRAY_SHIFT,
    DTYPES,
    PARAMETER_BYTES,
    PARAMETERS,
    SHARED,
    Operand,
    UnknownInstruction,
    instruction,
    width,
)
from .faults import Fault
from .memory import spread
from .parse import SIZES
from .program import TensorMap


@instruction(r"ld\.param(?:::entry)?(?:\.v(?P<many>[24]))?\.(?P<kind>[bsuf](?:8|16|32|64))")
def load_parameter(decoder, x, match):
    """Decode instruction x, a load of a kernel parameter, into the function that executes it.

    All lanes get the same number. Raises Fault for a tensor map, which only bulk copies may read.
    """
    target, source = x.operands
    targets = target.parts if target.kind == "vector" else (target,)
    size = SIZES[match["kind"]]
    data = decoder.parameters.get(source.text)
    if data is None:
        raise UnknownInstruction(f"the kernel has no parameter of this name: {x.text}")
    if not isinstance(data, bytes):
        raise Fault(f"a load must not read a tensor map; only bulk copies may read it: {x.text}")
    writes = []
    for i, part in enumerate(targets):
        start = source.value + i * size
        held = decoder.rows[part.text][0]
        is_signed = match["kind"][0] == "s"
        value = int.from_bytes(data[start : start + size], "little", signed=is_signed)
        bits = value & (2 ** (8 * np.dtype(DTYPES[held]).itemsize) - 1)
        writes.append((decoder.write(part, held), DTYPES[held](bits)))

    def run(u, mask):
        for write, value in writes:
            write(u, mask, value)

    return run


_ACCESS = (
    r"(?:\.relaxed|\.volatile)?(?P<space>\.shared(?:::cta)?|\.global)?(?:\.nc)?"
    r"(?:\.L[12]::[\w:]+)*(?:\.v(?P<many>[248]))?\.(?P<kind>[bsuf](?:8|16|32|64))"
)


def _is_shared(addresses: np.ndarray, space: str | None, text: str) -> bool:
    """Return whether an instruction accesses shared memory, given the addresses of its lanes.

    `space` is the state space in the name of the instruction `text`, or None. Raises Fault if some addresses are in
    shared memory and others in global memory, or if the addresses are not in `space`.
    """
    below = addresses < PARAMETERS
    if below.all() != below.any():
        raise Fault(f"the lanes of one instruction access both shared and global memory: {text}")
    is_shared = bool(below.all())
    if space and is_shared != space.startswith(".shared"):
        raise Fault(f"an address is not in the memory that the instruction names: {text}")
    return is_shared


@instruction("ld" + _ACCESS)
def load(decoder, x, match):
    target, source = x.operands
    targets = target.parts if target.kind == "vector" else (target,)
    size, kind = SIZES[match["kind"]], match["kind"]
    pointer = decoder.pointer(source)
    held = [part.kind == "nothing" or decoder.rows[part.text][0] for part in targets]
    writes = [decoder.write(part, h if h is not True else width(kind)) for part, h in zip(targets, held, strict=True)]
    total = size * len(targets)
    raw = np.dtype(DTYPES[kind]) if kind[0] == "s" else np.dtype(f"u{size}")

    def run(u, mask):
        lanes = slice(None) if mask is None else mask
        addresses = np.broadcast_to(pointer(u), (u.lanes,))[lanes]
        warps = u.warp_of_lane[lanes]
        if _is_shared(addresses, match["space"], x.text):
            at = u.block.shared.offsets(addresses, total, x.text)
            owners = np.repeat(warps, total)
            data = u.block.shared.read(at, owners, owners, x.text).reshape(-1, total)
        else:
            data = u.block.memory.read(addresses, total, x.text)
        values = np.ascontiguousarray(data).view(raw)
        for i, (write, h) in enumerate(zip(writes, held, strict=True)):
            if h is True:
                continue
            dtype = DTYPES[h]
            column = values[:, i]
            column = column.astype(np.int64).astype(dtype) if kind[0] == "s" else column.astype(dtype)
            if mask is None:
                write(u, None, column)
            else:
                full = np.zeros(u.lanes, dtype)
                full[mask] = column
                write(u, mask, full)

    return run


@instruction("st" + _ACCESS)
def store(decoder, x, match):
    target, source = x.operands
    sources = source.parts if source.kind == "vector" else (source,)
    size, kind = SIZES[match["kind"]], match["kind"]
    pointer, raw = decoder.pointer(target), np.dtype(f"u{size}")
    reads = [_stored(decoder, part, kind) for part in sources]

    def run(u, mask):
        lanes = slice(None) if mask is None else mask
        addresses = np.broadcast_to(pointer(u), (u.lanes,))[lanes]
        columns = [np.broadcast_to(read(u), (u.lanes,))[lanes].astype(raw) for read in reads]
        data = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
        if _is_shared(addresses, match["space"], x.text):
            at = u.block.shared.offsets(addresses, data.shape[1], x.text)
            owners = np.repeat(u.warp_of_lane[lanes], data.shape[1])
            u.block.shared.write(at, data.reshape(-1), owners, owners, x.text)
        else:
            u.block.memory.write(addresses, data, x.text)

    return run


def _stored(decoder, operand: Operand, kind: str):
    """Return a function from a unit to the bits of an operand's values, as unsigned integers.

    `kind` is the type of the values.
    """
    unsigned = width(kind)
    if operand.kind == "register":
        unsigned = decoder.rows[operand.text][0]
    return decoder.read(operand, unsigned)


@instruction(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::[\w]+)*")
def copy_async(decoder, x, match):
    """Decode instruction x, a cp.async from global to shared memory, into the function that executes it.

    The third operand is the number of bytes that each lane copies. If there is a fourth operand and it is 0, the lane
    writes zeros instead.
    """
    target, source, size, *rest = x.operands
    target, source, size = decoder.pointer(target), decoder.pointer(source), size.value
    filled = decoder.read(rest[0], "u32") if rest else (lambda u: np.uint32(size))

    def run(u, mask):
        to, start, count, warps = lanes_of(u, mask, target(u), source(u), filled(u))
        clocks = u.block.clocks
        data = np.zeros((len(to), size), np.uint8)
        if not np.isin(count, (0, size)).all():
            raise Fault(f"the PTX machine can copy all {size} bytes or none, but not a part of them: {x.text}")
        if (some := count > 0).any():
            data[some] = u.block.memory.read(start[some], size, x.text)
        at = u.block.shared.offsets(to, size, x.text)
        owners = np.repeat(warps, size)
        actors = clocks.copies + owners
        u.block.shared.write(at, data.reshape(-1), actors, owners, x.text, time=clocks.groups[actors] + 1)

    return run


def _commit(first: str):
    def handler(decoder, x, match):
        def run(u, mask):
            *_, warps = lanes_of(u, mask)
            clocks = u.block.clocks
            clocks.groups[getattr(clocks, first) + np.unique(warps)] += 1

        return run

    return handler


def _wait(first: str):
    def handler(decoder, x, match):
        pending = x.operands[0].value if x.operands else 0

        def run(u, mask):
            *_, warps = lanes_of(u, mask)
            clocks = u.block.clocks
            for warp in np.unique(warps):
                actor = getattr(clocks, first) + warp
                clocks.groups[actor] += not x.operands  # wait_all first commits the copies that are in no group yet
                clocks.wait_for(warp, actor, clocks.groups[actor] - pending)

        return run

    return handler


instruction(r"cp\.async\.commit_group")(_commit("copies"))
instruction(r"cp\.async\.wait_group|cp\.async\.wait_all")(_wait("copies"))
instruction(r"cp\.async\.bulk\.commit_group")(_commit("bulk"))
instruction(r"cp\.async\.bulk\.wait_group(?:\.read)?")(_wait("bulk"))


@instruction(r"prefetch\.tensormap|prefetch\.global\.L[12](?:::[\w]+)*")
def prefetch(decoder, x, match):
    """Decode instruction x, a prefetch, which does nothing here: it changes only how long later accesses take."""
    return lambda u, mask: None


def swizzled(addresses: np.ndarray, span: int) -> np.ndarray:
    """Return the addresses at which a swizzled copy stores the bytes that a plain copy stores at `addresses`.

    Memory is divided into rows of 128 bytes, and a row into chunks of 16 bytes. Chunk c of row r is stored at chunk
    c ^ (r % n) of this row, where n = span / 16. `span` is the span of the swizzle in bytes: 16 (no swizzle), 32, 64
    or 128.
    """
    bits = {16: 0, 32: 1, 64: 3, 128: 7}[span]
    return addresses ^ ((addresses >> 7 & bits) << 4)


@cache
def _box(tensor: TensorMap) -> tuple[list[np.ndarray], int]:
    """Return a list of the indices along each dimension of a box, and the number of bytes of the box.

    A box is the part of an array that one copy moves. The list begins with the innermost dimension. Its index arrays
    broadcast to the shape of the box, in which the outermost dimension is the first axis.
    """
    rank = len(tensor.box)
    grids = [np.arange(n).reshape((-1,) + (1,) * d) for d, n in enumerate(tensor.box)]
    assert all(grid.ndim <= rank for grid in grids)
    return grids, int(np.prod(tensor.box)) * tensor.itemsize


def _elements(tensor: TensorMap, coordinates) -> tuple[np.ndarray, np.ndarray]:
    """Return (offset, inside): each box element's byte offset in the array, and whether it lies inside the array.

    `coordinates` is the position of the box in the array, with the innermost dimension first. In both results, the
    elements are in the order in which the innermost dimension varies fastest.
    """
    offset, inside = np.int64(tensor.offset), np.bool_(True)
    for grid, start, size, stride in zip(_box(tensor)[0], coordinates, tensor.sizes, tensor.strides, strict=True):
        index = grid + int(start)
        offset, inside = offset + index * stride, inside & (index >= 0) & (index < size)
    shape = tensor.box[::-1]
    return np.broadcast_to(offset, shape).reshape(-1), np.broadcast_to(inside, shape).reshape(-1)


def _tensor_map(u, address: int, text: str) -> TensorMap:
    index, offset = divmod(int(address) - PARAMETERS, PARAMETER_BYTES)
    parameters = u.block.program.parameters
    maps = parameters[index] if 0 <= index < len(parameters) else None
    if not isinstance(maps, tuple) or offset % 128 or offset // 128 >= len(maps):
        raise Fault(f"no tensor map is at the address that the copy names: {text}")
    return maps[offset // 128]


def _box_in_shared(tensor: TensorMap, address: int, text: str) -> np.ndarray:
    """Return the offset of every byte of a box in shared memory. The box begins at `address`.

    The offsets include the swizzle. Raises Fault if the copy engine does not support the box or the address. `text` is
    the instruction, for the error.
    """
    if tensor.swizzle > 16 and tensor.box[0] * tensor.itemsize > tensor.swizzle:
        width = tensor.box[0] * tensor.itemsize
        raise Fault(f"a row of the box has {width} bytes, more than its swizzle of {tensor.swizzle} bytes: {text}")
    if address % 128:
        raise Fault(f"the shared-memory address of a box must be a multiple of 128 bytes, not {address}: {text}")
    return swizzled(address + np.arange(_box(tensor)[1]), tensor.swizzle) - SHARED


def _coordinates(decoder, operand: Operand, rank: int, text: str):
    if len(operand.parts) != rank:
        raise UnknownInstruction(f"{len(operand.parts)} coordinates for an array of {rank} dimensions: {text}")
    return [decoder.read(part, "s32") for part in operand.parts]


def _each_lane(u, mask, *values):
    """Return one tuple of integers per lane: the lane's element of each of `values`, and the index of its warp.

    `mask` [lanes] says which lanes of the unit `u` get a tuple; None: all.
    """
    return [tuple(map(int, row)) for row in zip(*lanes_of(u, mask, *values), strict=True)]


@instruction(
    r"cp\.async\.bulk\.tensor\.(?P<rank>[1-5])d\.shared::(?:cta|cluster)\.global(?:\.tile)?"
    r"\.mbarrier::complete_tx::bytes"
)
def load_box(decoder, x, match):
    target, source, barrier = x.operands
    coordinates = _coordinates(decoder, source, int(match["rank"]), x.text)
    target, tensor, barrier = map(decoder.pointer, (target, source._replace(parts=()), barrier))

    def run(u, mask):
        values = [target(u), tensor(u), barrier(u), *(c(u) for c in coordinates)]
        for to, which, done, *start, warp in _each_lane(u, mask, *values):
            t = _tensor_map(u, which, x.text)
            mbarrier = find_mbarrier(u, done, warp, x.text)
            offsets, inside = _elements(t, start)
            data = np.zeros((offsets.size, t.itemsize), np.uint8)
            if inside.any():
                data[inside] = u.block.memory.read_bytes(t.array, spread(offsets[inside], t.itemsize), x.text).reshape(
                    -1, t.itemsize
                )
            at, clocks = _box_in_shared(t, to, x.text), u.block.clocks
            _require_room(u, at, x.text)
            actor, time = clocks.mbarriers + mbarrier.index, mbarrier.phase + 1
            u.block.shared.write(at, data.reshape(-1), actor, warp, x.text, is_proxy=True, time=time)
            mbarrier.bytes -= at.size
            mbarrier.complete()
            u.block.changed = True

    return run


def _require_room(u, at: np.ndarray, text: str) -> None:
    if at.min() < 0 or at.max() >= u.block.shared.size:
        raise Fault(f"a copy reaches byte {at.max()} of shared memory, which has {u.block.shared.size} bytes: {text}")


@instruction(r"cp\.async\.bulk\.tensor\.(?P<rank>[1-5])d\.global\.shared::cta(?:\.tile)?\.bulk_group")
def store_box(decoder, x, match):
    target, source = x.operands
    coordinates = _coordinates(decoder, target, int(match["rank"]), x.text)
    tensor, source = decoder.pointer(target._replace(parts=())), decoder.pointer(source)

    def run(u, mask):
        for which, start_byte, *start, warp in _each_lane(u, mask, tensor(u), source(u), *(c(u) for c in coordinates)):
            t = _tensor_map(u, which, x.text)
            at = _box_in_shared(t, start_byte, x.text)
            _require_room(u, at, x.text)
            data = _read_for_copy(u, at, warp, x.text).reshape(-1, t.itemsize)
            offsets, inside = _elements(t, start)
            if inside.any():
                to = spread(offsets[inside], t.itemsize)
                u.block.memory.write_bytes(t.array, to, data[inside].reshape(-1), x.text)

    return run


def _read_for_copy(u, at: np.ndarray, warp: int, text: str) -> np.ndarray:
    clocks = u.block.clocks
    actor = clocks.bulk + warp
    clocks.bulk_reads[warp] = clocks.groups[actor] + 1
    return u.block.shared.read(at, actor, warp, text, is_proxy=True, time=clocks.groups[actor] + 1)


@instruction(r"cp\.async\.bulk\.global\.shared::cta\.bulk_group")
def store_bytes(decoder, x, match):
    target, source = map(decoder.pointer, x.operands[:2])
    size = decoder.read(x.operands[2], "u32")

    def run(u, mask):
        for to, start, count, warp in _each_lane(u, mask, target(u), source(u), size(u)):
            if count % 16 or to % 16 or start % 16:
                raise Fault(f"size and addresses of a bulk copy must be multiples of 16 bytes: {x.text}")
            if count:
                at = np.arange(count) + start - SHARED
                _require_room(u, at, x.text)
                data = _read_for_copy(u, at, warp, x.text)
                array, offset = (to >> ARRAY_SHIFT) - 1, to & ((1 << ARRAY_SHIFT) - 1)
                u.block.memory.write_bytes(array, offset + np.arange(count), data, x.text)

    return run


@instruction(r"cp\.async\.bulk\.shared::(?:cta|cluster)\.global\.mbarrier::complete_tx::bytes")
def load_bytes(decoder, x, match):
    target, source, size, barrier = x.operands
    target, source, barrier = map(decoder.pointer, (target, source, barrier))
    size = decoder.read(size, "u32")

    def run(u, mask):
        for to, start, count, done, warp in _each_lane(u, mask, target(u), source(u), size(u), barrier(u)):
            if count % 16 or to % 16 or start % 16:
                raise Fault(f"size and addresses of a bulk copy must be multiples of 16 bytes: {x.text}")
            mbarrier, clocks = find_mbarrier(u, done, warp, x.text), u.block.clocks
            if count:
                data = u.block.memory.read(np.array([start]) + np.arange(count), 1, x.text).reshape(-1)
                at = np.arange(count) + to - SHARED
                _require_room(u, at, x.text)
                actor, time = clocks.mbarriers + mbarrier.index, mbarrier.phase + 1
                u.block.shared.write(at, data, actor, warp, x.text, is_proxy=True, time=time)
            mbarrier.bytes -= count
            mbarrier.complete()
            u.block.changed = True

    return run
