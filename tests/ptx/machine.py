"""The PTX machine: `launch` runs a program on arrays, one thread block after the other.

Up to four warps of a block form a unit, whose lanes execute each instruction together. If lanes branch differently,
each branch becomes a strand, with a mask of its lanes. The strand at the earliest instruction runs first. Two strands
at the same instruction merge, unless one of them waits at a barrier. While a strand waits, the other strands run. The
order of execution is the same in every run.
"""

from functools import lru_cache

import numpy as np

from . import arithmetic, barriers, copies, products  # noqa: F401  (each registers its instructions)
from . import lanes as _lanes  # noqa: F401
from .arithmetic import WARP
from .barriers import BLOCKED, Mbarrier, NamedBarrier
from .clocks import Clocks
from .decode import SHARED, Decoder, UnknownInstruction, instruction
from .faults import Deadlock, Fault
from .memory import GlobalMemory, SharedMemory
from .parse import parse
from .program import Program

UNIT = 128  # lanes
_VIEWS = {"b16": ("u16", "s16", "f16"), "b32": ("u32", "s32", "f32"), "b64": ("u64", "s64", "f64"), "pred": ()}
_DTYPES = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "pred": np.bool_}


class Strand:
    """A group of lanes of a unit that are at the same instruction, number `at`.

    `mask` [lanes] says which lanes of the unit are in the group; None: all.
    """

    def __init__(self, at: int, mask: np.ndarray | None):
        self.at, self.mask, self.is_waiting = at, mask, False
        self.waits_for = ""  # what the strand waits for, as a text; "" if it does not wait


class Unit:
    """Up to four warps of a block, with their registers. Their lanes execute instructions together."""

    def __init__(self, block: "Block", index: int, lanes: int, counts: dict[str, int]):
        self.block, self.index, self.lanes = block, index, lanes
        first = index * UNIT
        self.warps = np.arange(first // WARP, (first + lanes) // WARP)
        self.warp_of_lane = np.repeat(self.warps, WARP)
        self.name = f"warps {self.warps[0]} to {self.warps[-1]} of block {block.place}"
        self.files = {}
        for kind, views in _VIEWS.items():
            # Registers start with an arbitrary value, because they are not zero on the chip either.
            file = np.full((counts.get(kind, 0), lanes), True if kind == "pred" else 0xABCD, _DTYPES[kind])
            self.files[kind] = list(file)
            for view in views:
                self.files[view] = list(file.view(f"{view[0].replace('s', 'i')}{int(view[1:]) // 8}"))
        x = first + np.arange(lanes)
        sizes = block.program.block
        thread = x % sizes[0], x // sizes[0] % sizes[1], x // (sizes[0] * sizes[1])
        self.special = {"%laneid": x % WARP, "%warpid": x // WARP}
        for i, axis in enumerate("xyz"):
            self.special |= {
                f"%tid.{axis}": thread[i],
                f"%ntid.{axis}": np.int64(sizes[i]),
                f"%ctaid.{axis}": np.int64(block.place[i]),
                f"%nctaid.{axis}": np.int64(block.program.grid[i]),
            }
        self.strands = [Strand(0, None)]
        self.released: dict[tuple, bool | None] = {}  # warps that a named barrier has released, with the vote's result
        self.waits_for = ""
        self.in_flight: dict[str, int] = {}  # registers of running products, each with the product's group
        self.results: set[str] = set()  # the registers in `in_flight` that a product writes; it reads the others
        self.written: set[str] = set()  # registers written since the last wgmma.fence

    def run(self, steps: list) -> None:
        """Run the strands of this unit until each of them has ended or waits. `steps` are the decoded instructions."""
        while strand := min((s for s in self.strands if not s.is_waiting), key=lambda s: s.at, default=None):
            if len(self.strands) > 1:
                strand = self._merged(strand)
            self._advance(strand, steps)

    def _merged(self, strand: Strand) -> Strand:
        for other in self.strands:
            # A strand that has arrived at a barrier must not arrive again as part of a merged strand.
            if other is not strand and other.at == strand.at and not (other.waits_for or strand.waits_for):
                self.strands.remove(other)
                mask = strand.mask | other.mask
                strand.mask = None if mask.all() else mask
                return self._merged(strand)
        return strand

    def _advance(self, strand: Strand, steps: list) -> None:
        """Execute instructions of a strand until it splits, ends or waits, or until another strand has to run first."""
        alone = len(self.strands) == 1
        while True:
            step, mask = steps[strand.at], strand.mask
            if step.predicate is not None:
                chosen = self.files["pred"][step.predicate]
                chosen = ~chosen if step.negated else chosen
                mask = chosen if mask is None else chosen & mask
                if mask.all():
                    mask = None
                elif not mask.any():
                    strand.at += 1
                    if alone:
                        continue
                    return
            if self.in_flight and not step.is_product and not step.registers.isdisjoint(self.in_flight):
                register = min(step.registers & self.in_flight.keys())
                raise Fault(f"{self.name}: {register} belongs to a wgmma that nothing has waited for: {step.text}")
            result = step.run(self, mask)
            if step.written and not step.is_product:
                self.written |= step.written
            if result is BLOCKED:
                self._wait(strand, mask)
                return
            strand.waits_for = ""
            if result is None:
                strand.at += 1
            else:
                self._jump(strand, mask, result)
                if strand not in self.strands or not alone:
                    return
                alone = len(self.strands) == 1
            if not alone:
                return

    def _wait(self, strand: Strand, mask: np.ndarray | None) -> None:
        """Make a strand wait at its instruction; `mask` says which lanes execute the instruction.

        A warp waits if at least one of its lanes executes the instruction. The lanes of the other warps do not wait:
        they move to a new strand, which continues at the next instruction.
        """
        if mask is not None:
            everyone = np.ones(self.lanes, bool) if strand.mask is None else strand.mask
            stay = np.repeat(mask.reshape(-1, WARP).any(1), WARP) & everyone
            if (rest := everyone & ~stay).any():
                strand.mask = stay
                self.strands.append(Strand(strand.at + 1, rest))
        strand.is_waiting, strand.waits_for = True, self.waits_for

    def lanes_of(self, strand: Strand) -> str:
        """Return a text that names the warps of a strand, for error messages."""
        if strand.mask is None:
            return self.name
        parts = zip(self.warps, strand.mask.reshape(-1, WARP), strict=True)
        warps = (str(warp) if part.all() else f"{warp} in part" for warp, part in parts if part.any())
        return f"warps {', '.join(warps)} of block {self.block.place}"

    def _jump(self, strand: Strand, mask: np.ndarray | None, target: int) -> None:
        """Move the lanes in `mask` (None: all lanes of the strand) to instruction number `target`.

        If `target` is END, these lanes end. The other lanes of the strand continue at the next instruction.
        """
        everyone = np.ones(self.lanes, bool) if strand.mask is None else strand.mask
        gone = everyone if mask is None else mask & everyone
        stay = everyone & ~gone
        if not stay.any():
            if target == END:
                self.strands.remove(strand)
            else:
                strand.at = target
            return
        strand.mask = stay
        strand.at += 1
        if target != END:
            self.strands.append(Strand(target, gone))


END = -1


@instruction(r"bra(?P<uni>\.uni)?")
def branch(decoder, x, match):
    target = decoder.kernel.labels.get(x.operands[0].text)
    if target is None:
        raise UnknownInstruction(f"the kernel does not have the label of this jump: {x.text}")
    return lambda u, mask: target


@instruction(r"ret|exit")
def leave(decoder, x, match):
    return lambda u, mask: END


class Block:
    """One thread block of the grid, with its units, its shared memory and its barriers."""

    def __init__(self, program: Program, place, memory: GlobalMemory, shared: int, counts, equal_writes: bool):
        self.program, self.place, self.memory = program, place, memory
        self.threads = int(np.prod(program.block))
        if self.threads % WARP:
            raise Fault(f"a block has {self.threads} threads, which is not a multiple of {WARP}")
        self.clocks = Clocks(self.threads // WARP)
        self.shared = SharedMemory(shared, self.clocks, equal_writes)
        self.mbarriers: dict[int, Mbarrier] = {}
        self.named: dict[int, NamedBarrier] = {}
        self.changed = False
        starts = range(0, self.threads, UNIT)
        self.units = [Unit(self, i, min(UNIT, self.threads - s), counts) for i, s in enumerate(starts)]

    def named_barrier(self, number: int) -> NamedBarrier:
        if not 0 <= number < 16:
            raise Fault(f"there is no barrier {number}; a block has barriers 0 to 15")
        return self.named.setdefault(number, NamedBarrier())

    def run(self, steps: list) -> None:
        while any(u.strands for u in self.units):
            self.changed = False
            for u in self.units:
                for strand in u.strands:
                    strand.is_waiting = False
                u.run(steps)
            if not self.changed and any(u.strands for u in self.units):
                self._deadlock()
        self._ended()
        self.units.clear()  # the units refer to this block; without the cycle, its memory is freed at once

    def _deadlock(self):
        waits = "; ".join(f"{u.lanes_of(s)} wait for {s.waits_for}" for u in self.units for s in u.strands)
        raise Deadlock(f"{self.program.name} waits for ever: {waits}")

    def _ended(self) -> None:
        clocks = self.clocks
        for warp, group in enumerate(clocks.bulk_reads):
            if clocks.seen[warp, clocks.bulk + warp] < group:
                raise Fault(f"warp {warp} of block {self.place} ends while its bulk copies read shared memory")
        shared = self.shared
        late = clocks.seen.max(0)[shared.writer] < shared.write_time
        if late.any():
            actor = clocks.name(int(shared.writer[late][0]))
            raise Fault(f"block {self.place} ends, but no warp has waited until {actor} had written shared memory")
        for barrier in self.mbarriers.values():
            if barrier.bytes:
                raise Fault(f"block {self.place} ends before its copies are complete: {barrier}")


_parsed = lru_cache(8)(parse)  # enough for the kernels of one call; a parsed kernel takes tens of megabytes


def launch(program: Program, arrays: list[np.ndarray], *, equal_writes: bool = False) -> None:
    """Run a program on arrays, which it reads and writes in place.

    Args:
      program: the PTX of a kernel and how it is launched.
      arrays: contiguous arrays. The parameters and tensor maps of the program refer to them by index.
      equal_writes: allow warps to write the same value to the same byte of shared memory without an order. Triton's
        warps do this if a tile has fewer rows than the warps need.
    Raises:
      UnknownInstruction: the machine does not support an instruction of the program. No instruction has run then.
      Fault: the program does something whose result is undefined on the chip, or the program waits for ever.
    """
    kernel = _parsed(program.ptx)
    memory = GlobalMemory(arrays)
    parameters = {}
    for (name, size), value in zip(kernel.parameters, program.parameters, strict=True):
        if isinstance(value, int):
            value = GlobalMemory.address(value).to_bytes(8, "little")
        elif isinstance(value, tuple) and size != 128 * len(value) and value:
            raise ValueError(f"parameter {name} has {size} bytes, but {len(value)} tensor maps need 128 each")
        parameters[name] = value
    variables, size = {}, 0
    for name, (space, alignment, length) in kernel.variables.items():
        if space != "shared":
            raise UnknownInstruction(f"the PTX machine does not support memory of the kind .{space}: {name}")
        if length == 0:
            continue
        size = -(-size // alignment) * alignment
        variables[name] = SHARED + size
        size += length
    # Dynamic shared memory comes last and starts at a multiple of 1024, as the copy engine's swizzle needs.
    dynamic = [name for name, (_, _, length) in kernel.variables.items() if length == 0]
    if dynamic:
        size = -(-size // 1024) * 1024
        variables |= {name: SHARED + size for name in dynamic}
    size += program.shared
    decoder = Decoder(kernel, variables, parameters)
    steps = decoder.steps()
    with np.errstate(all="ignore"):
        for z in range(program.grid[2]):
            for y in range(program.grid[1]):
                for x in range(program.grid[0]):
                    memory.block = (z * program.grid[1] + y) * program.grid[0] + x
                    Block(program, (x, y, z), memory, size, decoder.counts, equal_writes).run(steps)
