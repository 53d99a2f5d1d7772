"""Triton kernels for tests/test_triton_call.py, which tests how the interpreter rounds bfloat16 numbers."""

import triton
import triton.language as tl


@triton.jit
def to_bfloat16_and_back(x_ref, out_ref, size: tl.constexpr):
    place = tl.arange(0, size)
    tl.store(out_ref + place, tl.load(x_ref + place).to(tl.bfloat16).to(tl.float32))


@triton.jit
def product_of_rounded(x_ref, y_ref, out_ref, size: tl.constexpr):
    """Compute out = x @ y for [size, size] matrices, after x is rounded from float32 to the type of y.

    The attention kernels round their weights in this way.
    """
    row, column = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    x, y = tl.load(x_ref + row * size + column), tl.load(y_ref + row * size + column)
    tl.store(out_ref + row * size + column, tl.dot(x.to(y.dtype), y))


@triton.jit
def cube(x_ref, out_ref, size: tl.constexpr):
    """Compute the cube of each bfloat16 number, or zero where the square, rounded to bfloat16, is not positive."""
    x = tl.load(x_ref + tl.arange(0, size))
    square = x * x
    tl.store(out_ref + tl.arange(0, size), tl.where(square > 0, square * x, 0.0))
