"""Estimate the time of a compiled step from compute, memory and network, and whether it fits into memory."""

from typing import NamedTuple

from stickjax.models.families import family_of
from stickjax.parallel.chips import Chip
from stickjax.plan.aot import Compiled

# Shares of the vendor's peaks that large matrix products and large copies reach. On an H200 they are 770 of 989 TFLOP/s
# and 4.3 of 4.8 TB/s.
COMPUTE, MEMORY = 0.78, 0.9
MEMORY_SHARE = 0.92  # of the device's memory: the rest is for CUDA, NCCL's buffers and fragmentation
ASSUMPTIONS = (
    f"compute: {COMPUTE:.0%} of the bf16 peak, as large products reach on an H200; only matrix products and kernels",
    f"memory: {MEMORY:.0%} of the bandwidth, operands and results of products and kernels once, parameters and "
    "optimizer state read and written once; elementwise operations are fused",
    "network: a ring per group at the rated bandwidth of one direction, over the host's links where the group lies "
    "within a host, over the GPU's own adapter otherwise; no latency, no congestion",
    "experts are balanced, attention computes its whole mask, no step is skipped",
    f"fits: at most {MEMORY_SHARE:.0%} of the memory",
)


class Estimate(NamedTuple):
    """The seconds that a step spends on compute, on memory traffic and on the network.

    `overlapped` is the time of the step if the slowest of the three hides the others, and `serial` the time if they run
    one after the other.
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
    """Return the floating-point operations of the model in a step, on all devices. Recomputed ones count once."""
    data = compiled.config.data
    return family_of(compiled.config.model).flops_per_token(compiled.config.model, data.T) * data.tokens_per_step


def estimate(compiled: Compiled, chip: Chip) -> Estimate:
    """Estimate the time of a compiled step on GPUs of one kind, under the ASSUMPTIONS of this file."""
    n = compiled.devices
    moved = compiled.work.bytes / n + 2 * sum(compiled.state.values())
    sent = sum(c.sent * c.count / (chip.link if c.local else chip.network) for c in compiled.collectives)
    return Estimate(compiled.work.flops / n / (COMPUTE * chip.flops), moved / (MEMORY * chip.bandwidth), sent)


def mfu(compiled: Compiled, chip: Chip, seconds: float) -> float:
    """Return the MFU: `model_flops` as a share of the operations that the devices can do at their peak in `seconds`.

    `chip` says what the peak of a device is.
    """
    return model_flops(compiled) / (compiled.devices * chip.flops * seconds)


def fits(compiled: Compiled, memory: int | None) -> bool:
    """Return whether the step fits into the memory of a device; True if the memory is not known."""
    return memory is None or compiled.peak <= MEMORY_SHARE * memory
