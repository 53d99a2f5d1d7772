"""Sparse experts by grouped GEMMs (ScatterMoE): `route`, `expert_linear` and `expert_mlp`."""

from .api import expert_linear, expert_mlp
from .routing import Routing, route

__all__ = ["Routing", "expert_linear", "expert_mlp", "route"]
