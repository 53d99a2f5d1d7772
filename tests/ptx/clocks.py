"""What happened before what: a vector clock for every warp, over all that a block's shared memory is touched by.

An actor is who touches a byte: a warp, the tensor cores at work for a warpgroup, the copy engine that reads for a warp,
asynchronous copies of a warp, or the copies that complete on an mbarrier. Actor a counts its own time; row w of `seen`
says up to which time of each actor warp w knows that what it did is done. `fenced` says the same of what the copy
engine and the tensor cores see (the asynchronous proxy): a fence.proxy.async raises it to `seen`.
"""

import numpy as np

MBARRIERS = 128  # most of a block


class Clocks:
    """Of one block. Readers come first among the actors: only these can be overtaken by a write."""

    def __init__(self, warps: int):
        self.warps, groups = warps, -(-warps // 4)
        self.tensor = warps  # + warpgroup
        self.bulk = self.tensor + groups  # + warp: copies out of shared memory
        self.readers = self.bulk + warps
        self.copies = self.readers  # + warp: cp.async
        self.mbarriers = self.copies + warps
        self.actors = self.mbarriers + MBARRIERS
        self.seen = np.zeros((warps + 1, self.actors), np.int32)  # the last row: see `joined`
        self.seen[np.arange(warps), np.arange(warps)] = 1
        self.fenced = np.zeros_like(self.seen)
        self.groups = np.zeros(self.readers + warps, np.int32)  # groups of asynchronous operations that are committed
        self.bulk_reads = np.zeros(warps, np.int32)  # the group of the last bulk copy out of shared memory

    def now(self, warps: np.ndarray) -> np.ndarray:
        return self.seen[warps, warps]

    def tick(self, warps) -> None:
        """After a release or a fence: what a warp does next is later than what it made known."""
        self.seen[warps, warps] += 1

    def fence(self, warps) -> None:
        self.fenced[warps] = np.maximum(self.fenced[warps], self.seen[warps])
        self.tick(warps)

    def publish(self, warps) -> tuple[np.ndarray, np.ndarray]:
        """What these warps know together, for others to acquire."""
        known = self.seen[warps].max(0), self.fenced[warps].max(0)
        self.tick(warps)
        return known

    def acquire(self, warps, known: tuple[np.ndarray, np.ndarray]) -> None:
        for mine, theirs in zip((self.seen, self.fenced), known, strict=True):
            mine[warps] = np.maximum(mine[warps], theirs)

    def wait_for(self, warps, actor: int, time: int) -> None:
        """Warps wait for an actor's operations up to a time."""
        self.seen[warps, actor] = np.maximum(self.seen[warps, actor], time)

    def joined(self, warps) -> int:
        """A warp that stands for several which act together: what every one of them knows, it knows."""
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
