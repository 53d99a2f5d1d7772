"""The attention variants of the decoder: the function of each variant, and the config fields that it supports."""

import pkgutil
from collections.abc import Callable
from typing import NamedTuple

from stickjax.config.fields import one_of, same_definition

# Fields of `ModelConfig` that only some variants support, with their values for "not used".
OPTIONS = {"attend_current": False, "skip_below": None, "remainder": "none"}


class AttentionVariant(NamedTuple):
    """A kind of attention that a decoder can use, such as stick-breaking or softmax.

    `function`: the function that computes the attention, or "module:name", which is imported when the first model needs
      it. `function(config, q, k, v, context)` takes B sequences: q [B,T,N,H] for T queries of N heads, and k, v
      [B,S,K,H] for S keys of K heads. `context` is a `stickjax.models.attention.Context`: documents and positions. The
      function returns out [B,T,N,H], and `rest` [B,T,N] or None. The attention weights of a query sum to 1 - `rest`;
      None means that they always sum to 1.
    `rotary`: whether queries and keys get rotary positions before the function is called; then H must be even.
    `divides_sequence`: whether the variant works when the mesh axis "context" divides the sequences.
    `options`: the optional fields of `ModelConfig` that the variant supports. Each must be a key of OPTIONS.
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
    """Register an attention variant, so that the config field `attention` can select it by `name`.

    Raise ValueError if another function is registered under `name`, or if an option of the variant is not in OPTIONS.
    The same function may be registered again, also when its definition has run twice.
    """
    for option in variant.options:
        one_of("option", option, tuple(OPTIONS))
    known = ATTENTION.get(name, variant).function
    if known != variant.function and not same_definition(known, variant.function):
        raise ValueError(f"attention={name!r} is registered already; choose another name")
    ATTENTION[name] = variant


def variant(name: str) -> AttentionVariant:
    """Return the attention variant that is registered under `name`.

    Raise ValueError, with the nearest registered name, if there is none.
    """
    one_of("attention", name, tuple(ATTENTION))
    return ATTENTION[name]


def variants_with(fits: Callable[[AttentionVariant], bool]) -> str:
    """Return the names of the attention variants for which `fits(variant)` is true, as "'a' or 'b'" for a message.

    >>> variants_with(lambda variant: "remainder" in variant.options).split(" or ")[0]
    "'stick_breaking'"
    """
    return " or ".join(repr(name) for name, row in ATTENTION.items() if fits(row))
