"""Kernels for test_triton_call.py, which test how the interpreter rounds bfloat16 numbers."""

import triton
import triton.language as tl


@triton.jit
def to_bfloat16_and_back(x_ref, out_ref, size: tl.constexpr):
    place = tl.arange(0, size)
    tl.store(out_ref + place, tl.load(x_ref + place).to(tl.bfloat16).to(tl.float32))


@triton.jit
def product_of_rounded(x_ref, y_ref, out_ref, size: tl.constexpr):
    """Compute out = x y. x is float32 and is rounded to the type of y, as attention weights are before a product."""
    row, column = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    x, y = tl.load(x_ref + row * size + column), tl.load(y_ref + row * size + column)
    tl.store(out_ref + row * size + column, tl.dot(x.to(y.dtype), y))


@triton.jit
def cube(x_ref, out_ref, size: tl.constexpr):
    """Compute the cube of bfloat16 numbers; zero where the square is not positive."""
    x = tl.load(x_ref + tl.arange(0, size))
    square = x * x
    tl.store(out_ref + tl.arange(0, size), tl.where(square > 0, square * x, 0.0))
