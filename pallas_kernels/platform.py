"""The platform for which JAX traces code: the device of this machine, an absent GPU, or the Mosaic GPU interpreter."""

import contextlib
import contextvars
import os
from collections.abc import Iterator

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, get_abstract_mesh, use_abstract_mesh

# {beginning of the name of a GPU: compute capability}, for GPUs that may be absent from this machine.
CAPABILITIES = {
    "NVIDIA A100": "sm_80", "NVIDIA L40S": "sm_89", "NVIDIA H100": "sm_90", "NVIDIA H200": "sm_90",
    "NVIDIA GH200": "sm_90", "NVIDIA B200": "sm_100", "NVIDIA RTX PRO 6000": "sm_120",
}  # fmt: skip
HOPPER = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)

_interpreted = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def absent_gpu() -> Iterator[None]:
    """In this context, JAX traces and lowers programs for an H200, a Hopper GPU, even if this machine has no GPU."""
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=HOPPER)):
        yield


@contextlib.contextmanager
def interpret(*, detect_races: bool = False) -> Iterator[None]:
    """In this context, run Mosaic GPU kernels on the CPU, with their barriers, shared memory and warpgroups.

    With `detect_races`, the interpreter also looks for data races. The interpreter runs every warpgroup in a thread of
    XLA. XLA has as many threads as there are CPU cores or JAX CPU devices, whichever number is larger. With fewer than
    four threads, a kernel would wait forever. On a small machine, set
    XLA_FLAGS=--xla_force_host_platform_device_count=4 before JAX starts, to get four CPU devices.

    Raises:
      RuntimeError: there are fewer than four CPU cores and fewer than four CPU devices.
    """
    cores, devices = os.cpu_count() or 1, jax.local_device_count("cpu")
    if max(cores, devices) < 4:
        raise RuntimeError(
            f"the Mosaic GPU interpreter needs 4 CPU cores or 4 CPU devices, found {cores} cores, {devices} devices; "
            "set XLA_FLAGS=--xla_force_host_platform_device_count=4 before JAX starts"
        )
    token = _interpreted.set(True)
    try:
        with absent_gpu(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
            yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Return whether Mosaic GPU kernels run in the interpreter, that is, whether an `interpret` context is active."""
    return _interpreted.get()


def name() -> str:
    """Return the platform for which JAX traces code: "cpu", "gpu" or "tpu".

    In a context of `absent_gpu`, this is "gpu". In a context of `interpret`, it is the platform of this machine.
    """
    device = get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None or is_interpreted() else device.platform


def chip() -> str:
    """Return the compute capability of the GPU for which JAX traces code, such as "sm_90".

    In a context of `absent_gpu`, this is the compute capability of the absent GPU, from the table CAPABILITIES. If the
    table does not have this GPU, return the name of the GPU. Without a GPU, return the name of the platform, such as
    "cpu".
    """
    device = get_abstract_mesh().abstract_device
    if device is not None and device.platform == "gpu":
        kind = device.device_kind
        return next((name for start, name in CAPABILITIES.items() if kind.startswith(start)), kind)
    if jax.default_backend() != "gpu":
        return jax.default_backend()
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return f"sm_{capability.replace('.', '')}" if capability else "gpu"


def multiprocessors() -> int:
    """Return the number of streaming multiprocessors of the GPU for which JAX traces code.

    Without a GPU, or in a context of `interpret`, return 132, the number of an H200.
    """
    device = get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "gpu":
        device = jax.devices()[0]
    return getattr(device, "num_cores", None) or getattr(device, "core_count", None) or HOPPER.num_cores
