"""Ops, models and training steps work with jax_numpy_dtype_promotion=strict: no type is promoted implicitly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import STICK_IMPLEMENTATIONS, Stick
from test_models import MODELS

from pallas_kernels import (
    expert_linear,
    expert_mlp,
    merge_stick_breaking,
    route,
    stick_breaking_attention,
    stick_breaking_weights,
)
from stickjax.config import Config, ExpertsConfig, SutConfig
from stickjax.models.families import family_of
from stickjax.training.step import init_state, make_step


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


SUT = SutConfig(V=31, D=16, L=2, K=2, H=8, F=8, experts=ExpertsConfig(4, 2), attention_experts=ExpertsConfig(3, 2))
PAIRS = dataclasses.replace(SUT, classes=3)


@pytest.mark.parametrize("name", ["reference", "xla", "xla-skip"])
def test_attention(name):
    options = STICK_IMPLEMENTATIONS.get(name, {"implementation": "reference"})
    query, key, value = Stick(T=40, N=4, K=2).arrays("bfloat16")
    for more in (
        dict(scale=jnp.float32(0.3), segment_ids=jnp.zeros((1, 40), jnp.uint8), window=5),
        dict(scale=np.float64(0.3), query_offset=jnp.zeros(1, jnp.int16)),
    ):

        def total(query, key, value, more=more):
            out, rem, stats = stick_breaking_attention(query, key, value, return_stats=True, **options, **more)
            out, log_rem = merge_stick_breaking((out, stats.log_rem), (out, stats.log_rem))
            return out.astype(jnp.float32).sum() + rem.sum() + log_rem.sum()

        gradients = jax.eval_shape(jax.grad(total, (0, 1, 2)), query, key, value)
        assert [g.dtype for g in gradients] == ["bfloat16"] * 3
    assert jax.eval_shape(stick_breaking_weights, query, key).dtype == jnp.float32


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_experts(implementation):
    shapes = (40, 16), (4, 16, 8), (4, 16, 16), (4, 8, 16), (40, 2), (4, 8), (4, 16)
    arrays = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
    arrays[4] = arrays[4].astype(jnp.float32)  # routers make float32 gates

    def total(indices, x, w, w_in, w_out, gates, bias, b_in):
        routing, options = route(indices, 4), {"implementation": implementation}
        y = expert_linear(x, w, routing, gates=gates, bias=bias, **options).astype(jnp.float32).sum()
        return y + expert_mlp(x, w_in, w_out, routing, gates, b_in=b_in, **options).astype(jnp.float32).sum()

    for integers in (jnp.int16, jnp.uint32):
        indices = jnp.zeros((40, 2), integers)
        gradients = jax.eval_shape(jax.grad(total, tuple(range(1, 8))), indices, *arrays)
        assert [g.dtype for g in gradients] == [x.dtype for x in arrays]


@pytest.mark.parametrize("model", [*MODELS.values(), SUT, PAIRS], ids=[*MODELS, "sut", "pairs"])
def test_a_training_step(model):
    model = dataclasses.replace(model, dtype="bfloat16")
    config = Config(model).replace({"data.T": 16, "data.B": 2, "train.accumulate": 2 if model.accumulates else 1})
    batch = family_of(model).example_batch(config)
    state = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))
    after, metrics = jax.eval_shape(make_step(config), state, batch)
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    assert metrics["loss"].dtype == jnp.float32
