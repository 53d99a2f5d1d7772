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
    """Return the dtype in which values like `x` are summed: fp64 for fp64, fp32 for all other types."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def is_array(x) -> bool:
    """Return whether `x` is a JAX array (traced or not) or a NumPy array."""
    return isinstance(x, jax.Array | np.ndarray)


def array(name: str, x, letters: str):
    """Check that `x` is an array with one axis for every letter of `letters`, such as "B,T,N,H", and return it.

    If `x` is a parameter of a module (it has `__jax_array__`), return its array.
    """
    if not is_array(x) and hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    if not is_array(x):
        raise ValueError(f"{name} must be an array [{letters}], got {_type(x)}")
    if len(x.shape) != len(letters.split(",")):
        raise ValueError(f"{name} must be [{letters}], got {name}.shape={x.shape}")
    return x


def floats(name: str, x, letters: str):
    """Check that `x` is an array, as in `array`, and that its dtype is one of FLOATS. Return it.

    A NumPy array of float64 becomes float32 unless `jax_enable_x64` is set.
    """
    x = array(name, x, letters)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {name}.dtype={x.dtype}")
    if x.dtype.name not in FLOATS:
        raise ValueError(f"{name} must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}, got {name}.dtype={x.dtype}")
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False) if isinstance(x, np.ndarray) else x


def integers(name: str, x, letters: str):
    """Check that `x` is an array of integers with one axis for every letter, and return it."""
    if not is_array(x) or len(x.shape) != len(letters.split(",")) or not jnp.issubdtype(x.dtype, jnp.integer):
        got = f"{x.dtype}{list(x.shape)}" if is_array(x) else _type(x)
        raise ValueError(f"{name} must be integers [{letters}], got {got}")
    return x


def integer(name: str, x, least: int) -> int:
    """Check that `x` is an int of at least `least`, and return it as a Python int.

    A traced value is refused: the program depends on this number, so it must be known when the program is traced.
    """
    try:
        value = operator.index(x)
    except TypeError:
        raise ValueError(f"{name} must be an int that is not traced, got {_type(x)}") from None
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return value


def number(name: str, x):
    """Check that `x` is a Python number or an array [], and return it."""
    is_one = isinstance(x, numbers.Real) or (is_array(x) and jnp.issubdtype(x.dtype, jnp.number))
    if isinstance(x, bool) or not is_one or (is_array(x) and jnp.iscomplexobj(x)):
        raise ValueError(f"{name} must be a number or an array without axes, got {_type(x)}")
    if np.shape(x) != ():
        raise ValueError(f"{name} must be a number or an array without axes, got {name}.shape={np.shape(x)}")
    return x


def flag(name: str, x) -> bool:
    """Check that `x` is True or False, and return it as a bool. A traced value is refused."""
    if not isinstance(x, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {_type(x)}")
    return bool(x)


def _type(x) -> str:
    if isinstance(x, jax.core.Tracer):
        return f"a traced {x.dtype}{list(x.shape)}"
    return f"{x.dtype}{list(x.shape)}" if is_array(x) else "None" if x is None else type(x).__name__
