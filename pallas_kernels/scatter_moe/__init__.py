"""The public names of sparse experts, computed by grouped matrix products. `api` has the functions and their checks."""

from .api import expert_linear, expert_mlp
from .routing import Routing, route

__all__ = ["Routing", "expert_linear", "expert_mlp", "route"]
