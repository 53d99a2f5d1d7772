"""Read the machine code of a Hopper GPU, as nvdisasm prints it. Find its loops and the cost of one iteration.

The cost counts every instruction of the loop once, even an instruction that a branch may skip. Waiting for a barrier
costs nothing.
"""

import dataclasses
import math
import re
from collections import Counter
from typing import NamedTuple

WARPGROUP = 128  # threads: four warps, one on each scheduler of a multiprocessor
# What a Hopper multiprocessor computes per clock cycle: special functions, and dense bf16 floating-point operations.
SPECIAL_LANES, TENSOR_FLOPS = 16, 4096
FP32 = ("FFMA", "FADD", "FMUL", "FMNMX")
ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDAS", "UTMAREDG")
# A short loop that contains one of these instructions waits for a barrier.
SPIN = {"SYNCS", "NANOSLEEP", "YIELD"}


class Instruction(NamedTuple):
    address: int
    op: str  # the name of the instruction, up to its first dot
    modifiers: str
    operands: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop in the machine code of a kernel. The counts are for one iteration.

    `flops` counts the operations of a warpgroup. The other numbers, except `start`, count instructions of one warp.
    """

    start: int  # address
    instructions: int
    special: int  # MUFU: special functions, such as exp2
    fp32: int  # instructions with a name in FP32: float32 arithmetic
    shuffles: int  # SHFL: exchange of values between the threads of a warp
    products: dict[str, int]  # the number of HGMMA instructions of each shape
    flops: int  # floating-point operations of the products, for the whole warpgroup

    @property
    def cycles(self) -> dict[str, float]:
        """Return {resource: clock cycles for which one iteration of one warpgroup occupies it}.

        The resources of a multiprocessor are "special": the units for special functions; "issue": the schedulers, which
        issue one instruction of a warp per cycle; and "tensor": the tensor cores.
        """
        return {
            "special": self.special * WARPGROUP / SPECIAL_LANES,
            "issue": float(self.instructions),
            "tensor": self.flops / TENSOR_FLOPS,
        }

    @property
    def bound(self) -> str:
        """Return the resource with the most cycles. An iteration takes at least this number of cycles."""
        return max(self.cycles, key=self.cycles.get)


def read(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return (the instructions, {label: its address}) of a listing of machine code that nvdisasm printed."""
    instructions, labels, waiting = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            waiting.append(label[1])
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([\w.:]*)\s*([^;]*)", line):
            address, *rest = found.groups()
            instructions.append(Instruction(int(address, 16), *rest))
            labels |= dict.fromkeys(waiting, instructions[-1].address)
            waiting.clear()
    return instructions, labels


def find_loops(listing: str) -> list[Loop]:
    """Return the loops that do the work of a kernel. `listing` is its machine code, as nvdisasm prints it.

    A loop with matrix products is returned if no loop inside it has matrix products. The instructions of a loop inside
    it, for example a search for the next tile to copy, count once for each iteration of the returned loop. A loop
    without matrix products is returned if it contains no other loop. Loops that wait for a barrier are ignored.
    """
    instructions, labels = read(listing)
    found = [(i.address, re.search(r"\.L\w+", i.operands)) for i in instructions if i.op == "BRA"]
    branches = [(source, labels[label[0]]) for source, label in found if label and label[0] in labels]
    # A loop ends at its last backward branch. A branch to itself is a trap, not a loop.
    spans = {start: end for end, start in branches if start < end}
    # After a failed wait, the code jumps behind the end of the kernel, and from there back into the kernel. This looks
    # like a loop, but it is not one. It is recognised by a branch that enters it in its middle.
    spans = {s: e for s, e in spans.items() if not any(source < s < goal <= e for source, goal in branches)}
    bodies = {(s, e): [i for i in instructions if s <= i.address <= e] for s, e in sorted(spans.items())}
    real = {span: x for span, x in bodies.items() if len(x) > 12 or SPIN.isdisjoint(i.op for i in x)}
    loops = {span: _loop(body) for span, body in real.items()}

    def holds_the_work(span: tuple[int, int]) -> bool:
        inner = [x for (s, e), x in loops.items() if (s, e) != span and span[0] <= s and e <= span[1]]
        return not any(x.products for x in inner) if loops[span].products else not inner

    return [loop for span, loop in loops.items() if holds_the_work(span)]


def _loop(body: list[Instruction]) -> Loop:
    ops = Counter(i.op for i in body)
    products = Counter(re.search(r"\d+x\d+x\d+", i.modifiers)[0] for i in body if i.op == "HGMMA")
    flops = sum(2 * math.prod(map(int, shape.split("x"))) * n for shape, n in products.items())
    fp32 = sum(ops[op] for op in FP32)
    return Loop(body[0].address, len(body), ops["MUFU"], fp32, ops["SHFL"], dict(products), flops)
