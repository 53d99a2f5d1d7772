"""The memory of a launch: the arrays in global memory, and the shared memory of a block.

Shared memory records for each byte which actors (see clocks.py) accessed the byte and when, so that races are found.
"""

import numpy as np

from .clocks import Clocks
from .decode import ARRAY_SHIFT, SHARED
from .faults import Fault, MissingProxyFence, Race


def spread(addresses: np.ndarray, size: int) -> np.ndarray:
    """Return the addresses of all bytes of several accesses: each begins at one of `addresses` and has `size` bytes.

    The result has shape [len(addresses) * size].
    """
    return (np.asarray(addresses, np.int64)[:, None] + np.arange(size)).reshape(-1)


NOBODY, SEVERAL = -1, -2  # instead of a block's number: no block, or several blocks


class GlobalMemory:
    """The arrays of a launch.

    A read raises Race if another block has written the byte. A write raises Race if another block has read or written
    the byte.
    """

    def __init__(self, arrays: list[np.ndarray]):
        if not all(x.flags.c_contiguous for x in arrays):
            raise ValueError("the arrays of a launch must be contiguous")
        self.bytes = [x.reshape(-1).view(np.uint8) for x in arrays]
        self.writers: list[np.ndarray | None] = [None] * len(arrays)
        self.readers: list[np.ndarray | None] = [None] * len(arrays)
        self.block = 0

    @staticmethod
    def address(array: int) -> int:
        return (array + 1) << ARRAY_SHIFT

    def _locate(self, addresses: np.ndarray, size: int, text: str) -> tuple[int, np.ndarray]:
        arrays = (addresses >> ARRAY_SHIFT) - 1
        array = int(arrays[0])
        if not (arrays == array).all():
            raise Fault(f"the lanes of one instruction access several arrays: {text}")
        offsets = addresses & ((1 << ARRAY_SHIFT) - 1)
        self._require_inside(array, spread(offsets, size), text)
        if (offsets % size).any():
            raise Fault(f"global memory: an address is not a multiple of {size} bytes: {text}")
        return array, spread(offsets, size)

    def read(self, addresses: np.ndarray, size: int, text: str) -> np.ndarray:
        """Return the `size` bytes at each address, uint8 [lanes, size], for the instruction `text`."""
        array, at = self._locate(addresses, size, text)
        return self.read_bytes(array, at, text).reshape(-1, size)

    def write(self, addresses: np.ndarray, values: np.ndarray, text: str) -> None:
        array, at = self._locate(addresses, values.shape[1], text)
        self.write_bytes(array, at, values.reshape(-1), text)

    def write_bytes(self, array: int, at: np.ndarray, values: np.ndarray, text: str) -> None:
        self._require_inside(array, at, text)
        self._require_own(array, at, text)
        readers = self.readers[array]
        if readers is not None and (bad := ~np.isin(readers[at], (NOBODY, self.block))).any():
            first = int(np.asarray(at)[bad][0])
            raise Race(f"byte {first} of array {array}: block {self.block} writes it, another block reads it: {text}")
        if self.writers[array] is None:
            self.writers[array] = np.full(self.bytes[array].size, NOBODY, np.int32)
        self.writers[array][at] = self.block
        self.bytes[array][at] = values
        if (self.bytes[array][at] != values).any():
            raise Race(f"array {array}: one instruction writes two values to one byte: {text}")

    def read_bytes(self, array: int, at: np.ndarray, text: str) -> np.ndarray:
        self._require_inside(array, at, text)
        self._require_own(array, at, text)
        if self.readers[array] is None:
            self.readers[array] = np.full(self.bytes[array].size, NOBODY, np.int32)
        readers = self.readers[array]
        readers[at] = np.where(np.isin(readers[at], (NOBODY, self.block)), self.block, SEVERAL)
        return self.bytes[array][at]

    def _require_inside(self, array: int, at: np.ndarray, text: str) -> None:
        if not 0 <= array < len(self.bytes):
            raise Fault(f"global memory: an address outside of all arrays: {text}")
        if at.min() < 0 or at.max() >= self.bytes[array].size:
            worst = at.min() if at.min() < 0 else at.max()
            raise Fault(f"access to byte {worst} of array {array}, which has {self.bytes[array].size} bytes: {text}")

    def _require_own(self, array: int, at: np.ndarray, text: str) -> None:
        writers = self.writers[array]
        if writers is not None:
            others = writers[at]
            if (bad := (others >= 0) & (others != self.block)).any():
                first = int(at[bad][0])
                who = f"block {self.block} accesses it, block {others[bad][0]} wrote it"
                raise Race(f"byte {first} of array {array}: {who}: {text}")


class SharedMemory:
    """The shared memory of one block, with checks for races. Its addresses begin at SHARED.

    `equal_writes`: if True, two warps may write the same value to a byte, even if no barrier orders the two writes.
    """

    def __init__(self, size: int, clocks: Clocks, equal_writes: bool):
        self.clocks, self.size, self.equal_writes = clocks, size, equal_writes
        # Threads may read unwritten bytes if the value does not matter. 0xFF is NaN in every floating-point type.
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.is_written = np.zeros(size, bool)
        self.writer, self.write_time = np.zeros(size, np.int16), np.zeros(size, np.int32)
        self.is_generic = np.zeros(size, bool)  # whether threads wrote the byte last, not the copy engine
        self.reads = np.zeros((clocks.readers, size), np.int32)
        self.has_read: list[int] = []  # the actors with a row of `reads` that is not all zero
        self.is_barrier = np.zeros(size, bool)

    def offsets(self, addresses: np.ndarray, size: int, text: str) -> np.ndarray:
        """Return the offsets of all bytes that the instruction `text` accesses, with `size` bytes at each address.

        Raises Fault if a byte is outside of shared memory, or if an address is not a multiple of `size`.
        """
        offsets = np.asarray(addresses, np.int64) - SHARED
        if offsets.min() < 0 or offsets.max() + size > self.size:
            worst = offsets.min() if offsets.min() < 0 else offsets.max() + size - 1
            raise Fault(f"access to byte {worst} of {self.size} bytes of shared memory: {text}")
        if (offsets % size).any():
            raise Fault(f"shared memory: an address is not a multiple of {size} bytes: {text}")
        return spread(offsets, size)

    def read(self, at: np.ndarray, actors, warps: np.ndarray | int, text: str, *, is_proxy: bool = False, time=None):
        """Return the bytes at the offsets `at`, for the instruction `text`.

        Raises Race, MissingProxyFence or Fault if the access is wrong.

        Args:
          actors: the readers, each by its index in `Clocks`: one index per byte, or one index for all bytes.
          warps: the number of the warp on whose behalf an actor reads: one per byte, or one for all bytes. For a read
            that several warps make together, this is the result of `Clocks.joined`.
          is_proxy: whether the copy engine or the tensor cores read.
          time: the time of the read on the clock of the actor. None: the present time of `warps`.
        """
        seen = self.clocks.seen
        if is_proxy and not self.is_written[at].all():
            first = int(np.asarray(at)[~self.is_written[at]][0])
            raise Fault(f"shared memory at byte {first}: read before it was written: {text}")
        writer, written = self.writer[at], self.write_time[at]
        late = seen[warps, writer] < written
        if late.any():
            self._race("written", at, writer, late, text)
        if is_proxy:
            hidden = self.is_generic[at] & (self.clocks.fenced[warps, writer] < written)
            if hidden.any():
                self._unfenced(at, writer, hidden, text)
        self.reads[actors, at] = self.clocks.now(warps) if time is None else time
        for actor in np.unique(actors):
            if actor not in self.has_read:
                self.has_read.append(int(actor))
        return self.bytes[at]

    def write(self, at, values, actors, warps, text: str, *, is_proxy: bool = False, time=None) -> None:
        """Write `values` to the bytes at the offsets `at`, for the instruction `text`.

        Raises Race, MissingProxyFence or Fault if the access is wrong.

        Args:
          actors: the writers, each by its index in `Clocks`: one index per byte, or one index for all bytes.
          warps: the number of the warp on whose behalf an actor writes: one per byte, or one for all bytes.
          is_proxy: whether the copy engine writes.
          time: the time of the write on the clock of the actor. None: the present time of `warps`.
        """
        seen = self.clocks.seen
        if self.is_barrier[at].any():
            raise Fault(f"an instruction writes over an mbarrier: {text}")
        writer, written = self.writer[at], self.write_time[at]
        late = seen[warps, writer] < written
        if self.equal_writes and not is_proxy:
            late &= self.bytes[at] != values
        if late.any():
            self._race("written", at, writer, late, text)
        for reader in self.has_read:
            late = seen[warps, reader] < self.reads[reader, at]
            if np.any(late):
                self._race("read", at, np.full(late.shape, reader), late, text)
        if is_proxy:
            hidden = self.is_generic[at] & (self.clocks.fenced[warps, writer] < written)
            if hidden.any():
                self._unfenced(at, writer, hidden, text)
        self.bytes[at] = values
        if not is_proxy and (self.bytes[at] != values).any():
            raise Race(f"one instruction writes two values to one byte of shared memory: {text}")
        self.is_written[at], self.is_generic[at] = True, not is_proxy
        self.writer[at] = actors
        self.write_time[at] = self.clocks.now(warps) if time is None else time

    def _race(self, what: str, at, actors, late, text: str):
        first = int(np.asarray(at)[late][0])
        who = f"{self.clocks.name(int(actors[late][0]))} has {what} it, and no barrier comes between"
        raise Race(f"shared memory at byte {first}: {who}: {text}")

    def _unfenced(self, at, actors, hidden, text: str):
        first = int(np.asarray(at)[hidden][0])
        raise MissingProxyFence(
            f"shared memory at byte {first}: {self.clocks.name(int(actors[hidden][0]))} wrote it, and no "
            f"fence.proxy.async came after that: {text}"
        )
