"""The table of the decoder's attention variants. A variant has a function and the config fields that it supports."""

import pkgutil
from collections.abc import Callable
from typing import NamedTuple

from stickjax.config.fields import one_of, same_definition

# {field of `ModelConfig` that only some attention variants support: the value that means "not used"}
OPTIONS = {"attend_current": False, "skip_below": None, "remainder": "none"}


class AttentionVariant(NamedTuple):
    """A kind of attention that a decoder can use, such as stick-breaking or softmax.

    `function`: the function that computes the attention, or its name as "module:name". A name is imported when the
      first model needs the function. `function(config, q, k, v, context)` takes the model config; q [B,T,N,H], the
      queries of N heads; and k and v [B,S,K,H], the keys and values of K heads. `context` is a
      `stickjax.models.attention.Context`: the documents and positions of the tokens. The function returns
      (out [B,T,N,H], rest [B,T,N]). The attention weights of a query sum to 1 - rest. If the sum is always 1, `rest`
      may be None.
    `rotary`: whether rotary positions are applied to queries and keys before the function is called. H must then be
      even.
    `divides_sequence`: whether the function works if the mesh axis "context" divides every sequence over devices.
    `options`: the names of the optional config fields that the variant supports, such as "remainder". The dictionary
      OPTIONS has all optional fields.
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
    """Register an attention variant, so that the config field `model.attention` can select it by `name`.

    The same function may be registered again under the same name, as when a notebook cell runs twice. Raise ValueError
    if another function has this name, or if `variant.options` has a name that is not a key of OPTIONS.
    """
    for option in variant.options:
        one_of("option", option, tuple(OPTIONS))
    known = ATTENTION.get(name, variant).function
    if known != variant.function and not same_definition(known, variant.function):
        raise ValueError(f"attention={name!r} is registered already, for another function; choose another name")
    ATTENTION[name] = variant


def variant(name: str) -> AttentionVariant:
    """Return the attention variant that is registered under `name`.

    Raise ValueError if no variant has this name. The message suggests the nearest registered name.
    """
    one_of("attention", name, tuple(ATTENTION))
    return ATTENTION[name]


def variants_with(fits: Callable[[AttentionVariant], bool]) -> str:
    """Return the names of the attention variants for which `fits(variant)` is true, as the text "'a' or 'b'".

    >>> variants_with(lambda variant: "remainder" in variant.options).split(" or ")[0]
    "'stick_breaking'"
    """
    return " or ".join(repr(name) for name, row in ATTENTION.items() if fits(row))
