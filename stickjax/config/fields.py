"""Fields of a config: each has a default, a type, a sentence and bounds; `check_fields` checks the values."""

import dataclasses
import difflib
import functools
import math
import numbers
import operator
import os
import types
import typing
import warnings
from typing import Any, Literal

BYTES = 257  # ids of a vocabulary of bytes and the end of text
LARGEST = 10**15  # the bound of whole numbers without a bound of their own; arithmetic on larger sizes may overflow
Dtype = Literal["float32", "bfloat16", "float16"]  # what a model computes in, and stores its parameters in
SEED = 2**31 - 1  # the largest seed; some random number generators do not tell larger ones apart

_BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


def field(default, doc: str, group: type | None = None, *, was: str | None = None, **bounds: float):
    """A dataclass field with its sentence for --help; `group` makes it a nested section.

    `was`: its name in the version before (see `accept_former_names`). `bounds` of a number are any of at_least, above,
    at_most and below.
    """
    metadata = {"doc": doc, "bounds": bounds, "was": was}
    if group is not None:
        return dataclasses.field(default_factory=group, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def former_names(config: type) -> dict[str, tuple[str, ...]]:
    """{name in the version before: names} of the fields of a dataclass that were renamed or moved.

    A name with a dot is a field of a nested dataclass. `MOVED` of the dataclass has the fields that were moved.
    """
    renamed = {was: (f.name,) for f in dataclasses.fields(config) if (was := f.metadata.get("was")) is not None}
    return renamed | getattr(config, "MOVED", {})


@functools.cache
def nested_fields(config: type) -> dict[str, type]:
    """The fields of a dataclass that are dataclasses themselves, with their types."""
    kinds = field_types(config)
    return {f.name: kinds[f.name][0] for f in dataclasses.fields(config) if dataclasses.is_dataclass(kinds[f.name][0])}


def upgraded(config: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a dataclass by the present names of its fields; nested dataclasses may be dictionaries of fields.

    A value that has moved into several nested dataclasses goes into those that have experts.
    """
    values, nested = dict(values), nested_fields(config)
    for name, kind in nested.items():
        value = values.get(name, {})
        if isinstance(value, int) and not isinstance(value, bool):  # in the version before it was their number
            value = {"E": value}
        if isinstance(value, kind):
            value = vars(value)
        if isinstance(value, dict):
            values[name] = dict(value)
    for was, names in sorted(former_names(config).items(), key=lambda item: len(item[1])):
        if was not in values or was in nested:
            continue
        value, places = values.pop(was), [name.rpartition(".") for name in names]
        if len(places) > 1:
            places = [place for place in places if values[place[0]].get("E")] or places[:1]
        for group, _, name in places:
            (values[group] if group else values)[name] = value
    return values | {name: _made(kind, name, values[name]) for name, kind in nested.items() if name in values}


def _made(kind: type, name: str, values: Any):
    if not isinstance(values, dict):
        return values
    if unknown := values.keys() - {f.name for f in dataclasses.fields(kind)}:
        known = [f.name for f in dataclasses.fields(kind)]
        raise ValueError(f"unknown config key '{name}.{min(unknown)}'{nearest(min(unknown), known)}")
    return kind(**values)


def accept_former_names(config: type) -> type:
    """Let a dataclass take its fields by their former names too, with a warning that says the new one."""

    def warn(was: str) -> tuple[str, ...]:
        names = former_names(config)[was]
        new = " and ".join(names)
        warnings.warn(f"{was} is now {new}; the old name goes in the next version", FutureWarning, stacklevel=3)
        return names

    init = config.__init__

    @functools.wraps(init)
    def with_former_names(self, *args, **values):
        for was in former_names(config).keys() & values.keys():
            if was not in nested_fields(config) or isinstance(values[was], int):
                warn(was)
        init(self, *args, **upgraded(config, values))

    config.__init__ = with_former_names
    for was, names in former_names(config).items():
        if was not in nested_fields(config):
            read = operator.attrgetter(names[0])
            setattr(config, was, property(lambda self, was=was, read=read: warn(was) and read(self)))
    return config


@functools.cache
def field_types(config: type) -> dict[str, tuple]:
    """The types that each field of a dataclass may have.

    >>> from stickjax.config import OptimConfig
    >>> field_types(OptimConfig)["clip"]
    (<class 'float'>, <class 'NoneType'>)
    """
    return {
        name: typing.get_args(hint) if typing.get_origin(hint) not in (None, Literal) else (hint,)
        for name, hint in typing.get_type_hints(config).items()
    }


def check_fields(config) -> None:
    """Raise ValueError for the first field whose value is not of its type or not within its bounds.

    Numbers of NumPy and paths become plain numbers and text, so that JSON holds every config.

    >>> from stickjax.config import DataConfig
    >>> DataConfig(T="64")
    Traceback (most recent call last):
    ValueError: T='64' must be a whole number, at least 1
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain = checked(field.name, value, field_types(type(config))[field.name], field.metadata["bounds"])
        object.__setattr__(config, field.name, plain)  # the config is frozen once it is made


def checked(name: str, value, kinds: tuple, bounds: dict) -> Any:
    """Convert a value to one of the types `kinds` and check its bounds; ValueError if it does not fit.

    >>> checked("top_p", 1, (float,), {"above": 0, "at_most": 1})
    1.0
    """
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            if isinstance(value, str):
                one_of(name, value, typing.get_args(kind))
                return value
        elif kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return _bounded(name, _bounded(name, int(value), bounds), {"at_most": LARGEST})
        elif kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
            return _bounded(name, _finite(name, value), bounds)
        elif kind is str and isinstance(value, str | os.PathLike):
            if not (text := os.fspath(value)):
                raise ValueError(f"{name}='' must not be empty")
            return text
        elif kind not in (int, float, str) and isinstance(value, kind):
            return value
    raise ValueError(f"{name}={shown(value)} must be {_expected(kinds, bounds)}")


def _finite(name: str, value) -> float:
    """`value` as a float that float32 holds, which is the type of most parameters."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}={shown(value)} must be finite")
    if number and not 1e-37 < abs(number) < 3e38:
        raise ValueError(f"{name}={shown(value)} must be 0, or between 1e-37 and 3e38 in absolute value (float32)")
    return number


def _bounded(name: str, number, bounds: dict):
    if not all(_BOUNDS[bound](number, limit) for bound, limit in bounds.items()):
        raise ValueError(f"{name}={shown(number)} must be {_words(bounds)}")
    return number


def _words(bounds: dict) -> str:
    return " and ".join(
        f"{bound.replace('_', ' ')} {'10^15' if limit == LARGEST else limit}"
        for bound, limit in sorted(bounds.items(), key=lambda bound: list(_BOUNDS).index(bound[0]))
    )


def _expected(kinds: tuple, bounds: dict) -> str:
    words = [
        " or ".join(map(repr, typing.get_args(kind)))
        if typing.get_origin(kind) is Literal
        else _KINDS.get(kind, f"a {kind.__name__}")
        for kind in kinds
    ]
    return " or ".join(words) + (f", {_words(bounds)}" if bounds else "")


def shown(value) -> str:
    """The repr of a value for a message, at most 60 characters long.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # Python prints no integer of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(name: str, known) -> str:
    """' (did you mean X?)', or nothing when no known name is close."""
    match = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def same_definition(one, other) -> bool:
    """Whether two classes or functions come from the same lines of a file, perhaps run twice."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def one_of(name: str, value, choices) -> None:
    """Raise ValueError, with the nearest choice, for a value that is none of them."""
    if value not in choices:
        raise ValueError(
            f"{name}={shown(value)} is not one of {', '.join(map(repr, choices))}{nearest(str(value), choices)}"
        )
