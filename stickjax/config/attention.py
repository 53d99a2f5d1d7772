"""The attention variants of the decoder: where the code of each is, and which fields of its config it understands."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from stickjax.config.fields import one_of


class AttentionVariant(NamedTuple):
    """An attention variant.

    `function`: `function(config, q, k, v, context) -> (out [B,T,N,H], rest [B,T,N] or None)` for q [B,T,N,H] and k, v
      [B,S,K,H]; or "module:name", which is imported when the first model needs it. `rest` is the part of a query's
      weight of one that no key received.
    `rotary`: queries and keys are turned by their positions first, so H must be even.
    `context`: the mesh axis "context" may divide the sequences.
    `options`: the fields of `ModelConfig` that only some variants understand, of which this one understands these.
    """

    function: Callable | str
    rotary: bool = False
    context: bool = False
    options: tuple[str, ...] = ()

    def load(self) -> Callable:
        if callable(self.function):
            return self.function
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


ATTENTION: dict[str, AttentionVariant] = {
    "stick_breaking": AttentionVariant(
        "stickjax.models.stick_breaking:attend", context=True, options=("attend_current", "skip_below", "remainder")
    ),
    "softmax": AttentionVariant("stickjax.models.softmax:attend", rotary=True),
}


def register_attention(name: str, variant: AttentionVariant) -> None:
    """Add a variant; ValueError if its name is taken by another one."""
    if ATTENTION.setdefault(name, variant) != variant:
        raise ValueError(f"attention={name!r} is registered already")


def variant(name: str) -> AttentionVariant:
    """The variant of a name; ValueError, with the nearest name, for one that is not registered."""
    one_of("attention", name, tuple(ATTENTION))
    return ATTENTION[name]


def variants_with(fits: Callable[[AttentionVariant], bool]) -> str:
    """The variants for which `fits` is true, for messages.

    >>> variants_with(lambda variant: "remainder" in variant.options)
    "'stick_breaking'"
    """
    return " or ".join(repr(name) for name, row in ATTENTION.items() if fits(row))
