"""Compare the results of an op on a GPU with the results of its reference in fp32, for the same inputs."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.testing import FORWARD, GRADIENT

from .timing import forward_backward


class Errors(NamedTuple):
    """The errors of the results of an op, compared with the results of the reference.

    `forward`: the largest relative L2 error of an output. `gradient`: the largest relative L2 error of a gradient, or
    None if no gradients were compared. An error is infinite if a result contains NaN or infinity. `repeats`: whether a
    second run gave the same bits.
    """

    forward: float
    gradient: float | None
    repeats: bool

    def passes(self, dtype) -> bool:
        name = jnp.dtype(dtype).name
        return self.forward <= FORWARD[name] and (self.gradient or 0) <= GRADIENT[name] and self.repeats

    def extra(self) -> dict:
        """Return the errors as a dictionary for the field `extra` of a `report.Row`."""
        gradient = {} if self.gradient is None else {"gradient error": self.gradient}
        return {"error": self.forward} | gradient | {"two runs": "equal" if self.repeats else "DIFFER"}


def attended(attention: Callable) -> Callable:
    """Return a function that calls `attention`, and returns (out, 1 - rem) instead of its results (out, rem, ...).

    rem is the part of the stick that remains after all keys. With `skip_below`, the kernel stops early, and rem is the
    part that remains then, for example 2^-24 instead of 2^-90. This difference is too small to matter, but it is a
    large relative error of rem. It is a small relative error of 1 - rem.
    """

    def run(*arrays):
        out, rem = attention(*arrays)[:2]
        return out, 1 - rem

    return run


def poison(like) -> None:
    """Allocate arrays with the shapes of the pytree `like`, fill them with NaN (integers with -1), and free them.

    The next outputs of these shapes probably use the same memory. So a row that a kernel fails to write stays NaN.
    """

    def nan(x):
        return jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else -1, x.dtype)

    jax.block_until_ready(jax.tree.map(nan, like))


def fp32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def exact(reference: Callable, cotangent, arguments):
    """Return (outputs, gradients) of the function `reference`, computed in fp32 and copied to the host.

    `cotangent` and `arguments`: the same inputs that the checked function gets. They are converted to fp32.
    """
    return jax.device_get(forward_backward(reference)(*fp32((cotangent, *arguments))))


def exact_forward(reference: Callable, arguments):
    """Return (outputs, None) of the function `reference`, computed in fp32 and copied to the host.

    This function computes no gradients; `exact` does.

    `arguments`: the same inputs that the checked function gets. They are converted to fp32.
    """
    return jax.device_get(jax.jit(reference)(*fp32(arguments))), None


def _relative(got, want) -> float:
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / max(np.linalg.norm(want), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


def _largest(got, want) -> float:
    return max(jax.tree.leaves(jax.tree.map(_relative, got, want)))


def _twice(run: Callable, arguments):
    """Run a function twice. Return (results of the first run, on the host; whether both runs gave the same bits)."""
    results = []
    for _ in range(2):
        poison(run.out_info if isinstance(run, jax.stages.Compiled) else jax.eval_shape(run, *arguments))
        results.append(jax.device_get(run(*arguments)))
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), *results)
    return results[0], all(jax.tree.leaves(same))


def compared(program: Callable, expected, arguments) -> Errors:
    """Return the errors of a compiled program against `expected`, and whether a second run gives the same bits.

    `expected`: (outputs, gradients) of the reference. The gradients may be (), if none are to be compared.
    """
    got, repeats = _twice(program, arguments)
    outputs, gradients = (_largest(a, b) if jax.tree.leaves(b) else None for a, b in zip(got, expected, strict=True))
    return Errors(outputs, gradients, repeats)


def differing(program: Callable, arguments, runs: int) -> int:
    """Run a program once, then `runs` times more. Return how many of the later results differ from the first result.

    Two results differ if one bit differs. The runs follow each other without a pause: JAX queues them.
    """
    first = program(*arguments)

    @jax.jit
    def count(number, first, again):
        same = [(_bits(a) == _bits(b)).all() for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True)]
        return number + ~jnp.stack(same).all()

    number = jnp.int32(0)
    for i in range(runs):
        number = count(number, first, program(*arguments))
        if i % 50 == 49:
            jax.block_until_ready(number)  # a queue of all runs would need too much memory
    return int(number)


def _bits(x):
    """Return the bits of x as integers. Compared by bits, a NaN equals the same NaN, and 0 does not equal -0."""
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def errors(function: Callable, expected, cotangent, arguments, look: Callable = lambda results: results) -> Errors:
    """Run `function` on `arguments` and return the errors of its outputs and gradients against `expected`.

    `expected`: the result of `exact` or `exact_forward`. `look` maps (outputs, gradients) to the parts that are
    compared.

    If `expected` has gradients, `function` runs both without and with gradients, because an op that computes gradients
    keeps residuals and may use another kernel. The outputs of both runs are compared with the outputs in `expected`,
    and the larger error counts.
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
