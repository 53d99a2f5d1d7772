"""The Mosaic and Triton kernel sets have every method of their protocol, with the same arguments.

The code that Mosaic and Triton share calls the kernels through this protocol, `Kernels`.
"""

import inspect

import pytest

from pallas_kernels import scatter_moe, stick_breaking
from pallas_kernels.scatter_moe import kernels as expert_kernels
from pallas_kernels.scatter_moe import mosaic as expert_mosaic
from pallas_kernels.scatter_moe import triton as expert_triton
from pallas_kernels.stick_breaking import kernels as attention_kernels
from pallas_kernels.stick_breaking import mosaic, triton

SETS = {
    "attention by mosaic": (attention_kernels.Kernels, mosaic.KERNELS),
    "attention by triton": (attention_kernels.Kernels, triton.KERNELS),
    "experts by mosaic": (expert_kernels.Kernels, expert_mosaic.KERNELS),
    "experts by triton": (expert_kernels.Kernels, expert_triton.KERNELS),
}


def positional(method) -> list[str]:
    """Return the names of a method's arguments, without `self`, *args and **kwargs."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return [name for name, p in inspect.signature(method).parameters.items() if p.kind in kinds and name != "self"]


@pytest.mark.parametrize("name", SETS)
def test_a_set_of_kernels_has_every_method_of_its_own(name):
    protocol, kernels = SETS[name]
    methods = [m for m in vars(protocol) if inspect.isfunction(vars(protocol)[m]) and not m.startswith("_")]
    assert len(methods) >= 4 and isinstance(kernels, protocol) and hash(kernels) == hash(kernels)
    for method in methods:
        own, wanted = getattr(type(kernels), method), positional(vars(protocol)[method])
        if method == "tasks":  # the Protocol itself implements this method
            continue
        assert own is not vars(protocol)[method], f"{name} has no {method}"
        planned = [x for x in positional(own) if x not in ("key_ranges", "offset", "query_segments", "key_segments")]
        assert planned == wanted, method


def test_the_public_names_are_those_of_the_folders():
    import pallas_kernels

    assert {*scatter_moe.__all__, *stick_breaking.__all__, "explain"} == set(pallas_kernels.__all__)
