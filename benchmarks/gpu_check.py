"""Whether an op on a GPU gives what its fp32 reference gives on the same numbers: the gate before any timing."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.testing import FORWARD, GRADIENT

from .timing import forward_backward


class Errors(NamedTuple):
    """Largest relative L2 errors, infinite where not finite; whether a second run gave the same bits."""

    forward: float
    gradient: float | None
    repeats: bool

    def passes(self, dtype) -> bool:
        name = jnp.dtype(dtype).name
        return self.forward <= FORWARD[name] and (self.gradient or 0) <= GRADIENT[name] and self.repeats

    def extra(self) -> dict:
        """For a row."""
        gradient = {} if self.gradient is None else {"gradient error": self.gradient}
        return {"error": self.forward} | gradient | {"two runs": "equal" if self.repeats else "DIFFER"}


def attended(attention: Callable) -> Callable:
    """(out, the share of the stick that was broken off) of a call that gives out and what is left.

    Under `skip_below` what is left is that of the exit: 2^-24 where the whole call leaves 2^-90, to no one's harm.
    """

    def run(*arrays):
        out, rem = attention(*arrays)[:2]
        return out, 1 - rem

    return run


def poison(like) -> None:
    """Leave NaN in the memory that the next outputs are likely to get, so that an unwritten row is seen."""

    def nan(x):
        return jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else -1, x.dtype)

    jax.block_until_ready(jax.tree.map(nan, like))


def fp32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def exact(reference: Callable, cotangent, arguments):
    """(outputs, gradients) of the reference on the same numbers in fp32, on the host."""
    return jax.device_get(forward_backward(reference)(*fp32((cotangent, *arguments))))


def exact_forward(reference: Callable, arguments):
    """(outputs, None)"""
    return jax.device_get(jax.jit(reference)(*fp32(arguments))), None


def _relative(got, want) -> float:
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / max(np.linalg.norm(want), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


def _largest(got, want) -> float:
    return max(jax.tree.leaves(jax.tree.map(_relative, got, want)))


def _twice(run: Callable, arguments):
    """The results on the host, and whether those of a second run have the same bits."""
    results = []
    for _ in range(2):
        poison(run.out_info if isinstance(run, jax.stages.Compiled) else jax.eval_shape(run, *arguments))
        results.append(jax.device_get(run(*arguments)))
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), *results)
    return results[0], all(jax.tree.leaves(same))


def compared(program: Callable, expected, arguments) -> Errors:
    """Of a compiled program of (outputs, gradients), against those expected; gradients may be ()."""
    got, repeats = _twice(program, arguments)
    outputs, gradients = (_largest(a, b) if jax.tree.leaves(b) else None for a, b in zip(got, expected, strict=True))
    return Errors(outputs, gradients, repeats)


def differing(program: Callable, arguments, runs: int) -> int:
    """The number of runs, out of `runs`, whose bits differ from those of the first run. Runs follow without a pause."""
    first = program(*arguments)

    @jax.jit
    def count(number, first, again):
        same = [(_bits(a) == _bits(b)).all() for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True)]
        return number + ~jnp.stack(same).all()

    number = jnp.int32(0)
    for i in range(runs):
        number = count(number, first, program(*arguments))
        if i % 50 == 49:
            jax.block_until_ready(number)  # a queue of all would take memory
    return int(number)


def _bits(x):
    """NaN is like NaN, and 0 is unlike -0."""
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def errors(function: Callable, expected, cotangent, arguments, look: Callable = lambda results: results) -> Errors:
    """Of `function` against `expected`, from `exact` or `exact_forward`; `look` picks what is compared.

    The outputs are those without gradients and those with: an op may take another kernel when it keeps residuals.
    """
    wanted, wanted_gradients = expected
    alone, repeats = _twice(jax.jit(function), arguments)
    if wanted_gradients is None:
        return Errors(_largest(look((alone, None))[0], wanted), None, repeats)
    (outputs, gradients), both_repeat = _twice(forward_backward(function), (cotangent, *arguments))
    alone, _ = look((alone, gradients))
    outputs, gradients = look((outputs, gradients))
    forward = max(_largest(alone, wanted), _largest(outputs, wanted))
    return Errors(forward, _largest(gradients, wanted_gradients), repeats and both_repeat)
