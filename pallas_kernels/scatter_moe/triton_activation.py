"""Activations and their derivatives inside Triton kernels, in fp32, with the formulas of call.py.

NAME is the name of a function of one variable: "silu", "gelu", "gelu_tanh", "relu" or "relu2", as in call.py, or "none"
for the identity. A gated activation, such as "swiglu", is f(first half of the pre-activation) * second half. Then NAME
is the name of f, the function that is applied to the first half: "silu" for "swiglu". The kernels multiply the result
by the second half.
"""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_NORMAL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_TWICE_SQRT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(NAME: tl.constexpr, x):
    """Apply the function NAME, such as "silu", to every element of the tile x. Return a tile of the same shape.

    Both tiles are in registers, in fp32.
    """
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * _SQRT_HALF))
    elif NAME == "gelu_tanh":
        y = x * tl.sigmoid(x * _TWICE_SQRT * (1 + x * x * _CUBIC))  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    elif NAME == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif NAME == "relu2":
        y = tl.where(x < 0, 0.0, x * x)
    else:
        y = x
    return y


@triton.jit
def slope(NAME: tl.constexpr, x):
    """Compute the derivative of the function NAME, such as "silu", at every element of the tile x.

    Return a tile of the same shape. Both tiles are in registers, in fp32.
    """
    if NAME == "silu":
        s = tl.sigmoid(x)
        y = s * (1 + x * (1 - s))
    elif NAME == "gelu":
        y = 0.5 * (1 + tl.erf(x * _SQRT_HALF)) + x * tl.exp(-0.5 * x * x) * _NORMAL
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(x * _TWICE_SQRT * (1 + x * x * _CUBIC))
        y = s + x * s * (1 - s) * _TWICE_SQRT * (1 + x * x * (3 * _CUBIC))
    elif NAME == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    elif NAME == "relu2":
        y = 2 * tl.where(x < 0, 0.0, x)
    else:
        y = tl.full(x.shape, 1.0, tl.float32)
    return y
