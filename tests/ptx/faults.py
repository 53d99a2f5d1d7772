"""The errors that the PTX machine raises for a kernel that would be wrong on the chip."""


class Fault(RuntimeError):
    """The kernel does something whose result is undefined on the chip, or it waits for ever."""


class Race(Fault):
    """Two accesses to the same byte of memory have no order, and at least one of them is a write."""


class MissingProxyFence(Fault):
    """The copy engine or the tensor cores access bytes that threads wrote, without a fence.proxy.async in between."""


class Deadlock(Fault):
    """All warps that have not ended wait for barriers."""


class DivergentBarrier(Fault):
    """Only some lanes of a warp or warpgroup execute an instruction that all of its lanes must execute together."""
