"""Call Triton kernels from JAX.

triton and jax-triton are imported only when they are first used, not when this package is imported.

Inside `with interpret():`, or with TRITON_INTERPRET=1 in the environment, kernels run on the CPU in Triton's own
interpreter. Triton reads this setting when it is imported. So a process either compiles its kernels or interprets them.
"""

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from . import hopper, platform, triton_interpreter

LEAST = 80  # the lowest supported compute capability, 8.0: it has asynchronous copies and bfloat16 products
# {compute capability: bytes of shared memory that a block may have}. All other GPUs have 99 KiB (`shared_memory`).
SHARED_MEMORY = {80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024}
# PTX version 8.8, the version of CUDA 12.9. By default, Triton writes PTX for its own assembler, which may be newer
# than the assembler of JAX.
PTX = 88
PACKAGES = ("triton", "jax_triton")


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """In this context, run Triton kernels on the CPU, in Triton's own interpreter.

    Raises:
      RuntimeError: this process imported triton earlier, without TRITON_INTERPRET=1. So it can only compile kernels.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        if "triton" in sys.modules and not _was_imported_to_interpret():
            raise RuntimeError(
                "this process has imported triton to compile kernels, so it cannot interpret them; use "
                "`with triton_call.interpret():` before triton is imported, or in another process"
            )
        if is_installed():
            from triton.runtime.jit import mangle_type

            mangle_type(0)  # imports the rest of Triton now: a program may still run after this context
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def is_interpreted() -> bool:
    """Return whether Triton kernels run in Triton's own interpreter, that is, whether TRITON_INTERPRET is 1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_installed() -> bool:
    """Return whether both triton and jax-triton are installed."""
    return not _missing()


@functools.cache
def _missing() -> tuple[str, ...]:
    """Return the names of the packages in PACKAGES that are not installed."""
    return tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None)


def _was_imported_to_interpret() -> bool:
    """Return whether TRITON_INTERPRET was 1 when triton was imported."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.cdiv, InterpretedFunction)


def refuses(x) -> str | None:
    """Return the reason why no Triton kernel can run in this process on the array `x`, or None if a kernel can run.

    This function checks the GPU, the installed packages, the CUDA compiler, and the mesh over which `x` is sharded. The
    caller checks the shape and the dtype of `x`.
    """
    if platform.is_interpreted() and not is_interpreted():
        return "cannot run in the Mosaic GPU interpreter (Triton has its own interpreter: triton_call.interpret())"
    if not is_interpreted() and (capability() or 0) < LEAST:
        return f"needs compute capability 8.0 or newer, found {platform.chip()}"
    if missing := _missing():
        return f"needs pip install 'stickjax[triton]' ({' and '.join(missing)} not found)"
    return (None if is_interpreted() else hopper.compiler_refuses()) or hopper.mesh_refuses(x)


def capability() -> int | None:
    """Return the compute capability of the GPU for which JAX traces code, as an int, such as 90 for 9.0.

    Inside `with platform.absent_gpu():`, this is the compute capability of the absent GPU. Without an NVIDIA GPU,
    return None.
    """
    name = platform.chip().removeprefix("sm_")
    return int(name) if name.isdecimal() else None


def shared_memory() -> int:
    """Return how many bytes of shared memory a block may have on the GPU for which JAX traces code.

    Without a GPU, return the smallest number of all supported GPUs: 99 KiB.
    """
    return SHARED_MEMORY.get(capability(), 99 * 1024)


def launch(
    kernel: Callable[[], Any], *arrays: jax.Array, out: Any, grid: tuple[int, ...], num_warps: int, num_stages: int,
    **constants: Any,
):  # fmt: skip
    """Run a Triton kernel over a grid of blocks, and return its outputs.

    Under `jax.vmap`, the kernel runs once for every entry of the mapped axis.

    Args:
      kernel: a function without arguments that returns a `triton.jit` function. It may import triton, because it is
        called only when the kernel is compiled or interpreted. The `triton.jit` function takes pointers to the arrays,
        pointers to the outputs, and the constants.
      *arrays: the input arrays.
      out: a pytree of jax.ShapeDtypeStruct: the shapes and dtypes of the outputs.
      grid: the number of blocks along each axis of the grid.
      num_warps: the number of warps of a block.
      num_stages: the number of stages of the software pipeline into which Triton divides each loop.
      constants: the `tl.constexpr` arguments of the kernel.

    Returns:
      A pytree of arrays with the structure, shapes and dtypes of `out`.
    """
    options = dict(out=out, grid=grid, num_warps=num_warps, num_stages=num_stages, constants=constants)
    run = triton_interpreter.run if is_interpreted() else _compiled
    return jax.custom_batching.sequential_vmap(functools.partial(run, kernel, **options))(*arrays)


def _compiled(kernel, *arrays, out, grid, num_warps, num_stages, constants):
    """Compile a Triton kernel, run it on a GPU, and return its outputs. The arguments are as in `launch`."""
    jax_triton = _jax_triton()
    if _was_imported_to_interpret():
        raise RuntimeError(
            "this process has imported triton to interpret kernels (TRITON_INTERPRET=1), so it cannot compile them; "
            "compile kernels in another process"
        )
    if jax_triton.__version_info__ >= (0, 4):
        options = dict(out_type=out, backend_options={"enable_fp_fusion": True, "ptx_version": PTX})
    else:  # older versions write the PTX version that triton chooses
        options = dict(out_shape=out, enable_fp_fusion=True)
    return jax_triton.triton_call(
        *arrays, kernel=kernel(), grid=grid, num_warps=num_warps, num_stages=num_stages,
        compute_capability=capability(), **options, **constants,
    )  # fmt: skip


@functools.cache
def _jax_triton():
    """Import jax_triton, make it work with the installed JAX, and return the module.

    jax_triton registers a dead-code rule, with which JAX removes a kernel whose results are not used. JAX 0.12 and
    newer cannot call the rule of jax_triton 0.4.1 and older. If both packages have such versions, this function removes
    the rule. Then JAX uses its default rule.
    """
    import jax_triton
    from jax._src.interpreters import partial_eval
    from jax_triton import triton_lib

    # The dead-code rule of jax-triton up to 0.4.1 takes two arguments, but JAX 0.12 passes three.
    if jax.version.__version_info__ >= (0, 12) and jax_triton.__version_info__ <= (0, 4, 1):
        partial_eval.dce_rules.pop(triton_lib.triton_kernel_call_p, None)
    return jax_triton
