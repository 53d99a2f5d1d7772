"""Which implementation of an op runs, and why.

An op lists its implementations from the most to the least wanted; each one can say why it does not take a call.
`implementation=None` takes the first that does, logs the choice and the reasons once, and `explain` repeats them.
A named implementation works or raises: nothing falls back silently.
"""

import difflib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

NAMES = ("mosaic", "triton", "xla", "reference")
logger = logging.getLogger("pallas_kernels")


class Implementation(NamedTuple):
    """`run(call)` computes; `refuses(call)` is None, or the reason why this call cannot run here."""

    run: Callable[[Any], Any]
    refuses: Callable[[Any], str | None]
    detail: Callable[[Any], str] = lambda call: ""


class Op(NamedTuple):
    """`prepare(*args, **kwargs)` checks the arguments of a call and returns what the implementations take."""

    name: str
    prepare: Callable[..., Any]
    implementations: dict[str, Implementation]


_ops: dict[str, Op] = {}
_logged: set[str] = set()


def register(op: Op) -> Op:
    _ops[op.name] = op
    return op


def _named(op: Op, name: str) -> Implementation:
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"implementation={name!r} is not one of {', '.join(NAMES)}{hint}")
    if name not in op.implementations:
        raise NotImplementedError(f"{op.name} has no implementation {name!r}; it has {', '.join(op.implementations)}")
    return op.implementations[name]


def choose(op: Op, call: Any, implementation: str | Sequence[str] | None) -> tuple[str, list[str]]:
    """The name of the implementation that runs `call`, and the reasons why the ones before it do not."""
    if isinstance(implementation, str):
        reason = _named(op, implementation).refuses(call)
        if reason:
            can = [n for n, i in op.implementations.items() if not i.refuses(call)]
            raise NotImplementedError(f"{op.name}: {implementation} cannot run this call: {reason}; use {' or '.join(can)}")
        return implementation, []
    wanted = implementation if implementation is not None else [n for n in op.implementations if n != "reference"]
    reasons = []
    for name in wanted:
        reason = _named(op, name).refuses(call)
        if reason is None:
            return name, reasons
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op.name}: no implementation can run this call: {'; '.join(reasons)}")


def _sentence(op: Op, call: Any, implementation: str | Sequence[str] | None) -> str:
    name, reasons = choose(op, call, implementation)
    detail = op.implementations[name].detail(call)
    absent = [n for n in NAMES[:2] if n not in op.implementations]
    reasons = reasons + [f"{n}: this op has no such kernel yet" for n in absent]
    why = "asked for" if isinstance(implementation, str) else f"on {jax.default_backend()}; " + "; ".join(reasons)
    return f"{op.name}: {name}{f' ({detail})' if detail else ''}, {why}"


def run(op: Op, call: Any, implementation: str | Sequence[str] | None) -> Any:
    """Run `call` on the chosen implementation."""
    name, _ = choose(op, call, implementation)
    if implementation is None:
        sentence = _sentence(op, call, None)
        if sentence not in _logged:
            _logged.add(sentence)
            logger.info(sentence)
    return op.implementations[name].run(call)


def explain(op_name: str, *args, **kwargs) -> str:
    """One line: the implementation that `op_name(*args, **kwargs)` runs, and why not the others.

    Only shapes and dtypes are read, so `jax.ShapeDtypeStruct`s do as well as arrays.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((1, 64, 4, 32), jnp.float32)
    >>> explain("stick_breaking_attention", x, x, x).split(",")[0]
    'stick_breaking_attention: xla (4 query tiles of 16 rows, each against all its keys)'

    Raises:
      ValueError: `op_name` is no op, or the op's own errors.
    """
    if op_name not in _ops:
        raise ValueError(f"{op_name!r} is no op; the ops are {', '.join(_ops)}")
    op = _ops[op_name]
    implementation = kwargs.pop("implementation", None)
    return _sentence(op, op.prepare(*args, **kwargs), implementation)
