"""Fields of a config: every one has a default, a type and a sentence; what a value may be is checked in one place."""

import dataclasses
import difflib
import typing
from typing import Literal


def field(default, doc: str, group: type | None = None):
    """A dataclass field with its sentence for --help; `group` makes it a nested section."""
    if group is not None:
        return dataclasses.field(default_factory=group, metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


def nearest(name: str, known) -> str:
    """' (did you mean X?)', or nothing when no known name is close."""
    match = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def one_of(name: str, value, choices) -> None:
    """Raise ValueError, with the nearest choice, for a value that is none of them."""
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is not one of {', '.join(map(repr, choices))}{nearest(str(value), choices)}"
        )


def check_choices(config) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        options = [o for o in alternatives(hint) if typing.get_origin(o) is Literal]
        choices = [c for o in options for c in typing.get_args(o)]
        value = getattr(config, name)
        if choices and value is not None:
            one_of(name, value, choices)


def at_least(config, low, *names) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= low:  # `not >=` also refuses NaN
            raise ValueError(f"{name}={value} must be at least {low}")


def alternatives(hint) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) not in (None, Literal) else (hint,)
