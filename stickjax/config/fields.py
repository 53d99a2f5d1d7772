"""Define and check the fields of a config. A field has a default, a type, a help text and perhaps bounds."""

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

BYTES = 257  # vocabulary size of the byte tokenizer: 256 bytes and the end-of-text token
LARGEST = 10**15  # upper bound of every whole number; arithmetic on larger sizes may overflow
Dtype = Literal["float32", "bfloat16", "float16"]  # number types of the computation and of the stored parameters
SEED = 2**31 - 1  # the largest seed; some random number generators cannot distinguish larger ones

_BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


def field(default, doc: str, group: type | None = None, *, was: str | None = None, **bounds: float):
    """Return a dataclass field that also stores a help text, bounds of its value, and its former name.

    Args:
      default: the default value; not used if `group` is given.
      doc: the help text of the field, one sentence.
      group: the class of the value, for a field whose value is a dataclass, such as `Config.data`. The default value
        is then `group()`.
      was: the name that the field had in the previous version. `accept_former_names` still accepts it.
      bounds: the limits of a number: any of at_least, above, at_most and below.
    """
    metadata = {"doc": doc, "bounds": bounds, "was": was}
    if group is not None:
        return dataclasses.field(default_factory=group, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def former_names(config: type) -> dict[str, tuple[str, ...]]:
    """Return {former name: present names} for the fields of a config class that were renamed or moved.

    A present name with a dot, such as "experts.E", is a field of a nested dataclass. The class attribute `MOVED` lists
    the moved fields.
    """
    renamed = {was: (f.name,) for f in dataclasses.fields(config) if (was := f.metadata.get("was")) is not None}
    return renamed | getattr(config, "MOVED", {})


@functools.cache
def nested_fields(config: type) -> dict[str, type]:
    """Return {field: class of its value} for the fields of a dataclass whose values are dataclasses."""
    kinds = field_types(config)
    return {f.name: kinds[f.name][0] for f in dataclasses.fields(config) if dataclasses.is_dataclass(kinds[f.name][0])}


def former_names_in(config: type, values: dict[str, Any]) -> list[str]:
    """Return the keys of `values` that are former names of fields. `values` is {field: value} for the class `config`.

    A former name may stand for one present field or for several. In the result, the former names that stand for one
    present field come before the former names that stand for several. A former name, such as `attention_experts`, may
    also be the present name of a field whose value is a dataclass. Such a key counts as a former name only if its value
    is neither an object of that dataclass nor a dictionary.
    """
    former, nested = former_names(config), nested_fields(config)
    used = [was for was in former if was in values]
    used = [was for was in used if was not in nested or not isinstance(values[was], dict | nested[was])]
    return sorted(used, key=lambda was: len(former[was]))


def with_present_names(config: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `values` with present names of fields instead of former names. `values` is {field: value}.

    In `values`, a nested dataclass may be given as a dictionary of its fields. In the result, it is an object of the
    dataclass. A field may have moved into several nested dataclasses, the configs of mixtures of experts. Then its
    value is set in each mixture with E > 0. If no mixture has E > 0, its value is set in the first mixture.
    """
    old = {was: values[was] for was in former_names_in(config, values)}
    new = {name: value for name, value in values.items() if name not in old}
    for name, kind in nested_fields(config).items():
        value = new.get(name, config.__dataclass_fields__[name].default)
        if isinstance(value, dict | kind):
            new[name] = dict(value if isinstance(value, dict) else vars(value))
    for was, value in old.items():
        places = [name.rpartition(".") for name in former_names(config)[was]]
        if len(places) > 1:
            places = [place for place in places if new[place[0]].get("E")] or places[:1]
        for group, _, name in places:
            (new[group] if group else new)[name] = value
    return new | {name: _made(kind, name, new[name]) for name, kind in nested_fields(config).items()}


def _made(kind: type, name: str, values: Any):
    """Return `kind(**values)`, an object of a nested dataclass. Return `values` unchanged if it is not a dictionary.

    `name` is the field that contains the nested dataclass, such as "experts", for error messages.
    """
    if not isinstance(values, dict):
        return values
    if unknown := values.keys() - {f.name for f in dataclasses.fields(kind)}:
        known = [f.name for f in dataclasses.fields(kind)]
        raise ValueError(f"unknown config key '{name}.{min(unknown)}'{nearest(min(unknown), known)}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def accept_former_names(config: type) -> type:
    """A class decorator: the dataclass also accepts the former names of its fields, as arguments and as attributes.

    Each use of a former name gives a FutureWarning with the present name.
    """

    def warn(was: str) -> None:
        new = " and ".join(former_names(config)[was])
        warnings.warn(f"{was} is now {new}; the next version removes the old name", FutureWarning, stacklevel=3)

    def read(was: str):
        def former(self):
            warn(was)
            return operator.attrgetter(former_names(config)[was][0])(self)

        return property(former)

    init = config.__init__

    @functools.wraps(init)
    def with_former_names(self, *args, **values):
        for was in former_names_in(config, values):
            warn(was)
        init(self, *args, **with_present_names(config, values))

    config.__init__ = with_former_names
    for was in former_names(config).keys() - nested_fields(config).keys():
        setattr(config, was, read(was))
    return config


@functools.cache
def field_types(config: type) -> dict[str, tuple]:
    """Return {field: tuple of the types that its value may have} for a dataclass.

    >>> from stickjax.config import OptimConfig
    >>> field_types(OptimConfig)["clip"]
    (<class 'float'>, <class 'NoneType'>)
    """
    return {
        name: typing.get_args(hint) if typing.get_origin(hint) not in (None, Literal) else (hint,)
        for name, hint in typing.get_type_hints(config).items()
    }


def check_fields(config) -> None:
    """Check the fields of a config. Raise ValueError for the first field with a wrong type or outside its bounds.

    NumPy numbers are replaced by Python numbers, and paths by text, so that every config can be stored as JSON.

    >>> from stickjax.config import DataConfig
    >>> DataConfig(T="64")
    Traceback (most recent call last):
    ValueError: T='64' must be a whole number, at least 1
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain = checked(field.name, value, field_types(type(config))[field.name], field.metadata["bounds"])
        object.__setattr__(config, field.name, plain)  # because the dataclass is frozen


def checked(name: str, value, kinds: tuple, bounds: dict) -> Any:
    """Check the type and the bounds of `value`. Return the value as one of the types `kinds`, such as 1.0 for 1.

    `bounds` is {name of a bound: limit}, where the names are at_least, above, at_most and below. Raise ValueError if
    the value has another type, is outside its bounds, is an empty text, is a whole number above 10^15, or is a float
    that is not finite or does not fit into float32. The message begins with `name`, the name of the field.

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
    """Return `value` as a float. Raise ValueError if it is not finite, or too large or too small for float32."""
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
    """Return the repr of a value for a message, cut to 60 characters.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # Python refuses to print an integer with thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(name: str, known) -> str:
    """Return the text ' (did you mean X?)', where X is the name in `known` that is most similar to `name`.

    Return '' if no known name is similar.
    """
    match = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def same_definition(one, other) -> bool:
    """Return whether two classes or functions have the same module and the same name.

    This is true, for example, if a file or a notebook cell ran twice. Then a registry replaces the old object.
    """
    names = [(getattr(x, "__module__", None), getattr(x, "__qualname__", None)) for x in (one, other)]
    return names[0] == names[1] and None not in names[0]


def one_of(name: str, value, choices) -> None:
    """Raise ValueError if `value` is not one of `choices`. The message begins with `name` and lists the choices."""
    if value not in choices:
        raise ValueError(
            f"{name}={shown(value)} is not one of {', '.join(map(repr, choices))}{nearest(str(value), choices)}"
        )
