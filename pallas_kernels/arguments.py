"""Checks of the arguments of the ops. A wrong one is a ValueError with its name, what it must be and what it was."""

import numbers
import operator

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")


def sum_type(x):
    """The type of sums over numbers of the type of `x`: fp32, and fp64 for fp64."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def is_array(x) -> bool:
    """Whether `x` is an array of JAX, traced or not, or of NumPy."""
    return isinstance(x, jax.Array | np.ndarray)


def array(name: str, x, letters: str):
    """`x`, or the array of a module's parameter, if it has one axis for every letter, such as "B,T,N,H"."""
    if not is_array(x) and hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    if not is_array(x):
        raise ValueError(f"{name} must be an array [{letters}], got {_type(x)}")
    if len(x.shape) != len(letters.split(",")):
        raise ValueError(f"{name} must be [{letters}], got {name}.shape={x.shape}")
    return x


def floats(name: str, x, letters: str):
    """`array` of one of FLOATS. NumPy's float64 becomes float32 unless `jax_enable_x64` is set."""
    x = array(name, x, letters)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {name}.dtype={x.dtype}")
    if x.dtype.name not in FLOATS:
        raise ValueError(f"{name} must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}, got {name}.dtype={x.dtype}")
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False) if isinstance(x, np.ndarray) else x


def integers(name: str, x, letters: str):
    """`array` of integers."""
    if not is_array(x) or len(x.shape) != len(letters.split(",")) or not jnp.issubdtype(x.dtype, jnp.integer):
        got = f"{x.dtype}{list(x.shape)}" if is_array(x) else _type(x)
        raise ValueError(f"{name} must be integers [{letters}], got {got}")
    return x


def integer(name: str, x, least: int) -> int:
    """A Python int, at least `least`. It must not be traced: every value needs a program of its own."""
    try:
        value = operator.index(x)
    except TypeError:
        raise ValueError(f"{name} must be an int that is not traced, got {_type(x)}") from None
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return value


def number(name: str, x):
    """A Python number or an array []."""
    is_one = isinstance(x, numbers.Real) or (is_array(x) and jnp.issubdtype(x.dtype, jnp.number))
    if isinstance(x, bool) or not is_one or (is_array(x) and jnp.iscomplexobj(x)):
        raise ValueError(f"{name} must be a number or an array [], got {_type(x)}")
    if np.shape(x) != ():
        raise ValueError(f"{name} must be a number or an array [], got {name}.shape={np.shape(x)}")
    return x


def flag(name: str, x) -> bool:
    """True or False. It must not be traced."""
    if not isinstance(x, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {_type(x)}")
    return bool(x)


def _type(x) -> str:
    if isinstance(x, jax.core.Tracer):
        return f"a traced {x.dtype}{list(x.shape)}"
    return f"{x.dtype}{list(x.shape)}" if is_array(x) else "None" if x is None else type(x).__name__
