"""A Triton kernel that adds two arrays, for tests/test_triton_call.py."""

import triton
import triton.language as tl


@triton.jit
def add(x_ref, y_ref, out_ref, size: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < size
    total = tl.load(x_ref + place, mask=inside) + tl.load(y_ref + place, mask=inside)
    tl.store(out_ref + place, total, mask=inside)
