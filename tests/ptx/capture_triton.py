"""Run a JAX function on a CPU, and execute the PTX that its Triton kernels have on a GPU.

capture.py does the same for Mosaic kernels. Needs triton and jax-triton, but neither the CUDA wheels nor a GPU.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from . import machine
from .capture import Host
from .program import Program

NULL = bytes(8)  # a null pointer, for the parameters that Triton adds for debuggers and profilers


class _Kernel(NamedTuple):
    """A compiled Triton kernel: its name, warps per block, blocks per cluster, bytes of shared memory, and PTX.

    jax-triton passes these values, in this order, as the first arguments to its launch library.
    """

    name: str
    warps: int
    clusters: int
    shared: int
    ptx: str


# If a tile has fewer rows than the warps need, several of Triton's warps write the same value to a byte in no order.
launch = functools.partial(machine.launch, equal_writes=True)


def run(function: Callable, *arrays, launch: Callable = launch, device: str = "NVIDIA A100"):
    """Return function(*arrays), computed on the CPU; the function is traced as for a GPU with the name `device`.

    `launch` is a function (program, arrays) that runs a kernel and writes its outputs, which are the last arrays, in
    place.
    """
    with kernels_launched_by(launch, device):
        return jax.block_until_ready(jax.jit(lambda *arguments: function(*arguments))(*arrays))


def programs(function: Callable, *arrays, device: str = "NVIDIA A100") -> list[Program]:
    """Return the different Triton kernels of a function as Programs, in the order in which they are lowered.

    `function` is traced for arrays with the shapes and types of `arrays` and for a GPU with the name `device`. Nothing
    runs.
    """
    with kernels_launched_by(lambda *_: None, device) as found:
        jax.jit(lambda *arguments: function(*arguments)).trace(*arrays).lower()
    return list({program.ptx: program for program in found}.values())


@contextlib.contextmanager
def kernels_launched_by(launch: Callable, device: str = "NVIDIA A100") -> Iterator[list[Program]]:
    """Inside this context, compile functions as for the GPU `device`, and run their Triton kernels by `launch`.

    The list that is yielded receives the Program of every kernel that is lowered. At the end, the context raises the
    first error that `launch` has raised.
    """
    from jax._src.interpreters import mlir
    from jax_triton import triton_lib

    host, found = Host(launch), []

    def lower(ctx, *arguments, **parameters):
        """Lower a kernel call by the lowering rule of jax-triton, which compiles the kernel.

        Two parts of the rule are replaced. In place of the launch library, `launched` records the kernel. The emitted
        code does not launch the kernel on a GPU, but calls `host`, which runs the kernel by `launch`.
        """

        def launched(kernel, *grid_and_parameters):
            *grid, parameters = grid_and_parameters
            found.append(_program(kernel, tuple(grid), parameters))
            return SimpleNamespace(to_proto=lambda *_: b"")

        library = SimpleNamespace(
            TritonKernel=_kernel,
            TritonKernelCall=launched,
            create_array_parameter=lambda zeroed, divisibility: zeroed,
        )

        def emitted(ctx, *arguments, **_):
            return host.call(ctx, found[-1], *arguments)

        with (
            mock.patch.object(triton_lib, "triton_kernel_call_lib", library),
            mock.patch.object(triton_lib.TritonFunction, "_kernel_cache", {}),
            mock.patch.object(jax.ffi, "ffi_lowering", lambda *_, **__: emitted),
        ):
            return triton_lib.triton_kernel_call_lowering(triton_lib.make_cuda_target, ctx, *arguments, **parameters)

    rules = {triton_lib.triton_kernel_call_p: mlir.LoweringRuleEntry(lower, inline=True)}
    chip = AbstractDevice(device_kind=device, platform="gpu", num_cores=None)
    with (
        use_abstract_mesh(AbstractMesh((), (), abstract_device=chip)),
        mock.patch.dict(mlir._platform_specific_lowerings["cpu"], rules),
    ):
        try:
            yield found
        finally:  # an error of a launch comes first: an error in the body may only be its consequence
            host.raise_error()


def _kernel(name, warps, clusters, shared, ptx, _, __, *scratch):
    if clusters != 1 or scratch:
        raise NotImplementedError(
            f"{name}: the PTX machine supports only clusters of 1 block, not {clusters}, and only kernels without "
            f"scratch memory, not {scratch}"
        )
    return _Kernel(name, warps, clusters, shared, ptx)


def _program(kernel: _Kernel, grid: tuple[int, int, int], zeroed: list[int]) -> Program:
    """Return the Program of a kernel. The parameters of the Program are the arrays, followed by Triton's null pointers.

    `zeroed` has one number per array. The number 0 means that the array may have any content before the launch. Any
    other number means that the array must be zero before the launch; this raises NotImplementedError.
    """
    if any(zeroed):
        raise NotImplementedError(
            f"{kernel.name}: the PTX machine does not support outputs that must be zero before the launch"
        )
    entry = kernel.ptx.split(".entry", 1)[1]
    count = entry[: entry.index(")")].count(".param")
    parameters = (*range(len(zeroed)), *[NULL] * (count - len(zeroed)))
    return Program(kernel.name, kernel.ptx, grid, (32 * kernel.warps, 1, 1), kernel.shared, parameters)
