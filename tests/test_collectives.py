"""The compiled training step has exactly the expected collectives, for every parallel strategy."""

import math
from collections import Counter

import jax
import pytest

from stickjax.config import Config, ExpertsConfig, ModelConfig
from stickjax.plan import aot

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
L, MATRICES = 2, 7  # layers; matrices of a layer: query, key, value, output, router, and two of the experts
MODEL = ModelConfig(
    V=64, D=32, L=L, N=4, K=2, H=8, F=16, experts=ExpertsConfig(E=4, k=2), remat="full", dtype="bfloat16"
)
# Every matrix is gathered in the forward pass and again in the backward pass, where its gradient is reduced.
FSDP = {"all-gather": 2 * L * MATRICES + 1, "reduce-scatter": L * MATRICES + 1}
# Gathered: tokens, choices and gates, each in both passes, and the gradient of the outputs. Reduced: the outputs, and
# the gradients of tokens and gates.
EXPERT = {"all-gather": 2 * L * 3 + L, "reduce-scatter": L + 2 * L}
# Gathered: keys and values together, in both passes, and once the segments of the sequence.
CONTEXT = {"all-gather": 2 * L + 1, "reduce-scatter": L}


@pytest.mark.parametrize(
    "mesh", [dict(data=2, expert=4), dict(fsdp=2, context=2, tensor=2)], ids="-".join
)  # fmt: skip
def test_collectives_of_a_step(mesh):
    config = Config(MODEL).replace({"data.T": 32, "data.B": 8, **{f"mesh.{axis}": n for axis, n in mesh.items()}})
    devices = tuple(jax.devices()[: math.prod(mesh.values())])
    step = aot.compile_step(config, aot.present_machine()._replace(devices=devices))
    expected = {"fsdp": FSDP, "expert": EXPERT, "context": CONTEXT}
    found = Counter()
    for c in step.collectives:
        if c.kind != "all-reduce":
            (axis,) = c.axes
            found[axis, c.kind] += c.count
    assert found == {(axis, kind): n for axis in mesh for kind, n in expected.get(axis, {}).items()}
    sums = [c for c in step.collectives if c.kind == "all-reduce"]
    large = {axis for c in sums for axis in c.axes if c.bytes >= 2**10}  # the others are losses and norms
    assert large == set(mesh) - {"fsdp"}
