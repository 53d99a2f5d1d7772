"""The public functions of stick-breaking attention and the type `Stats`. The code of the functions is in api.py."""

from .api import merge_stick_breaking, stick_breaking_attention, stick_breaking_weights
from .call import Stats

__all__ = ["Stats", "merge_stick_breaking", "stick_breaking_attention", "stick_breaking_weights"]
