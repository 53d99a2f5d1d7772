"""A Triton kernel for tests/test_triton.py that runs `sum_of_nearer`, a device function of the attention kernels."""

import triton
import triton.language as tl

from pallas_kernels.stick_breaking import triton_tile as tile


@triton.jit
def sum_of_nearer(x_ref, out_ref, rows: tl.constexpr, keys: tl.constexpr):
    row, key = tl.arange(0, rows)[:, None], tl.arange(0, keys)[None, :]
    tl.store(out_ref + row * keys + key, tile.sum_of_nearer(tl.load(x_ref + row * keys + key)))
