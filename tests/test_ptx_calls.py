"""The calls that a GPU is checked with first, executed as the PTX that the GPU would run, against the reference."""

import dataclasses

import jax
import pytest
from conftest import FORWARD, GRADIENT, relative_error
from ptx import HAS_WHEELS, capture

from benchmarks.gpu_cases import ATTENTION, EXPERTS, FEATURES, Call, attention
from benchmarks.gpu_check import fp32
from benchmarks.kernel_cases import ODD, Stick, dtype_of

# Fewer heads, entries and tiles, all of which do the same, since the machine takes about a second for ten tiles.
SMALLER = {name: dict(N=1) for name, case in FEATURES.items() if case.K is None and case.N == 2 and name != "plain"}
SMALLER |= {
    "T=1000 B=2 N=6": dict(T=260, N=2),
    "grouped heads": dict(T=200, N=4, B=1),
    "window": dict(T=300, N=1),
    "everything": dict(N=4),
    "skip": dict(T=600, N=1),
    "skip, H=64, grouped, packed": dict(N=2, K=1),
    "decode, many entries": dict(B=6, N=4, K=1, S=500),
    "odd T=3, S=1001": dict(N=3, K=1),
}
# So few that a block takes several tiles of the experts, and that there are more entries to decode than blocks at once.
MULTIPROCESSORS = dict.fromkeys(EXPERTS, 2) | {"decode, many entries": 5}


def smaller(name: str, **changes) -> Call:
    case = dataclasses.replace(FEATURES.get(name) or ODD[name.removeprefix("odd ")], **changes)
    if isinstance(case, Stick):
        return attention(case, dtype_of(name.removeprefix("odd ")))
    return attention(case, case.dtype, case.forward_only)


CALLS = ATTENTION | EXPERTS | {name: smaller(name, **changes) for name, changes in SMALLER.items()}


@pytest.mark.skipif(not HAS_WHEELS, reason="needs the CUDA wheels and no GPU: make test-ptx")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_the_reference(name, monkeypatch):
    call = CALLS[name]
    if name in MULTIPROCESSORS:
        monkeypatch.setattr("pallas_kernels.seam.multiprocessors", lambda: MULTIPROCESSORS[name])
    inputs = jax.jit(call.inputs)(jax.random.key(0))
    outputs, gradients = capture.run(call.program("mosaic"), *inputs)
    wanted, wanted_gradients = call.program("reference")(*fp32(inputs))
    for got, want in zip(jax.tree.leaves(outputs), jax.tree.leaves(wanted), strict=True):
        assert relative_error(got, want) <= FORWARD[call.dtype]
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        assert relative_error(got, want) <= GRADIENT[call.dtype]
