"""Triton kernels called from JAX.

Only this file and triton_interpreter.py import jax-triton and triton, when they are first used.

Under `interpret()`, or with TRITON_INTERPRET=1 in the environment, kernels run on the CPU in Triton's own interpreter.
Triton settles that when it is imported, so a process either compiles its kernels or interprets them.
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

LEAST = 80  # compute capability: asynchronous copies and bfloat16 products
# Bytes of shared memory that a block may have, by compute capability; 99 KiB for the others.
SHARED_MEMORY = {80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024}
# The language version of CUDA 12.9: Triton would write for its own assembler, which may be newer than JAX's.
PTX = 88
PACKAGES = ("triton", "jax_triton")


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Run Triton kernels on the CPU, in a process that has not compiled any."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        if "triton" in sys.modules and not _was_imported_to_interpret():
            raise RuntimeError("triton was imported to compile: interpret in another process, or before that")
        if is_installed():
            from triton.runtime.jit import mangle_type

            mangle_type(0)  # imports the rest of Triton: a program may still run when this has been left
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_installed() -> bool:
    return not _missing()


@functools.cache
def _missing() -> tuple[str, ...]:
    return tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None)


def _was_imported_to_interpret() -> bool:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.cdiv, InterpretedFunction)


def refuses(x) -> str | None:
    """Why no Triton kernel takes arrays like x here, if none does."""
    if platform.is_interpreted() and not is_interpreted():
        return "runs in no interpreter but its own"
    if not is_interpreted() and (capability() or 0) < LEAST:
        return f"needs compute capability 8.0 or newer, found {platform.chip()}"
    if missing := _missing():
        return f"needs pip install 'stickjax[triton]' ({' and '.join(missing)} not found)"
    return (None if is_interpreted() else hopper.compiler_refuses()) or hopper.mesh_refuses(x)


def capability() -> int | None:
    """90 for compute capability 9.0 and so on, None where there is no NVIDIA GPU; an absent GPU counts."""
    name = platform.chip().removeprefix("sm_")
    return int(name) if name.isdecimal() else None


def shared_memory() -> int:
    """Bytes that a block may have; the least of all GPUs where there is none."""
    return SHARED_MEMORY.get(capability(), 99 * 1024)


def launch(
    kernel: Callable[[], Any], *arrays: jax.Array, out: Any, grid: tuple[int, ...], num_warps: int, num_stages: int,
    **constants: Any,
):  # fmt: skip
    """Run a Triton kernel over a grid. Under vmap, once for every entry.

    Args:
      kernel: returns the `triton.jit` function, so that triton is imported only now. Its arguments are pointers to
        the arrays, pointers to the outputs, and the constants.
      out: pytree of jax.ShapeDtypeStruct.
      num_warps: warps of a block.
      num_stages: of the software pipeline of its loops.
      constants: the `tl.constexpr` arguments.

    Returns:
      Arrays like `out`.
    """
    options = dict(out=out, grid=grid, num_warps=num_warps, num_stages=num_stages, constants=constants)
    run = triton_interpreter.run if is_interpreted() else _compiled
    return jax.custom_batching.sequential_vmap(functools.partial(run, kernel, **options))(*arrays)


def _compiled(kernel, *arrays, out, grid, num_warps, num_stages, constants):
    jax_triton = _jax_triton()
    if _was_imported_to_interpret():
        raise RuntimeError("triton was imported to interpret: compile in another process")
    if jax_triton.__version_info__ >= (0, 4):
        options = dict(out_type=out, backend_options={"enable_fp_fusion": True, "ptx_version": PTX})
    else:  # which writes the PTX that triton chooses
        options = dict(out_shape=out, enable_fp_fusion=True)
    return jax_triton.triton_call(
        *arrays, kernel=kernel(), grid=grid, num_warps=num_warps, num_stages=num_stages,
        compute_capability=capability(), **options, **constants,
    )  # fmt: skip


@functools.cache
def _jax_triton():
    import jax_triton
    from jax._src.interpreters import partial_eval
    from jax_triton import triton_lib

    # jax-triton up to 0.4.1 has a rule for dead code of two arguments, and JAX 0.12 gives three. JAX's own will do.
    if jax.version.__version_info__ >= (0, 12) and jax_triton.__version_info__ <= (0, 4, 1):
        partial_eval.dce_rules.pop(triton_lib.triton_kernel_call_p, None)
    return jax_triton
