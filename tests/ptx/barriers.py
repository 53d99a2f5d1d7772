"""The barriers of a thread block: the sixteen named barriers (bar.sync, bar.red), and mbarriers in shared memory.

A unit `u` is up to four warps of a block, whose lanes execute each instruction together (see machine.py).
"""

import numpy as np

from .arithmetic import WARP
from .clocks import MBARRIERS
from .decode import SHARED, instruction
from .faults import DivergentBarrier, Fault

BLOCKED = "blocked"  # the result of an instruction that must wait: its strand tries again when something has changed


def full_warps(u, mask, text: str) -> np.ndarray:
    """Return the indices of the warps that execute the instruction `text`, counted from the block's first warp.

    `mask` [lanes] says which lanes of the unit `u` execute the instruction; None: all. Raises DivergentBarrier if only
    some lanes of a warp execute the instruction.
    """
    if mask is None:
        return u.warps
    parts = mask.reshape(-1, WARP)
    some = parts.any(1)
    if (some & ~parts.all(1)).any():
        raise DivergentBarrier(f"{u.name}: only some lanes of a warp execute this instruction: {text}")
    return u.warps[some]


class NamedBarrier:
    """The state of one of the sixteen named barriers of a block, which bar.sync and bar.red use."""

    def __init__(self):
        self.parties: list[tuple] = []  # the waiting (unit, warps)
        self.arrived, self.expected, self.known, self.votes = 0, None, None, None

    def open(self, clocks) -> None:
        """Let all waiting warps continue.

        An access by any of these warps before the barrier is then ordered before every access by any of these warps
        after the barrier.
        """
        for u, warps in self.parties:
            clocks.acquire(list(warps), self.known)
            u.released[warps] = self.votes
        self.__init__()


class Mbarrier:
    """The state of an mbarrier in shared memory.

    The block initialised `index` other mbarriers before this mbarrier. `count` is the number of arrivals that a phase
    needs. The current phase still needs `pending` arrivals and `bytes` bytes of copies. `phase` is the number of phases
    that are complete.
    """

    def __init__(self, index: int, name: str, count: int):
        self.index, self.name, self.count = index, name, count
        self.pending, self.bytes, self.phase = count, 0, 0
        self.known = self.released = None

    def arrive(self, known, arrivals: int) -> bool:
        """Count `arrivals` more arrivals in the current phase. Return whether the phase is now complete.

        `known` are the vector clocks of the arriving warps, from `Clocks.publish`. The warps that wait for the phase
        acquire these clocks.
        """
        self.known = known if self.known is None else tuple(map(np.maximum, self.known, known))
        self.pending -= arrivals
        if self.pending < 0:
            raise Fault(f"mbarrier {self.name}: more than {self.count} arrivals in phase {self.phase}")
        return self.complete()

    def complete(self) -> bool:
        if self.pending or self.bytes:
            return False
        self.phase += 1
        self.pending, self.released, self.known = self.count, self.known, None
        return True

    def __str__(self):
        return (
            f"mbarrier {self.name} in phase {self.phase}: {self.pending} of {self.count} arrivals and {self.bytes} "
            "bytes to copy are still missing"
        )


def named_barrier(decoder, x, match, operands, *, vote=None):
    """Decode instruction x, a bar.sync or bar.red, into the function that executes it.

    The function (unit, mask) returns BLOCKED until the expected number of threads has arrived, and None after that.

    Args:
      operands: the operand with the number of the barrier, and perhaps an operand with the number of threads that take
        part. Without this second operand, all threads of the block take part.
      vote: a `_Vote`, which is the reduction that bar.red computes; None for bar.sync.
    """
    number = decoder.read(operands[0], "u32")
    count = decoder.read(operands[1], "u32") if len(operands) > 1 else None

    def run(u, mask):
        block, warps = u.block, full_warps(u, mask, x.text)
        numbers = np.unique(np.broadcast_to(number(u), (u.lanes,))[slice(None) if mask is None else mask])
        if len(numbers) != 1:
            raise DivergentBarrier(f"{u.name}: the lanes name several barriers, {numbers}, instead of one: {x.text}")
        barrier = block.named_barrier(int(numbers[0]))
        key = tuple(warps.tolist())
        if key in u.released:  # these warps waited, and the barrier has opened
            result = u.released.pop(key)
            if vote:
                vote(u, mask, result)
            return None
        u.waits_for = f"barrier {int(numbers[0])}: {x.text}"
        if (u, key) in barrier.parties:
            return BLOCKED
        expected = block.threads if count is None else int(np.max(count(u)))
        if barrier.expected not in (None, expected):
            raise DivergentBarrier(
                f"barrier {int(numbers[0])}: one instruction names {barrier.expected} threads, another {expected}; "
                "all instructions of a barrier must name the same number"
            )
        barrier.expected = expected
        known = block.clocks.publish(warps)
        barrier.known = known if barrier.known is None else tuple(map(np.maximum, barrier.known, known))
        barrier.parties.append((u, key))
        barrier.arrived += len(warps) * WARP
        if vote:
            barrier.votes = vote.combine(barrier.votes, u, mask)
        block.changed = True
        if barrier.arrived > expected:
            raise DivergentBarrier(
                f"barrier {int(numbers[0])}: {barrier.arrived} threads arrived, but it expects {expected}: {x.text}"
            )
        if barrier.arrived == expected:
            barrier.open(block.clocks)
            return run(u, mask)
        return BLOCKED

    return run


@instruction(r"bar(?:rier)?\.sync(?:\.aligned)?|barrier\.cta\.sync(?:\.aligned)?")
def bar_sync(decoder, x, match):
    return named_barrier(decoder, x, match, x.operands)


class _Vote:
    """The reduction of bar.red over all lanes of all warps that arrive at the barrier.

    If `how` is "or", the result says whether the predicate is true in at least one lane. If `how` is "and", the result
    says whether the predicate is true in all lanes.
    """

    def __init__(self, write, read, how):
        self.write, self.read, self.how = write, read, how

    def __call__(self, u, mask, result):
        self.write(u, mask, result)

    def combine(self, before, u, mask):
        values = np.broadcast_to(self.read(u), (u.lanes,))[slice(None) if mask is None else mask]
        own = bool(values.any() if self.how == "or" else values.all())
        if before is None:
            return own
        return before or own if self.how == "or" else before and own


@instruction(r"bar\.red\.(?P<how>or|and)\.pred")
def bar_red(decoder, x, match):
    target, *numbers, source = x.operands
    vote = _Vote(decoder.write(target, "pred"), decoder.read(source, "pred"), match["how"])
    return named_barrier(decoder, x, match, numbers, vote=vote)


@instruction(r"bar\.warp\.sync")
def warp_barrier(decoder, x, match):
    def run(u, mask):
        full_warps(u, mask, x.text)

    return run


def lanes_of(u, mask, *values):
    """Return each of `values` for the lanes that execute an instruction, and last the index of each lane's warp.

    `mask` [lanes] says which lanes of the unit `u` execute the instruction; None: all. Each of `values` is an array
    [lanes], or one number for all lanes. Each result is an array with one element per lane that executes the
    instruction. The warps are counted from the block's first warp.
    """
    lanes = np.arange(u.lanes) if mask is None else np.flatnonzero(mask)
    return *(np.broadcast_to(v, (u.lanes,))[lanes] for v in values), u.warps[lanes // WARP]


@instruction(r"mbarrier\.init(?:\.shared(?:::cta)?)?\.b64")
def mbarrier_init(decoder, x, match):
    address, count = decoder.pointer(x.operands[0]), decoder.read(x.operands[1], "u32")

    def run(u, mask):
        addresses, counts, warps = lanes_of(u, mask, address(u), count(u))
        for a, n, warp in zip(addresses, counts, warps, strict=True):
            at = u.block.shared.offsets(np.array([a]), 8, x.text)
            index = len(u.block.mbarriers)
            if index >= MBARRIERS:
                raise Fault(f"the block has more than {MBARRIERS} mbarriers, the limit of the PTX machine")
            names = u.block.program.barriers
            name = names[index] if index < len(names) else f"at byte {a - SHARED}"
            u.block.shared.write(at, np.zeros(8, np.uint8), warp, warp, x.text)
            u.block.shared.is_barrier[at] = True
            u.block.mbarriers[int(a)] = Mbarrier(index, name, int(n))

    return run


def find_mbarrier(u, address: int, warps, text: str) -> Mbarrier:
    """Return the mbarrier at `address` in shared memory. `warps` of the unit `u` use it in the instruction `text`.

    Raises Fault if no mbarrier is at this address. Also raises it if another warp initialised the mbarrier, and no
    barrier comes between this initialisation and the instruction.
    """
    if int(address) not in u.block.mbarriers:
        raise Fault(f"no mbarrier at byte {int(address) - SHARED} of shared memory: {text}")
    shared, at = u.block.shared, int(address) - SHARED
    if np.any(u.block.clocks.seen[warps, shared.writer[at]] < shared.write_time[at]):
        raise Fault(f"{u.name} use an mbarrier, but no barrier comes after its initialisation by another warp: {text}")
    return u.block.mbarriers[int(address)]


@instruction(r"mbarrier\.arrive(?P<expect>\.expect_tx)?(?:\.release)?(?:\.cta)?(?:\.shared(?:::cta)?)?\.b64")
def mbarrier_arrive(decoder, x, match):
    _, target, *operands = x.operands
    address = decoder.pointer(target)
    amount = decoder.read(operands[0], "u32") if operands else (lambda u: np.uint32(1))

    def run(u, mask):
        addresses, amounts, warps = lanes_of(u, mask, address(u), amount(u))
        distinct, groups = np.unique(addresses, return_inverse=True)
        for i, a in enumerate(distinct):
            mine = groups == i
            members = np.unique(warps[mine])
            barrier = find_mbarrier(u, a, members, x.text)
            known = u.block.clocks.publish(members)
            if match["expect"]:
                barrier.bytes += int(amounts[mine].sum())
            arrivals = int(mine.sum()) if match["expect"] else int(amounts[mine].sum())
            barrier.arrive(known, arrivals)
            u.block.changed = True

    return run


@instruction(r"mbarrier\.expect_tx(?:\.relaxed)?(?:\.cta)?(?:\.shared(?:::cta)?)?\.b64")
def mbarrier_expect(decoder, x, match):
    address, amount = decoder.pointer(x.operands[0]), decoder.read(x.operands[1], "u32")

    def run(u, mask):
        for a, n, warp in zip(*lanes_of(u, mask, address(u), amount(u)), strict=True):
            find_mbarrier(u, a, warp, x.text).bytes += int(n)

    return run


@instruction(r"mbarrier\.(?:try|test)_wait\.parity(?:\.acquire)?(?:\.cta)?(?:\.shared(?:::cta)?)?\.b64")
def mbarrier_wait(decoder, x, match):
    """Decode instruction x, an mbarrier.try_wait or test_wait, into the function that executes it.

    Each lane names an mbarrier and a parity, 0 or 1. A lane must wait as long as the current phase of its mbarrier has
    this parity. While all lanes must wait, the function returns BLOCKED. (On the chip, a loop in the PTX repeats the
    instruction during this time.) As soon as one or more lanes need not wait, the function writes the predicate of the
    instruction: true in these lanes, false in the other lanes. The loop in the PTX then repeats the instruction for the
    lanes with false.
    """
    target, address, parity = x.operands[:3]
    write, address, parity = decoder.write(target, "pred"), decoder.pointer(address), decoder.read(parity, "u32")

    def run(u, mask):
        addresses, parities, warps = lanes_of(u, mask, address(u), parity(u))
        clocks, waits = u.block.clocks, {}
        for a, p, warp in zip(addresses.tolist(), parities.tolist(), warps.tolist(), strict=True):
            waits.setdefault((a, p), set()).add(warp)
        complete = {}
        for (a, p), members in waits.items():
            members = list(members)
            barrier = find_mbarrier(u, a, members, x.text)
            if p > 1:
                raise Fault(f"mbarrier {barrier.name}: the parity {p} is neither 0 nor 1: {x.text}")
            complete[a, p] = barrier.phase % 2 != p
            if not complete[a, p]:
                u.waits_for = f"{barrier}; they wait for the end of a phase of parity {p}"
                continue
            if barrier.released is not None:
                clocks.acquire(members, barrier.released)
            clocks.wait_for(members, clocks.mbarriers + barrier.index, barrier.phase)
        if not any(complete.values()):
            return BLOCKED
        result = np.zeros(u.lanes, bool)
        result[slice(None) if mask is None else mask] = [
            complete[key] for key in zip(addresses.tolist(), parities.tolist(), strict=True)
        ]
        write(u, mask, result)
        return None

    return run


@instruction(r"fence\.proxy\.async(?:\.shared::cta)?")
def proxy_fence(decoder, x, match):
    def run(u, mask):
        *_, warps = lanes_of(u, mask)
        u.block.clocks.fence(np.unique(warps))

    return run


@instruction(
    r"fence\.mbarrier_init\.release\.cluster|fence\.acq_rel\.(?:cta|gpu)|membar\.cta|fence\.proxy\.async\.global"
)
def other_fence(decoder, x, match):
    """Decode instruction x, a fence that has no effect in this machine.

    The machine does not check whether a kernel has these fences. It orders accesses to shared memory only
    by barriers and by waits for asynchronous operations. It knows no order of accesses to global memory.
    """
    return lambda u, mask: None
