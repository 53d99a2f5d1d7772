"""The errors that the machine raises for a program that would be wrong on the chip."""


class Fault(RuntimeError):
    """The program does something that is undefined on the chip, or it waits for ever."""


class Race(Fault):
    """Nothing orders two accesses to the same byte of memory, one of which is a write."""


class MissingProxyFence(Fault):
    """The copy engine or the tensor cores access bytes that threads wrote, without a fence.proxy.async between."""


class Deadlock(Fault):
    """Every warp that has not ended waits for a barrier."""


class DivergentBarrier(Fault):
    """Only a part of a warp or warpgroup is at an instruction that all its lanes must execute together."""
