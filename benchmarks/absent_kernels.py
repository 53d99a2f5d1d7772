"""The kernels that absent_gpu.py compiles: KERNELS maps a name to a function that makes the Kernel.

To add one, write such a function and enter it in KERNELS. Imports that need the CUDA wheels belong inside it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kernel(NamedTuple):
    """What to compile, and how often its loops run."""

    function: Callable  # of arrays of these shapes; not jitted
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    # Iterations of each main loop, of all warpgroups together; kernels in the order of their names, loops of the code.
    tiles: tuple[int, ...]


def softmax_mosaic() -> Kernel:
    """JAX's own Hopper attention, causal. In float16: its scratch is of that type, whatever the inputs are."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    B, T, N, H, block_q, block_kv = 4, 4096, 12, 128, 64, 128
    config = attention_mgpu.TuningConfig(block_q=block_q, block_kv=block_kv, max_concurrent_steps=2, causal=True)
    # Per row of tiles: those wholly to the left of the diagonal run without a mask, then those on it with one.
    unmasked = [start // block_kv for start in range(0, T, block_q)]
    every = [-(-(start + block_q) // block_kv) for start in range(0, T, block_q)]
    return Kernel(
        lambda query, key, value: attention_mgpu.attention(query, key, value, config),
        (jax.ShapeDtypeStruct((B, T, N, H), jnp.float16),) * 3,
        tiles=(B * N * sum(unmasked), B * N * (sum(every) - sum(unmasked))),
    )


KERNELS: dict[str, Callable[[], Kernel]] = {"softmax_mosaic": softmax_mosaic}
