"""Whether kernels for Hopper GPUs can run here: the chip, its compiler, and the mesh."""

import jax

from . import seam


def refuses(x) -> str | None:
    """Why no such kernel takes arrays like x here, if it does not."""
    if not seam.is_interpreted() and (chip := seam.chip()) != "sm_90":
        return f"needs compute capability 9.0, found {chip}"
    if _miscompiles():
        return "needs CUDA 12.9.1 or newer: the compiler of 12.8.0 to 12.9.0 breaks causal kernels"
    if axes := _axes_to_split(x):
        return f"must be inside jax.shard_map under a mesh with the axes {', '.join(axes)}"
    return None


def _miscompiles() -> bool:
    """Whether the CUDA of this process has the assembler that is known to be wrong."""
    if seam.is_interpreted() or jax.default_backend() != "gpu":
        return False
    from jax._src.lib import cuda_versions  # None without the plugin

    return cuda_versions is not None and 12080 <= cuda_versions.cuda_runtime_get_version() < 12091


def _axes_to_split(x) -> list[str]:
    """Axes of the mesh of x over which XLA, not shard_map, divides the work: it would gather everything instead."""
    mesh = jax.typeof(x).sharding.mesh
    axes = zip(mesh.axis_names, mesh.axis_types or (), mesh.axis_sizes, strict=True) if not mesh.empty else ()
    return [str(name) for name, kind, size in axes if kind != jax.sharding.AxisType.Manual and size > 1]
