"""The calls that a GPU is checked with first, executed as the PTX that the GPU would run, against the reference."""

import dataclasses

import jax
import pytest
from conftest import FORWARD, GRADIENT, relative_error
from ptx import HAS_WHEELS, capture

from benchmarks.gpu_cases import ATTENTION, EXPERTS, FEATURES, Call, attention
from benchmarks.gpu_check import fp32

# Fewer heads and entries, all of which do the same, where the machine would take long.
SMALLER = {
    "T=1000 B=2 N=6": dict(T=500, B=1, N=2),
    "grouped heads": dict(N=4, B=1),
    "skip": dict(T=600, N=2),
    "skip, H=64, grouped, packed": dict(N=2, K=1),
    "decode, many entries": dict(N=4, K=1, S=500),
}


def smaller(name: str, **changes) -> Call:
    case = dataclasses.replace(FEATURES[name], **changes)
    return attention(case, case.dtype, case.forward_only)


# Two bfloat16 numbers hold 16 bits of a float32, so that each of the two chained products loses 2^-17 of its operands.
LESS_EXACT = {"experts all-chosen, float32": "the gradient of x is 1.2e-5 off"}

CALLS = ATTENTION | EXPERTS | {name: smaller(name, **changes) for name, changes in SMALLER.items()}


@pytest.mark.skipif(not HAS_WHEELS, reason="needs the CUDA wheels and no GPU: make test-ptx")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(raises=AssertionError, strict=True, reason=LESS_EXACT[name]))
        if name in LESS_EXACT
        else name
        for name in CALLS
    ],
)
def test_a_call_is_the_reference(name, monkeypatch):
    call = CALLS[name]
    if name in EXPERTS:
        # So few that a block takes several tiles, one after the other.
        monkeypatch.setattr("pallas_kernels.seam.multiprocessors", lambda: 2)
    inputs = call.inputs(jax.random.key(0))
    outputs, gradients = capture.run(call.program("mosaic"), *inputs)
    wanted, wanted_gradients = call.program("reference")(*fp32(inputs))
    for got, want in zip(jax.tree.leaves(outputs), jax.tree.leaves(wanted), strict=True):
        assert relative_error(got, want) <= FORWARD[call.dtype]
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        assert relative_error(got, want) <= GRADIENT[call.dtype]
