"""The GPU models that `stickjax.plan` supports, and a way to compile programs for them on a machine without a GPU.

The table CHIPS has the peak rates of every GPU model, as the vendors publish them. For the GPU model NAME, the file
`targets/NAME.txtpb` has the properties that CUDA reports. XLA needs these properties to compile.
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
    """Raised if the package jax_cuda13_plugin, which compiles for NVIDIA GPUs, is missing.

    The message says how to install the package.
    """


@dataclasses.dataclass(frozen=True)
class Chip:
    """A GPU model, with its peak FLOP/s and its bandwidths, which are in bytes/s, in one direction."""

    name: str
    kind: str  # the beginning of `jax.Device.device_kind` for this model
    flops: float  # dense bf16 peak, FLOP/s
    link: float  # bandwidth of a GPU to the other GPUs of its host
    network: float  # bandwidth of a GPU to other hosts, if the GPUs of its host share the network adapters equally

    @functools.cached_property
    def text(self) -> str:
        """The properties of the GPU in the text format that XLA reads: the content of `targets/NAME.txtpb`."""
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
    """Return the GPU model that CHIPS lists under `name`.

    Raise ValueError if CHIPS does not have this name. The message suggests the most similar name.

    >>> chip("h200").memory, chip("h200").bandwidth
    (150754820096, 4800000000000.0)
    """
    if name not in CHIPS:
        raise ValueError(f"unknown GPU {name!r}; the known GPUs are {', '.join(CHIPS)}{nearest(name, CHIPS)}")
    return CHIPS[name]


def of_kind(device_kind: str) -> Chip | None:
    """Return the GPU model for a `jax.Device.device_kind`, such as "NVIDIA H200"; None if it is not in CHIPS."""
    return next((chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)), None)


def has_wheels() -> bool:
    """Return whether the package that compiles for NVIDIA GPUs, jax_cuda13_plugin, is installed."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


@functools.cache
def absent_devices(name: str = "h200", devices: int = 1, hosts: int = 1) -> list[jax.Device]:
    """Return JAX devices for GPUs that this machine need not have. Programs can be compiled for them, but not run.

    Args:
      name: the GPU model, a name in CHIPS.
      devices: the number of GPUs of all hosts together, a multiple of `hosts`.
      hosts: the number of hosts. Every host has devices / hosts GPUs.

    Raises:
      MissingWheels: the package jax_cuda13_plugin is not installed.
      ValueError: CHIPS has no such name.
    """
    if not has_wheels():
        raise MissingWheels(
            "to compile for a GPU that this machine lacks, install jax_cuda13_plugin: pip install 'stickjax[cuda13]'"
        )
    topology = f"1x{hosts}x{devices // hosts}"  # slices x hosts x GPUs of a host
    return topologies.get_topology_desc(platform="cuda", target_config=chip(name).text, topology=topology).devices


@contextmanager
def tracing_for(device: jax.Device) -> Iterator[None]:
    """A context in which the programs that JAX traces choose their kernels for `device`.

    `device` may be a GPU that this machine does not have (see `absent_devices`).
    """
    abstract = AbstractDevice(device.device_kind, getattr(device, "core_count", None), device.platform)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        yield
