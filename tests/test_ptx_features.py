"""The calls of attention that a GPU is checked with first, executed as the PTX that the GPU would run."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from conftest import FORWARD, GRADIENT, relative_error
from ptx import HAS_WHEELS, capture

from benchmarks import trained_logits
from benchmarks.gpu_cases import FEATURES
from pallas_kernels import stick_breaking_attention

pytestmark = pytest.mark.skipif(not HAS_WHEELS, reason="needs the CUDA wheels and no GPU: make test-ptx")
# Fewer heads and entries where the machine would take long, of which each does the same.
SMALLER = {
    "T=1000 B=2 N=6": dict(B=1, N=2),
    "grouped heads": dict(N=4, B=1),
    "skip": dict(T=600, N=2),
    "skip, H=64, grouped, packed": dict(N=2, K=1),
    "decode, many entries": dict(N=4, K=1),
}


def results(function, arrays, cotangents):
    """(outputs, gradients)"""
    if cotangents is None:
        return function(*arrays), None
    outputs, vjp = jax.vjp(function, *arrays)
    return outputs, vjp(cotangents)


@pytest.mark.parametrize("name", FEATURES)
def test_feature_is_the_reference(name):
    case = dataclasses.replace(FEATURES[name], **SMALLER.get(name, {}))
    arrays, options = case.arrays(jax.random.key(0)), case.options()
    cotangents = None if case.forward_only else trained_logits.cotangents(jax.random.key(1), arrays[0], arrays[2])
    attend = partial(stick_breaking_attention, **options)
    got = capture.run(partial(results, partial(attend, implementation="mosaic")), arrays, cotangents)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, cotangents))
    wanted = jax.jit(partial(results, partial(attend, implementation="reference")))(*exact)
    assert relative_error(got[0][0], wanted[0][0]) <= FORWARD[case.dtype]
    if cotangents is not None:
        for mine, right in zip(got[1], wanted[1], strict=True):
            assert relative_error(mine, right) <= GRADIENT[case.dtype]
