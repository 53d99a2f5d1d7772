"""Checks of the arguments of the ops. An op is a public function of this package, such as `stick_breaking_attention`.

A wrong argument raises a ValueError. The message says which argument is wrong, what it must be, and what was passed.
"""

import numbers
import operator

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")


def sum_type(x):
    """Return the dtype in which an op sums the values of the array `x`: float64 if `x` is float64, else float32."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def is_array(x) -> bool:
    """Return whether `x` is a JAX array (traced or not) or a NumPy array."""
    return isinstance(x, jax.Array | np.ndarray)


def array(name: str, x, letters: str):
    """Check that `x`, the value of the argument `name`, is an array with the right number of axes. Return the array.

    `letters` are the letters of the axes, separated by commas: "B,T,N,H" requires four axes of any size. `x` may also
    be an object with `__jax_array__`, such as a parameter of a Flax module. Then the array of this object is checked
    and returned. Raise ValueError if `x` is not an array, or has another number of axes.
    """
    if not is_array(x) and hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    if not is_array(x):
        raise ValueError(f"{name} must be an array [{letters}], got {_type(x)}")
    if len(x.shape) != len(letters.split(",")):
        raise ValueError(f"{name} must be [{letters}], got {name}.shape={x.shape}")
    return x


def floats(name: str, x, letters: str):
    """Check that `x`, the value of the argument `name`, is a float array with the right number of axes. Return it.

    `letters` are the letters of the axes, separated by commas: "B,T,N,H" requires four axes of any size. A NumPy array
    of float64 is returned as float32 unless `jax_enable_x64` is set. Raise ValueError if `x` is not an array, has
    another number of axes, or has a dtype other than float16, bfloat16, float32 and float64.
    """
    x = array(name, x, letters)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {name}.dtype={x.dtype}")
    if x.dtype.name not in FLOATS:
        raise ValueError(f"{name} must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}, got {name}.dtype={x.dtype}")
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False) if isinstance(x, np.ndarray) else x


def integers(name: str, x, letters: str):
    """Check that `x`, the value of the argument `name`, is an integer array with the right number of axes. Return it.

    `letters` are the letters of the axes, separated by commas: "B,T" requires two axes of any size. Raise ValueError if
    `x` is not an array, not of an integer dtype, or has another number of axes.
    """
    if not is_array(x) or len(x.shape) != len(letters.split(",")) or not jnp.issubdtype(x.dtype, jnp.integer):
        got = f"{x.dtype}{list(x.shape)}" if is_array(x) else _type(x)
        raise ValueError(f"{name} must be integers [{letters}], got {got}")
    return x


def integer(name: str, x, least: int) -> int:
    """Check that `x`, the value of the argument `name`, is an integer of `least` or more. Return it as a Python int.

    Raise ValueError if `x` is not an integer, is below `least`, or is traced. The program depends on this number, so
    JAX must know the number while it traces the program.
    """
    try:
        value = operator.index(x)
    except TypeError:
        if isinstance(x, jax.core.Tracer):
            raise ValueError(f"{name} must not be traced, got {_type(x)}; pass a Python int") from None
        raise ValueError(f"{name} must be an int, got {_type(x)}") from None
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return value


def number(name: str, x):
    """Check that `x`, the value of the argument `name`, is one real number. Return it unchanged.

    `x` may be a Python number or an array without axes, traced or not. Raise ValueError if `x` is something else, such
    as a bool or a complex number.
    """
    is_one = isinstance(x, numbers.Real) or (is_array(x) and jnp.issubdtype(x.dtype, jnp.number))
    if isinstance(x, bool) or not is_one or (is_array(x) and jnp.iscomplexobj(x)):
        raise ValueError(f"{name} must be a real number or a real array without axes, got {_type(x)}")
    if np.shape(x) != ():
        raise ValueError(f"{name} must be a number or an array without axes, got {name}.shape={np.shape(x)}")
    return x


def flag(name: str, x) -> bool:
    """Check that `x`, the value of the argument `name`, is True or False. Return it as a Python bool.

    A NumPy bool is accepted. Raise ValueError if `x` is something else, such as a traced array.
    """
    if not isinstance(x, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {_type(x)}")
    return bool(x)


def _type(x) -> str:
    """Describe `x` for an error message: "float32[2, 8]" for an array, otherwise the name of its type.

    For a traced array, the description is "a traced float32[2, 8]".
    """
    if isinstance(x, jax.core.Tracer):
        return f"a traced {x.dtype}{list(x.shape)}"
    return f"{x.dtype}{list(x.shape)}" if is_array(x) else "None" if x is None else type(x).__name__
