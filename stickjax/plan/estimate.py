"""Estimate the time of a step from its compute, memory traffic and network traffic; check that it fits into memory.

A step fits if its peak memory is at most the share MEMORY_SHARE of the memory of a device.
"""

from typing import NamedTuple

from stickjax.models.families import family_of
from stickjax.parallel.chips import Chip
from stickjax.plan.aot import Compiled

# The shares of the vendor's peak rates that large matrix products (COMPUTE) and large copies (MEMORY) reach. On an
# H200, these are 770 of 989 TFLOP/s and 4.3 of 4.8 TB/s.
COMPUTE, MEMORY = 0.78, 0.9
MEMORY_SHARE = 0.92  # the share of the memory that a step may use; the rest is for CUDA, NCCL and fragmentation
ASSUMPTIONS = (
    f"compute: {COMPUTE:.0%} of the bf16 peak, which large matrix products reach on an H200; only matrix products and "
    "kernels count",
    f"memory: {MEMORY:.0%} of the bandwidth; operands and results of matrix products and kernels are moved once, "
    "parameters and optimizer state are read and written once; elementwise operations are fused",
    "network: the devices of a collective form a ring; a GPU sends at the rated bandwidth of its links (within a host) "
    "or of its network adapter (between hosts); no latency, no congestion",
    "every expert gets the same number of tokens, attention computes every score that its mask allows, no training "
    "step is skipped",
    f"fits: the peak is at most {MEMORY_SHARE:.0%} of the device's memory",
)


class Estimate(NamedTuple):
    """The seconds that a step spends on compute, on memory traffic and on the network.

    `overlapped` is the time of the step if the three overlap completely: the maximum of the three times. `serial` is
    the time if they run one after the other: the sum of the three times.
    """

    compute: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        return max(self)

    @property
    def serial(self) -> float:
        return sum(self)


def model_flops(compiled: Compiled) -> float:
    """Return the number of floating-point operations that the model needs for a step, on all devices together.

    Operations that rematerialisation repeats count once.
    """
    data = compiled.config.data
    return family_of(compiled.config.model).flops_per_token(compiled.config.model, data.T) * data.tokens_per_step


def estimate(compiled: Compiled, chip: Chip) -> Estimate:
    """Estimate the time of a compiled step on GPUs of the type `chip`, under the ASSUMPTIONS of this file."""
    n = compiled.devices
    moved = compiled.work.bytes / n + 2 * sum(compiled.state.values())
    sent = sum(c.sent * c.count / (chip.link if c.local else chip.network) for c in compiled.collectives)
    return Estimate(compiled.work.flops / n / (COMPUTE * chip.flops), moved / (MEMORY * chip.bandwidth), sent)


def mfu(compiled: Compiled, chip: Chip, seconds: float) -> float:
    """Return the MFU (model FLOPs utilisation) of a step that takes `seconds`.

    The MFU is `model_flops` divided by the number of operations that all devices together can do in this time at the
    peak rate of `chip`.
    """
    return model_flops(compiled) / (compiled.devices * chip.flops * seconds)


def fits(compiled: Compiled, memory: int | None) -> bool:
    """Return whether the peak memory of the step is at most MEMORY_SHARE * `memory`, the bytes of a device.

    If `memory` is None (not known), return True.
    """
    return memory is None or compiled.peak <= MEMORY_SHARE * memory
