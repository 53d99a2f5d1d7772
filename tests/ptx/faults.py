"""What the machine reports of a program that is wrong on the chip."""


class Fault(RuntimeError):
    """The program does what the chip does not define, or waits for ever."""


class Race(Fault):
    """Two accesses to a byte of shared memory, one of them a write, that nothing orders."""


class MissingProxyFence(Fault):
    """The copy engine or the tensor cores touch bytes that threads wrote, without a fence.proxy.async between."""


class Deadlock(Fault):
    """Every warp that has not ended waits for a barrier."""


class DivergentBarrier(Fault):
    """A part of a warp, or of a warpgroup, is at an instruction that all of it must execute together."""
