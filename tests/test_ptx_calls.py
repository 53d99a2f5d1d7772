"""Test the same kernel calls as the GPU benchmark does, with the PTX machine instead of a GPU.

The machine executes the compiled kernels on a CPU, and the tests compare the results with the reference.
"""

import dataclasses

import jax
import pytest
from conftest import FORWARD, GRADIENT, relative_error
from ptx import HAS_WHEELS, capture

from benchmarks.gpu_cases import ATTENTION, EXPERTS, FEATURES, Call, Feature, attention
from benchmarks.gpu_check import fp32
from pallas_kernels import stick_breaking_attention

# The machine takes about a second for ten tiles. Where all heads of a call do the same, one head is executed; "plain"
# keeps its two heads. The calls below have fewer batch entries, tiles or heads than on a GPU, but at least two tiles in
# each direction.
SMALLER = {name: dict(N=1) for name, case in FEATURES.items() if case.K is None and case.N == 2 and name != "plain"}
SMALLER |= {
    "T=1000 B=2 N=6": dict(T=260, N=2),
    "grouped heads": dict(T=200, N=4, B=1),
    "window": dict(T=300, N=1),
    "everything": dict(N=4),
    "skip": dict(T=600, N=2),
    "skip, H=64, grouped, packed": dict(N=4),
    "decode, many entries": dict(B=6, N=4, K=1, S=500),
}
# The number of multiprocessors that a call is planned for. With two, every block computes several tiles of the experts.
# With five, "decode, many entries" has more batch entries than multiprocessors, and does not split the keys.
MULTIPROCESSORS = dict.fromkeys(EXPERTS, 2) | {"decode, many entries": 5}


def smaller(name: str) -> Feature:
    return dataclasses.replace(FEATURES[name], **SMALLER[name])


def smaller_call(name: str) -> Call:
    case = smaller(name)
    return attention(case, case.dtype, case.forward_only)


CALLS = ATTENTION | EXPERTS | {name: smaller_call(name) for name in SMALLER}


@pytest.mark.skipif(not HAS_WHEELS, reason="needs the CUDA wheels and no GPU: make test-ptx")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_the_reference(name, monkeypatch):
    call = CALLS[name]
    if name in MULTIPROCESSORS:
        monkeypatch.setattr("pallas_kernels.platform.multiprocessors", lambda: MULTIPROCESSORS[name])
    inputs = jax.jit(call.inputs)(jax.random.key(0))
    outputs, gradients = capture.run(call.program("mosaic"), *inputs)
    wanted, wanted_gradients = call.program("reference")(*fp32(inputs))
    for got, want in zip(jax.tree.leaves(outputs), jax.tree.leaves(wanted), strict=True):
        assert relative_error(got, want) <= FORWARD[call.dtype]
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        assert relative_error(got, want) <= GRADIENT[call.dtype]


@pytest.mark.parametrize("name", ["skip", "skip, H=64, grouped, packed"])
def test_a_smaller_call_still_stops_early(name):
    """The calls with early exit, made smaller for the PTX machine, still skip key tiles in one head.

    Another head computes all key tiles.
    """
    case = smaller(name)
    options = case.options() | dict(tiles=(64, 64), implementation="xla", return_stats=True)
    stats = stick_breaking_attention(*case.arrays(jax.random.key(0)), **options)[-1]
    assert stats.kept.min() < 0.8 and stats.kept.max() == 1
