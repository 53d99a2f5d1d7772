"""The GPU models for which `stickjax.plan` computes: their rates from the vendors' tables, and devices to compile for.

XLA reads the properties of a GPU from the file `targets/NAME.txtpb`, whose numbers are those that CUDA reports.
"""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from stickjax.config.fields import nearest

TARGETS = Path(__file__).parent / "targets"


class MissingWheels(ImportError):
    """Raised if the packages that compile for NVIDIA GPUs are missing. The message says how to install them."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A GPU model. Bandwidths are in bytes/s, in one direction."""

    name: str
    kind: str  # the beginning of its device_kind in JAX
    flops: float  # dense bf16 peak, FLOP/s
    link: float  # bandwidth to the other GPUs of its host
    network: float  # bandwidth to other hosts: one GPU's share of the network adapters of the host

    @functools.cached_property
    def text(self) -> str:
        """The properties of the GPU as text for XLA: the content of its file in `targets`."""
        return (TARGETS / f"{self.name}.txtpb").read_text()

    def _number(self, field: str) -> float:
        return float(re.search(rf"\b{field}: ([\d.]+)", self.text)[1])

    @property
    def memory(self) -> int:
        """The size of the GPU's memory in bytes."""
        return int(self._number("device_memory_size"))

    @property
    def bandwidth(self) -> float:
        """The bandwidth of the GPU's memory in bytes/s."""
        return self._number("memory_bandwidth")


CHIPS = {
    chip.name: chip
    for chip in (
        # NVLink 3, 4 and 5; InfiniBand of 200 and 400 Gb/s per GPU, as in the vendors' hosts with eight GPUs.
        Chip("a100-80", "NVIDIA A100", flops=312e12, link=300e9, network=25e9),
        Chip("h100", "NVIDIA H100", flops=989e12, link=450e9, network=50e9),
        Chip("h200", "NVIDIA H200", flops=989e12, link=450e9, network=50e9),
        Chip("b200", "NVIDIA B200", flops=2250e12, link=900e9, network=50e9),
        # PCIe 4.0; InfiniBand of 200 Gb/s.
        Chip("l40s", "NVIDIA L40S", flops=362e12, link=32e9, network=25e9),
        # PCIe 5.0.
        Chip("rtx-pro-6000", "NVIDIA RTX PRO 6000", flops=504e12, link=64e9, network=25e9),
    )
}


def chip(name: str) -> Chip:
    """Return the GPU model with this name in CHIPS. Raise ValueError, with the nearest name, if there is none.

    >>> chip("h200").memory, chip("h200").bandwidth
    (150754820096, 4800000000000.0)
    """
    if name not in CHIPS:
        raise ValueError(f"unknown GPU {name!r}; the known GPUs are {', '.join(CHIPS)}{nearest(name, CHIPS)}")
    return CHIPS[name]


def of_kind(device_kind: str) -> Chip | None:
    """Return the GPU model in CHIPS for a `device_kind` of JAX, such as "NVIDIA H200"; None if there is none."""
    return next((chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)), None)


def has_wheels() -> bool:
    """Return whether the package that compiles for NVIDIA GPUs, jax_cuda13_plugin, is installed."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


@functools.cache
def absent_devices(name: str = "h200", devices: int = 1, hosts: int = 1) -> list[jax.Device]:
    """Return `devices` GPUs of the model `name` on `hosts` hosts, to compile programs for. They need not exist.

    Every host has the same number of GPUs. Raise MissingWheels if jax[cuda13] is not installed.
    """
    if not has_wheels():
        raise MissingWheels(
            "compiling for absent GPUs needs jax[cuda13]: pip install 'stickjax[cuda13]' (jax_cuda13_plugin not found)"
        )
    topology = f"1x{hosts}x{devices // hosts}"  # slices x hosts x GPUs of a host
    return topologies.get_topology_desc(platform="cuda", target_config=chip(name).text, topology=topology).devices


@contextmanager
def tracing_for(device: jax.Device) -> Iterator[None]:
    """Inside this context, kernels are chosen as if the program ran on `device`. The device need not exist."""
    abstract = AbstractDevice(device.device_kind, getattr(device, "core_count", None), device.platform)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        yield
