"""Checks of the GPU, the CUDA compiler and the mesh: can this process run kernels for Hopper GPUs?"""

import jax

from . import automatic, platform


def refuses(x) -> str | None:
    """Return the reason why no kernel for Hopper GPUs can run on the array `x`, or None if a kernel can run.

    This function checks the GPU, the CUDA compiler, and the mesh over which `x` is sharded. The caller checks the shape
    and the dtype of `x`.
    """
    if not platform.is_interpreted() and (chip := platform.chip()) != "sm_90":
        return f"needs compute capability 9.0, found {chip}"
    return compiler_refuses() or mesh_refuses(x)


def compiler_refuses() -> str | None:
    """Return the reason why the CUDA compiler of this process must not be used, or None if it can be used.

    Some versions of the compiler translate kernels wrongly, so that the kernels compute wrong results.
    """
    if platform.is_interpreted() or jax.default_backend() != "gpu":
        return None
    from jax._src.lib import cuda_versions  # is None if JAX's CUDA plugin is not installed

    if cuda_versions is not None and 12080 <= cuda_versions.cuda_runtime_get_version() < 12091:
        return "needs CUDA 12.9.1 or newer: the compiler of 12.8.0 to 12.9.0 miscompiles causal kernels"
    return None


def mesh_refuses(x) -> str | None:
    """Return the reason why no kernel can run on the mesh of the array `x`, or None if a kernel can run on it.

    On a mesh of several devices, a kernel can run only in code that computes with the shards of one device. There are
    two kinds of such code:

    - code inside a `jax.shard_map` over all mesh axes that have more than one device;
    - an op on a mesh of Auto axes, while JAX traces the program of one device (`automatic.is_tracing_part`).

    In all other code, XLA would all-gather every array that the kernel reads.
    """
    if automatic.is_tracing_part():
        return None
    mesh = jax.typeof(x).sharding.mesh
    axes = zip(mesh.axis_names, mesh.axis_types or (), mesh.axis_sizes, strict=True) if not mesh.empty else ()
    split = [str(name) for name, kind, size in axes if kind != jax.sharding.AxisType.Manual and size > 1]
    return f"needs jax.shard_map over the mesh axes {', '.join(split)}" if split else None
