"""Compare the results and gradients of two implementations of an op, for tests and notebooks.

An op is a public function of this package, such as `stick_breaking_attention`. A tolerance is the largest allowed
relative L2 error. It depends on the dtype of the arguments. FORWARD has the tolerances for outputs, and GRADIENT has
the tolerances for gradients. The tests of this project use the same tolerances.
"""

import collections
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FORWARD = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}
GRADIENT = {"float64": 1e-10, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
# One element may differ by at most ELEMENT * tolerance * (the largest |expected element|).
ELEMENT = 10
WIDE = ("reference", "xla")  # the implementations that accept float64


class Difference(NamedTuple):
    """How an output or a gradient of an op differs from the expected array.

    `name`: the name of the output or gradient, such as "gradient of query".
    `tolerance`: the largest allowed `error`.
    `error`: the relative L2 error of the array.
    `largest`: the largest |element - expected element|, divided by the largest |expected element|.
    `index`: the position of the element with the largest difference.
    `value`, `expected`: the element at `index`, and the expected element.
    `problem`: the reason why the array cannot be compared (NaN, infinity, wrong shape or wrong dtype), or None.
    """

    name: str
    tolerance: float
    error: float
    largest: float
    index: tuple[int, ...]
    value: float
    expected: float
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the array is right: no `problem`, `error` <= `tolerance`, and `largest` <= 10 * `tolerance`."""
        return self.problem is None and self.error <= self.tolerance and self.largest <= ELEMENT * self.tolerance

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name} {self.problem}"
        where, limit = f" at {list(self.index)}" if self.index else "", ELEMENT * self.tolerance
        too_far = f" (differs by {self.largest:.1e} times the largest expected element, the limit is {limit:.0e})"
        return (
            f"{self.name}: relative error {self.error:.1e}, tolerance {self.tolerance:.0e}; "
            f"farthest{where}: {self.value:.7g}, expected {self.expected:.7g}"
            f"{too_far if self.largest > limit else ''}"
        )


class Differences(tuple[Difference, ...]):
    """A tuple with a `Difference` for every output and every gradient of an op.

    `str(differences)` is a report, with the wrong outputs and gradients first. `ok` is True if every `Difference` is
    ok. The truth value is the opposite of `ok`: `bool(differences)` is True if at least one output or gradient is
    wrong.
    """

    title: str

    @classmethod
    def titled(cls, title: str, differences: list[Difference]) -> "Differences":
        self = cls(differences)
        self.title = title
        return self

    @property
    def ok(self) -> bool:
        return all(difference.ok for difference in self)

    def __bool__(self) -> bool:
        return not self.ok

    def __repr__(self) -> str:
        wrong = [d for d in self if not d.ok]
        lines = [f"{self.title}: {len(wrong)} of {len(self)} differ"]
        lines += [f"  {'  ' if d.ok else '! '}{d}" for d in (*wrong, *(d for d in self if d.ok))]
        return "\n".join(lines)

    __str__ = __repr__


def relative_error(value, expected) -> float:
    """Return |value - expected| / |expected| in the L2 norm. An |expected| below 1e-30 counts as 1e-30.

    Raise ValueError if the two shapes differ, or if `expected` has a NaN or an infinity.

    >>> relative_error([3.0, 4.1], [3.0, 4.0]) < 0.021
    True
    """
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    if value.shape != expected.shape:
        raise ValueError(f"'value' and 'expected' must have the same shape, got {value.shape} and {expected.shape}")
    if not np.isfinite(expected).all():
        raise ValueError("the array 'expected' has a NaN or an infinity; all of its elements must be finite")
    return float(np.linalg.norm(value - expected) / max(np.linalg.norm(expected), 1e-30))


def difference(name: str, value, expected, tolerance: float) -> Difference:
    """Return a `Difference`: how the array `value` differs from the array `expected` of the same shape.

    `name` is the name of the array in the report. `tolerance` is the largest allowed relative L2 error. If one of the
    two arrays has a NaN or an infinity, the field `problem` of the `Difference` says where.
    """
    value, wanted = (np.asarray(x, np.float64) for x in (value, expected))
    if not value.size:
        return _without_numbers(name)
    finite = np.isfinite(value) & np.isfinite(wanted)
    if not finite.all():
        index = tuple(map(int, np.argwhere(~finite)[0]))
        return _without_numbers(name, f"is {value[index]} at {list(index)}, expected {wanted[index]}")
    apart = np.abs(value - wanted)
    index = tuple(map(int, np.unravel_index(apart.argmax(), apart.shape)))
    largest = float(apart[index] / max(np.abs(wanted).max(), 1e-30))
    error = relative_error(value, wanted)
    return Difference(name, tolerance, error, largest, index, float(value[index]), float(wanted[index]))


def _without_numbers(name: str, problem: str | None = None) -> Difference:
    """Return a `Difference` whose numbers are all 0, for an array without elements or an array that cannot be compared.

    If the array cannot be compared, `problem` says why.
    """
    return Difference(name, 0.0, 0.0, 0.0, (), 0.0, 0.0, problem)


def _is_float(x) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating)


def differences(
    op, *args, implementation=None, against="reference", tolerance: float | None = None, seed: int = 0, **kwargs
) -> Differences:
    r"""Run an op with two implementations on the same arrays, forward and backward, and say how the results differ.

    Let f be the op, x its floating-point arrays, and c random cotangents. Two things are compared: every floating-point
    output f(x), and the gradient c^T df/dx of every floating-point argument. Each output and gradient must meet two
    conditions: its relative L2 error is within the tolerance, and no element differs by more than 10 * tolerance * (the
    largest expected element).

    Args:
      op: an op of this package, or any function of arrays that takes `implementation`.
      *args: the arguments of the op.
      implementation: the implementation to check. None: the op chooses.
      against: the implementation that computes the expected results. "reference" and "xla" run in float64. Any other
        implementation runs in the dtype of the arguments.
      tolerance: the tolerance of every output and gradient. None: take it from `FORWARD` and `GRADIENT`, for the least
        exact dtype of the arguments.
      seed: the seed of the cotangents.
      **kwargs: the keyword arguments of the op. A Python number, such as `scale=0.125`, is not differentiated.

    Returns:
      `Differences`: a `Difference` for every output and every gradient. If some outputs have different shapes or dtypes
      in the two implementations, or are returned by only one of them, nothing is computed: the tuple has a `Difference`
      for each of these outputs only. A NaN or an infinity counts as a difference, even in the expected results, because
      a comparison with it would prove nothing.

    Raises:
      ValueError: no argument is a floating-point array, or the arguments of the op are wrong.

    >>> import jax
    >>> from pallas_kernels import stick_breaking_attention
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 20, 2, 16))
    >>> found = differences(stick_breaking_attention, q, k, v, implementation="xla")
    >>> found.ok, [d.name for d in found]
    (True, ['output[0]', 'output[1]', 'gradient of query', 'gradient of key', 'gradient of value'])
    """
    call = _Call(op, *args, **kwargs)
    types = ", ".join(sorted({str(x.dtype) for x in call.floats.values()}))
    title = f"{_name(op)}, {implementation or 'default implementation'} against {against} in {types}"
    shapes, own_shapes = call.shapes(against), call.shapes(implementation)
    if own_shapes != shapes:
        return Differences.titled(title, _different_shapes(own_shapes, shapes))
    rng = np.random.default_rng(seed)
    cotangents = {name: rng.standard_normal(y.shape).astype(y.dtype) for name, y in shapes.items()}
    run = jax.jit(call.run, static_argnums=0)
    values, gradients = run(implementation, call.floats, call.others, cotangents)
    with jax.enable_x64(jax.config.jax_enable_x64 or against in WIDE):
        x, c = call.floats, cotangents
        if against in WIDE:
            x, c = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), (x, c))
        expected, expected_gradients = jax.device_get(run(against, x, call.others, c))

    def tolerance_of(table) -> float:
        return max(table[str(x.dtype)] for x in call.floats.values()) if tolerance is None else tolerance

    outputs = [difference(y, values[y], expected[y], tolerance_of(FORWARD)) for y in shapes]
    return Differences.titled(title, outputs + [
        difference(f"gradient of {x}", gradients[x], expected_gradients[x], tolerance_of(GRADIENT)) for x in call.floats
    ])  # fmt: skip


class _Call:
    """A call `op(*args, **kwargs)`, which can be repeated with other arrays of the same shapes.

    `floats`: {name: array} for the floating-point arrays, which are differentiated.
    `others`: {name: array} for all other arrays.
    """

    def __init__(self, op, *args, **kwargs):
        self.op, self.signature = op, inspect.signature(op)
        arguments = collections.OrderedDict(self.signature.bind_partial(*args, **kwargs).arguments)
        paths, self.tree = jax.tree_util.tree_flatten_with_path(arguments)
        self.leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
        self.floats = {name: x for name, x in self.leaves.items() if _is_float(x)}
        if not self.floats:
            raise ValueError("differences() needs at least one floating-point array among the arguments of the op")
        arrays = {name: x for name, x in self.leaves.items() if isinstance(x, jax.Array | np.ndarray)}
        self.others = {name: x for name, x in arrays.items() if name not in self.floats}

    def outputs(self, implementation, floats, others):
        """Run the op with an implementation. Return {name: output} for the floating-point outputs.

        `floats` is {name: array} of all floating-point arrays of the call. `others` is {name: array} of all other
        arrays of the call.
        """
        leaves = self.leaves | others | floats
        bound = inspect.BoundArguments(self.signature, self.tree.unflatten(leaves.values()))
        result = self.op(*bound.args, **bound.kwargs | {"implementation": implementation})
        paths, _ = jax.tree_util.tree_flatten_with_path(result)
        return {f"output{jax.tree_util.keystr(path)}": y for path, y in paths if _is_float(y)}

    def shapes(self, implementation):
        """Return {name: shape and dtype} for the floating-point outputs of the op with an implementation."""
        return jax.eval_shape(functools.partial(self.outputs, implementation), self.floats, self.others)

    def run(self, implementation, floats, others, cotangents):
        """Run the op with an implementation, forward and backward. Return ({name: output}, {name: gradient}).

        `floats`: {name: array} of all floating-point arrays of the call. Each of them gets a gradient.
        `others`: {name: array} of all other arrays of the call.
        `cotangents`: {name: cotangent} of all floating-point outputs.
        """
        values, vjp = jax.vjp(lambda floats: self.outputs(implementation, floats, others), floats)
        return values, vjp({name: cotangents[name].astype(y.dtype) for name, y in values.items()})[0]


def _different_shapes(own_shapes, shapes) -> list[Difference]:
    """Return a `Difference` for every output whose shape or dtype is wrong, and for every missing or additional output.

    Both arguments are {name of the output: shape and dtype}: `own_shapes` for the implementation that is checked,
    `shapes` for the implementation that computes the expected outputs.
    """

    def described(y) -> str:
        return f"{y.dtype}{list(y.shape)}" if y else "nothing"

    pairs = {name: (own_shapes.get(name), shapes.get(name)) for name in shapes | own_shapes}
    return [
        _without_numbers(name, f"is {described(own)}, expected {described(expected)}")
        for name, (own, expected) in pairs.items()
        if own != expected
    ]


def _name(op: Any) -> str:
    return _name(op.func) if isinstance(op, functools.partial) else getattr(op, "__name__", repr(op))
