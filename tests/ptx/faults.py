"""The errors that the PTX machine raises for a kernel that would be wrong on the chip."""


class Fault(RuntimeError):
    """Raised if the kernel does something whose result is undefined on the chip, or if it waits for ever."""


class Race(Fault):
    """Raised if two accesses to the same byte of memory have no order, and at least one of them is a write."""


class MissingProxyFence(Fault):
    """Raised if the copy engine or tensor cores access bytes that threads wrote, and no proxy fence came in between."""


class Deadlock(Fault):
    """Raised if all warps that have not ended wait for barriers."""


class DivergentBarrier(Fault):
    """Raised if only some lanes of a warp or warpgroup execute an instruction that all its lanes must execute.

    Also raised if the warps that meet at a named barrier expect different numbers of threads, if more threads arrive
    than expected, or if the lanes of one instruction name different barriers.
    """
