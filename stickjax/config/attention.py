"""The attention variants of the decoder, with their functions and the config fields that they support."""

import pkgutil
from collections.abc import Callable
from typing import NamedTuple

from stickjax.config.fields import one_of, same_definition

# Fields of `ModelConfig` that only some variants support, with their values for "not used".
OPTIONS = {"attend_current": False, "skip_below": None, "remainder": "none"}


class AttentionVariant(NamedTuple):
    """An attention variant.

    `function`: `function(config, q, k, v, context) -> (out [B,T,N,H], rest [B,T,N] or None)` for q [B,T,N,H] and k, v
      [B,S,K,H]; or "module:name", which is imported when the first model needs it. The attention weights of a query sum
      to 1 - `rest`; None if they always sum to 1.
    `rotary`: whether queries and keys get rotary positions before the call; then H must be even.
    `divides_sequence`: whether it works when the mesh axis "context" divides the sequences.
    `options`: the optional fields of `ModelConfig` that it supports, any of OPTIONS.
    """

    function: Callable | str
    rotary: bool = False
    divides_sequence: bool = False
    options: tuple[str, ...] = ()

    def load(self) -> Callable:
        return pkgutil.resolve_name(self.function) if isinstance(self.function, str) else self.function


ATTENTION: dict[str, AttentionVariant] = {
    "stick_breaking": AttentionVariant(
        "stickjax.models.stick_breaking:attend",
        divides_sequence=True,
        options=("attend_current", "skip_below", "remainder"),
    ),
    "softmax": AttentionVariant("stickjax.models.softmax:attend", rotary=True),
}


def register_attention(name: str, variant: AttentionVariant) -> None:
    """Add a variant. Raise ValueError if another variant has its name, or if an option is not one of OPTIONS."""
    for option in variant.options:
        one_of("option", option, tuple(OPTIONS))
    known = ATTENTION.get(name, variant)
    if isinstance(known.function, str) or not same_definition(known.function, variant.function):
        raise ValueError(f"attention={name!r} is registered already")
    ATTENTION[name] = variant


def variant(name: str) -> AttentionVariant:
    """Look up a variant by name. Raise ValueError, with the nearest name, if it is not registered."""
    one_of("attention", name, tuple(ATTENTION))
    return ATTENTION[name]


def variants_with(fits: Callable[[AttentionVariant], bool]) -> str:
    """Return the names of the variants for which `fits` is true, as text for a message.

    >>> variants_with(lambda variant: "remainder" in variant.options).split(" or ")[0]
    "'stick_breaking'"
    """
    return " or ".join(repr(name) for name, row in ATTENTION.items() if fits(row))
