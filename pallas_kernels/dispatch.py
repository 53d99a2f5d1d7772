"""Chooses the implementation that runs an op, and states the reasons for the choice.

An op is a public function of this package, such as `stick_breaking_attention`. It has several implementations. `NAMES`
lists their names in order of preference. An implementation can refuse a call of the op. Then it gives a reason.

With `implementation=None`, an op takes the first implementation that does not refuse the call, but never "reference".
The op logs the choice and the reasons as one line, once. `explain` returns this line and does not run the op. If the
caller names one implementation, this implementation runs or an error is raised: there is no silent fallback. `recorded`
collects the choices that the ops make while JAX traces code.
"""

import contextlib
import contextvars
import difflib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import get_abstract_mesh

from . import partition, platform

# The names of the implementations, in order of preference.
NAMES = ("mosaic", "triton", "xla", "reference")
logger = logging.getLogger("pallas_kernels")


class Implementation(NamedTuple):
    """One implementation of an op: three functions of `call`, the checked arguments of one call of the op.

    `run`: returns the results of the op.
    `refuses`: returns the reason why this implementation cannot run the call, or None if it can.
    `detail`: returns a short description of how this implementation runs the call, such as the sizes of its tiles.
    """

    run: Callable[[Any], Any]
    refuses: Callable[[Any], str | None]
    detail: Callable[[Any], str] = lambda call: ""


class Op(NamedTuple):
    """An op, that is, a public function such as `stick_breaking_attention`: its checks and its implementations.

    `name`: the name of the public function.
    `prepare`: takes the arguments of the public function, checks them, and returns them as a `call`: a NamedTuple of
      arrays and settings. Every implementation takes a `call`.
    `implementations`: {name from NAMES: implementation}.
    `letters`: takes a `call` and returns a `partition.Letters`: the letters of the axes of all arrays, and which of
      these axes may be sharded over a mesh. If `letters` is None, the op has no sharding rule. Then its implementations
      get the arrays of the call as they are.
    """

    name: str
    prepare: Callable[..., Any]
    implementations: dict[str, Implementation]
    letters: Callable[[Any], partition.Letters] | None = None


class Choice(NamedTuple):
    """The implementation that was chosen for one call of an op. The backward pass uses the same implementation.

    `op`: the name of the op.
    `sizes`: pairs (letter, size), such as ("T", 64), for the axes of the arrays. A size is the size of one device's
      shard. But on a mesh of Auto axes, before XLA compiles the program, it is the global size.
    `implementation`: the name of the implementation, such as "xla".
    `detail`: how the implementation runs the call, such as the sizes of its tiles.
    `why`: why this implementation was chosen, and why the implementations that were tried earlier cannot run the call.

    `str(choice)` says all of this in one line.
    """

    op: str
    sizes: tuple[tuple[str, int], ...]
    implementation: str
    detail: str
    why: str

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}={size}" for letter, size in self.sizes)
        return f"{self.op}: {self._by()}{sizes and f' for {sizes}'}, {self.why}"

    def sentence(self) -> str:
        """Return one line for the log: the op, the implementation and the reasons, without the sizes."""
        return f"{self.op}: {self._by()}, {self.why}"

    def _by(self) -> str:
        return f"{self.implementation}{f' ({self.detail})' if self.detail else ''}"


_ops: dict[str, Op] = {}
_logged: set[str] = set()
# The counters of all contexts of `recorded` that are open in this thread.
_records: contextvars.ContextVar[tuple[Counter, ...]] = contextvars.ContextVar("records", default=())
# {key of a call (`_key`): the choices that were made when JAX traced this call}. JAX keeps the trace, so an equal call
# does not choose again.
_traced: dict[Any, Counter] = {}


def register(op: Op) -> Op:
    """Register an op under its name, so that `run` and `explain` can find it. Return the op."""
    _ops[op.name] = op
    return op


def _wanted(implementation: str | Sequence[str] | None) -> Sequence[str]:
    """Return the names of the implementations to try, in this order.

    `implementation` is what the caller of the op passed: a name, names in order of preference, or None for all names
    except "reference". Raise ValueError if it is anything else, has no names, or has an unknown name.
    """
    if implementation is None:
        return NAMES[:-1]  # an op runs the reference only if its caller names it
    wanted = (implementation,) if isinstance(implementation, str) else implementation
    if not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
        raise ValueError(
            f"implementation={implementation!r} must be the name of an implementation, a sequence of names or None"
        )
    if not wanted:
        raise ValueError(
            f"implementation={implementation!r} names no implementation; pass None to let the op choose one"
        )
    for name in wanted:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"implementation={name!r} is not one of {', '.join(NAMES)}{hint}")
    return wanted


def choose(op: Op, call: Any, implementation: str | Sequence[str] | None) -> tuple[str, list[str]]:
    """Choose the implementation that runs a call of an op. Return (name, reasons).

    `call` has the checked arguments of the op, as `op.prepare` returns them. `implementation` is what the caller of the
    op passed: a name, names in order of preference, or None for all names except "reference". The implementations are
    tried in this order, and the first one that can run the call is chosen. `reasons` has one string for every
    implementation that was tried and cannot run the call, such as "triton: needs compute capability 8.0 or newer, found
    cpu". Raise NotImplementedError if none of the implementations can run the call.
    """

    def refuses(name):
        found = op.implementations.get(name)
        return found.refuses(call) if found else "this op has no such implementation yet"

    reasons = []
    for name in _wanted(implementation):
        reason = refuses(name)
        if reason is None:
            return name, reasons
        reasons.append(f"{name}: {reason}")
    can = [name for name in op.implementations if refuses(name) is None]
    raise NotImplementedError(
        f"{op.name} cannot run this call with implementation {'; '.join(reasons)}; use {' or '.join(can)}"
    )


def _choice(op: Op, call: Any, implementation: str | Sequence[str] | None) -> Choice:
    name, reasons = choose(op, call, implementation)
    asked = implementation is not None and len(_wanted(implementation)) == 1
    why = "asked for" if asked else f"on {platform.name()}"
    detail = op.implementations[name].detail(call)
    return Choice(op.name, _sizes(op, call), name, detail, "; ".join([why, *reasons]))


def _sizes(op: Op, call: Any) -> tuple[tuple[str, int], ...]:
    """Return pairs (letter, size), such as ("T", 64), for the axes of the arrays in `call`.

    `call` has the checked arguments of the op, as `op.prepare` returns them. There is no pair for an axis "2F", of
    2 * F elements, because the axis "F" of another array gives F.
    """
    if op.letters is None:
        return ()
    words, tree = jax.tree.flatten(op.letters(call).call)
    sizes = {}
    for word, value in zip(words, tree.flatten_up_to(call), strict=True):
        if word not in (partition.STATIC, partition.RECOMPUTED) and hasattr(value, "shape"):
            sizes |= zip(word.split(), value.shape, strict=True)
    return tuple((letter, size) for letter, size in sizes.items() if letter.isalpha())


@contextlib.contextmanager
def recorded() -> Iterator[Counter]:
    """In this context, collect which implementations ops choose. Yield a Counter {`Choice`: how often it was made}.

    Only choices in this thread are collected. An op chooses its implementation when JAX traces the op. So trace your
    program in the context: with `jax.jit(f).trace(...)`, `jax.eval_shape`, or the first call of a jitted function. A
    second call of your jitted function collects nothing, because JAX does not trace your program again.

    On a mesh, JAX stores the trace of every call of an op, and uses it again for an equal call. Then the op does not
    choose again, and its choices from the stored trace are collected.

    On a mesh of Auto axes, the choices have global sizes, because XLA shards the arrays only when it compiles. If XLA
    compiles your program in the context, as in the first call of a jitted function, JAX traces each op again for one
    device. Then the choices for the shards of one device are collected too.

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels import stick_breaking_attention
    >>> x = jax.ShapeDtypeStruct((1, 64, 4, 32), jnp.float32)
    >>> with recorded() as choices:
    ...     out, rem = jax.eval_shape(lambda x: stick_breaking_attention(x, x, x, implementation="reference"), x)
    >>> print(*choices)
    stick_breaking_attention: reference for B=1 T=64 N=4 H=32 S=64 K=4 Hv=32, asked for
    """
    record = Counter()
    token = _records.set((*_records.get(), record))
    try:
        yield record
    finally:
        _records.reset(token)


def _record(choices: Counter) -> None:
    """Add the choices, {Choice: how often it was made}, to the counters of all open contexts of `recorded`."""
    for record in _records.get():
        record.update(choices)


def _key(op: Op, call: Any, wanted: Sequence[str] | None) -> Any:
    """Return a key for one call of an op. JAX uses one trace for two calls exactly if their keys are equal.

    `call` has the checked arguments of the op. `wanted` has the names of the implementations that the caller named, or
    is None. The key is used in the dict `_traced`, which stores the choices that the op made when JAX traced the call.
    """
    leaves, tree = jax.tree.flatten(call)
    types = tuple(jax.typeof(x) if isinstance(x, jax.Array) else x for x in leaves)
    return op.name, wanted, tree, types, get_abstract_mesh()


def run(op: Op, call: Any, implementation: str | Sequence[str] | None) -> Any:
    """Choose an implementation for one call of an op, run it, and return the results of the op.

    `call` has the checked arguments, as `op.prepare` returns them. `implementation` is a name, names in order of
    preference, or None for all names except "reference". The first of these implementations that can run the call is
    chosen. On a mesh, every device runs the op on its shards of the arrays.
    """
    wanted = None if implementation is None else tuple(_wanted(implementation))
    compute = partition.Bound(_run_here, (op.name, wanted))
    call = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, call)
    try:
        with recorded() as choices:
            result = compute(call) if op.letters is None else partition.run(op.letters(call), call, compute)
    except TypeError as error:  # raised on a mesh; an error from `_run_here` already begins with the op's name
        if "forward-mode" not in str(error) or str(error).startswith(op.name):
            raise
        raise TypeError(
            f"{op.name} has no forward-mode derivative on this mesh (jax.jvp, jax.jacfwd, jax.linearize); "
            "use jax.grad, jax.vjp or jax.jacrev"
        ) from None
    if choices:
        _traced[_key(op, call, wanted)] = choices
    elif _records.get():
        _record(_traced.get(_key(op, call, wanted), Counter()))
    return result


def _run_here(call: Any, op_name: str, implementation: tuple[str, ...] | None) -> Any:
    """Choose an implementation for the call on one device, record the choice, and run the implementation.

    `call` has the checked arguments of the op, with this device's shards of the arrays. `implementation` has the names
    that the caller of the op passed, or is None. If it is None, the choice is logged as one line, but only the first
    time that this line occurs.
    """
    op = _ops[op_name]
    choice = _choice(op, call, implementation)
    _record(Counter([choice]))
    if implementation is None and (sentence := choice.sentence()) not in _logged:
        _logged.add(sentence)
        logger.info(sentence)
    name = choice.implementation
    try:
        return op.implementations[name].run(call)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            f"{op.name} with implementation {name} has no forward-mode derivative (jax.jvp, jax.jacfwd, jax.linearize)"
            "; use jax.grad, jax.vjp or jax.jacrev, or implementation='reference', which has forward mode too"
        ) from None


def explain(op_name: str, *args, **kwargs) -> str:
    """Return one line that says which implementation runs `op_name(*args, **kwargs)`, and why.

    `op_name` is the name of a public function of this package, such as "stick_breaking_attention". Nothing is computed.
    Only shapes and dtypes are read, so an argument may be a `jax.ShapeDtypeStruct` in place of an array.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((1, 64, 4, 32), jnp.float32)
    >>> explain("stick_breaking_attention", x, x, x, implementation="xla", tiles=(32, 16))
    'stick_breaking_attention: xla (loop over 32 x 16 tiles), asked for'

    Raises:
      ValueError: there is no op `op_name`, or the arguments of the op are wrong.
      NotImplementedError: no implementation, or none of the named ones, can run the call.
    """
    if op_name not in _ops:
        raise ValueError(f"there is no op {op_name!r}; the ops are {', '.join(_ops)}")
    op = _ops[op_name]
    implementation = kwargs.pop("implementation", None)

    def stand_in(x):  # an array of the same shape that takes no memory
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        return np.broadcast_to(np.zeros((), jax.dtypes.canonicalize_dtype(x.dtype)), x.shape)

    args, kwargs = jax.tree.map(stand_in, (args, kwargs))
    call, say = op.prepare(*args, **kwargs), lambda call: _choice(op, call, implementation).sentence()
    return say(call) if op.letters is None else partition.look(op.letters(call), call, say)
