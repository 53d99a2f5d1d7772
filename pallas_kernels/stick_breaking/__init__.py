"""The public names of stick-breaking attention. `api` has the functions and their checks."""

from .api import merge_stick_breaking, stick_breaking_attention, stick_breaking_weights
from .call import Stats

__all__ = ["Stats", "merge_stick_breaking", "stick_breaking_attention", "stick_breaking_weights"]
