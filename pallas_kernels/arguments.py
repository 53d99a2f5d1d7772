"""Checks of the arguments of the ops.

A wrong argument raises a ValueError that says the name of the argument, what it must be and what it was.
"""

import numbers
import operator

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")


def sum_type(x):
    """Return the dtype in which an op sums values of the array `x`: fp64 if `x` is fp64, else fp32."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def is_array(x) -> bool:
    """Return whether `x` is a JAX array (traced or not) or a NumPy array."""
    return isinstance(x, jax.Array | np.ndarray)


def array(name: str, x, letters: str):
    """Check that the argument `name` is an array `x` with one axis for every letter, and return the array.

    `letters` are the letters of the axes, separated by commas: "B,T,N,H" for an array with four axes. If `x` is a
    parameter of a module (it has `__jax_array__`), return its array.
    """
    if not is_array(x) and hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    if not is_array(x):
        raise ValueError(f"{name} must be an array [{letters}], got {_type(x)}")
    if len(x.shape) != len(letters.split(",")):
        raise ValueError(f"{name} must be [{letters}], got {name}.shape={x.shape}")
    return x


def floats(name: str, x, letters: str):
    """Check the argument `name` as in `array`, and check that its dtype is one of FLOATS. Return the array.

    A NumPy array of float64 becomes float32 unless `jax_enable_x64` is set.
    """
    x = array(name, x, letters)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {name}.dtype={x.dtype}")
    if x.dtype.name not in FLOATS:
        raise ValueError(f"{name} must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}, got {name}.dtype={x.dtype}")
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False) if isinstance(x, np.ndarray) else x


def integers(name: str, x, letters: str):
    """Check that the argument `name` is an array `x` of integers with one axis for every letter, and return it.

    `letters` are the letters of the axes, separated by commas: "B,T" for an array with two axes.
    """
    if not is_array(x) or len(x.shape) != len(letters.split(",")) or not jnp.issubdtype(x.dtype, jnp.integer):
        got = f"{x.dtype}{list(x.shape)}" if is_array(x) else _type(x)
        raise ValueError(f"{name} must be integers [{letters}], got {got}")
    return x


def integer(name: str, x, least: int) -> int:
    """Check that the argument `name` is an integer `x` of at least `least`, and return it as a Python int.

    A traced `x` is an error: the program depends on this number, so it must be known when the program is traced.
    """
    try:
        value = operator.index(x)
    except TypeError:
        raise ValueError(f"{name} must be an int that is not traced, got {_type(x)}") from None
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return value


def number(name: str, x):
    """Check that the argument `name` is a real Python number or an array without axes, and return it."""
    is_one = isinstance(x, numbers.Real) or (is_array(x) and jnp.issubdtype(x.dtype, jnp.number))
    if isinstance(x, bool) or not is_one or (is_array(x) and jnp.iscomplexobj(x)):
        raise ValueError(f"{name} must be a number or an array without axes, got {_type(x)}")
    if np.shape(x) != ():
        raise ValueError(f"{name} must be a number or an array without axes, got {name}.shape={np.shape(x)}")
    return x


def flag(name: str, x) -> bool:
    """Check that the argument `name` is True or False, and return it as a Python bool. A traced `x` is an error."""
    if not isinstance(x, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {_type(x)}")
    return bool(x)


def _type(x) -> str:
    """Describe `x` in an error message: dtype and shape of an array, such as "float32[2, 8]", else the type's name."""
    if isinstance(x, jax.core.Tracer):
        return f"a traced {x.dtype}{list(x.shape)}"
    return f"{x.dtype}{list(x.shape)}" if is_array(x) else "None" if x is None else type(x).__name__
