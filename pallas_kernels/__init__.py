"""Stick-breaking attention and sparse experts, as functions that take arrays and return arrays.

This package needs only jax, numpy and jaxtyping.
"""

from .dispatch import explain
from .scatter_moe import Routing, expert_linear, expert_mlp, route
from .stick_breaking import Stats, merge_stick_breaking, stick_breaking_attention, stick_breaking_weights

__all__ = [
    "Routing",
    "Stats",
    "expert_linear",
    "expert_mlp",
    "explain",
    "merge_stick_breaking",
    "route",
    "stick_breaking_attention",
    "stick_breaking_weights",
]
