"""Vector clocks that order the accesses to a block's shared memory, so that races are found.

An actor is something that accesses shared memory: a warp, the tensor cores on behalf of a warpgroup, the copy engine
that reads for a warp, the asynchronous copies of a warp, or the copies that complete on one mbarrier. Every actor has a
time, a counter. `seen[w, a]` is a time of actor a: the next accesses of warp w are ordered after all accesses that
actor a made up to this time.

The copy engine and the tensor cores access memory through the asynchronous proxy. `fenced[w, a]` is also a time of
actor a: the next accesses through this proxy on behalf of warp w are ordered after all accesses that actor a made up to
this time. fence.proxy.async raises `fenced` to `seen`.
"""

import numpy as np

MBARRIERS = 128  # the most mbarriers that a block may have


class Clocks:
    """The vector clocks of one block.

    Every actor has an index. The actors 0 to `readers` - 1 can read shared memory, and the others only write. So the
    table of reads in memory.py has rows only for the first `readers` actors.
    """

    def __init__(self, warps: int):
        self.warps, groups = warps, -(-warps // 4)
        self.tensor = warps  # plus the number of a warpgroup: its tensor cores
        self.bulk = self.tensor + groups  # plus the number of a warp: its bulk copies out of shared memory
        self.readers = self.bulk + warps
        self.copies = self.readers  # plus the number of a warp: its cp.async copies
        self.mbarriers = self.copies + warps
        self.actors = self.mbarriers + MBARRIERS
        self.seen = np.zeros((warps + 1, self.actors), np.int32)  # the last row: see `joined`
        self.seen[np.arange(warps), np.arange(warps)] = 1
        self.fenced = np.zeros_like(self.seen)
        self.groups = np.zeros(self.readers + warps, np.int32)  # committed groups of asynchronous operations, per actor
        self.bulk_reads = np.zeros(warps, np.int32)  # the group of the last bulk copy out of shared memory

    def now(self, warps: np.ndarray) -> np.ndarray:
        return self.seen[warps, warps]

    def tick(self, warps) -> None:
        """Advance the time of these warps by one, after a release or a fence.

        The next accesses of these warps then have a later time than the accesses before the release or the fence.
        """
        self.seen[warps, warps] += 1

    def fence(self, warps) -> None:
        self.fenced[warps] = np.maximum(self.fenced[warps], self.seen[warps])
        self.tick(warps)

    def publish(self, warps) -> tuple[np.ndarray, np.ndarray]:
        """Return two arrays [actors], which other warps can pass to `acquire`. Advance the time of these warps by one.

        The first array is the elementwise maximum of the rows of `seen` that belong to these warps. The second array is
        the same for `fenced`. Both are computed before the time advances.
        """
        known = self.seen[warps].max(0), self.fenced[warps].max(0)
        self.tick(warps)
        return known

    def acquire(self, warps, known: tuple[np.ndarray, np.ndarray]) -> None:
        for mine, theirs in zip((self.seen, self.fenced), known, strict=True):
            mine[warps] = np.maximum(mine[warps], theirs)

    def wait_for(self, warps, actor: int, time: int) -> None:
        """Record that these warps have waited for the operations of an actor up to time `time`."""
        self.seen[warps, actor] = np.maximum(self.seen[warps, actor], time)

    def joined(self, warps) -> int:
        """Write the last row of `seen` and of `fenced` for an access that these warps make together. Return its index.

        In both arrays, the last row becomes the elementwise minimum of the rows of these warps. So an earlier access is
        ordered before the common access only if it is ordered before the next access of each of these warps.
        """
        least = [matrix[warps].min(0) for matrix in (self.seen, self.fenced)]
        self.seen[-1], self.fenced[-1] = least
        return self.warps

    def name(self, actor: int) -> str:
        for first, what in (
            (self.mbarriers, "the copies that complete on mbarrier"),
            (self.copies, "cp.async of warp"),
            (self.bulk, "the bulk copies out of shared memory of warp"),
            (self.tensor, "the tensor cores for warpgroup"),
            (0, "warp"),
        ):
            if actor >= first:
                return f"{what} {actor - first}"
        raise AssertionError
