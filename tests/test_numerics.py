"""Extreme numbers, such as saturated logits, huge values at masked keys and zero vectors, give finite gradients."""

import jax
import jax.numpy as jnp
import limits
import numpy as np
import pytest
from cases import STICK_IMPLEMENTATIONS, Stick
from conftest import FORWARD, GRADIENT

from pallas_kernels import expert_mlp, merge_stick_breaking, route, stick_breaking_attention
from pallas_kernels.scatter_moe.call import ACTIVATIONS, GATED
from stickjax.config import ExpertsConfig, ModelConfig
from stickjax.models.router import Router, _unit

IMPLEMENTATIONS = {"reference": {"implementation": "reference"}} | {
    name: STICK_IMPLEMENTATIONS[name] for name in ("xla", "xla-loop")
}
every_implementation = pytest.mark.parametrize("options", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)

EXHAUSTIVE = {
    "test_saturated_logits_give_the_limits_and_their_gradients": lambda options, dtype: (
        dtype != "float32" and options != IMPLEMENTATIONS["xla"]
    ),
    # The other activations are parts of these. The implementations have the same activations, but other derivatives.
    "test_activations_of_large_hidden_units_have_finite_gradients": lambda activation, implementation: (
        activation not in (("swiglu", "geglu", "gelu", "relu2") if implementation == "xla" else ("geglu", "relu2"))
    ),
    "test_a_token_of_zeros_leaves_the_gradients_of_a_router_finite": lambda network, order: (
        (network, order) not in (("linear", "topk_softmax"), ("gmm", "softmax_topk"))
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@every_implementation
def test_saturated_logits_give_the_limits_and_their_gradients(options, dtype):
    errors = limits.errors(limits.results(dtype, **options), dtype)
    tolerance = {name: (GRADIENT if name.startswith("d_") else FORWARD)[dtype] for name in errors}
    assert not {name: error for name, error in errors.items() if error > tolerance[name]}


@every_implementation
def test_gradients_are_finite_if_masked_logits_overflow(options):
    """The gradients are finite if the logits of masked keys overflow to infinity or NaN."""
    query = jnp.full((1, 6, 1, 32), 1e25).at[..., 1::2].multiply(-1)
    key = jnp.full((1, 6, 1, 32), 1e25).at[:, :3].set(1e-30)  # the last query sees only the first three keys
    value, segments = jnp.full_like(key, 3e38).at[:, :3].set(1), jnp.array([[0, 0, 0, 1, 1, 1]])

    def total(*arrays):
        out, rem = stick_breaking_attention(*arrays, key_segment_ids=segments, segment_ids=0 * segments, **options)
        return out.sum() + rem.sum()

    for gradient in jax.jit(jax.grad(total, (0, 1, 2)))(query, key, value):
        assert jnp.isfinite(gradient).all()


def test_the_derivative_of_the_derivative_is_finite_and_that_of_the_reference():
    q, k, v = limits.inputs("float32")[0]

    def slope(direction, implementation):
        def total(q):
            out, rem = stick_breaking_attention(q, k, v, scale=1.0, implementation=implementation)
            return (out**2).sum() + rem.sum()

        return jax.grad(lambda q: (jax.grad(total)(q) * direction).sum())(q)

    k[..., 0] = np.minimum(k[..., 0], 89 / limits.FIRST)  # logits of 88 plus noise; above, second derivatives are zero
    k[-1], v[-1] = k[0], v[0]
    direction = np.random.default_rng(2).standard_normal(q.shape).astype(np.float32)
    got, want = (np.asarray(jax.jit(slope, static_argnums=1)(direction, name)) for name in ("xla", "reference"))
    assert np.isfinite(want).all() and np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("options", [IMPLEMENTATIONS["reference"], *STICK_IMPLEMENTATIONS.values()])
def test_the_gradient_at_a_logit_of_zero(options):
    """The gradient is correct where all logits are zero, so that every key takes half of the remaining stick.

    A softplus that is computed from the absolute value of the logit could have a wrong derivative at zero. A difference
    quotient gives the expected value.
    """
    _, key, value = Stick(T=20).arrays()
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(key.shape), key.dtype)

    @jax.jit
    def total(query):
        out, rem = stick_breaking_attention(query, key, value, **options)
        return out.sum() + rem.sum()

    derivative = (jax.jit(jax.grad(total))(jnp.zeros_like(key)) * direction).sum()
    difference = (total(0.01 * direction) - total(-0.01 * direction)) / 0.02
    np.testing.assert_allclose(derivative, difference, rtol=1e-3)


@pytest.mark.parametrize("options", [IMPLEMENTATIONS[name] for name in ("reference", "xla")])
def test_no_keys_and_empty_sticks_merge_with_finite_gradients(options):
    q, k, v = (jnp.asarray(np.random.default_rng(0).standard_normal((1, n, 2, 8)), jnp.float32) for n in (5, 6, 6))

    def merged(q, k, v):
        parts = []
        for keys, offset in ((slice(0, 0), 0), (slice(0, 6), 6)):
            out, _, stats = stick_breaking_attention(
                q, k[:, keys], v[:, keys], query_offset=offset, return_stats=True, **options
            )
            parts.append((out, stats.log_rem))
        nothing, all_keys = parts
        spent = jnp.zeros_like(all_keys[0]), jnp.full_like(all_keys[1], -jnp.inf)  # nothing is left of the stick
        once = merge_stick_breaking(nothing, merge_stick_breaking(all_keys, nothing))
        behind = merge_stick_breaking(spent, (1e30 * once[0], once[1]))
        return (once[0] ** 2).sum() + jnp.exp(once[1]).sum() + behind[0].sum(), (once, nothing)

    def whole(q, k, v):
        out, _, stats = stick_breaking_attention(q, k, v, query_offset=6, return_stats=True, **options)
        return (out**2).sum() + jnp.exp(stats.log_rem).sum(), (out, stats.log_rem)

    got, want = (jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(q, k, v) for f in (merged, whole))
    gradients, (once, nothing) = got
    assert all((x == 0).all() for x in nothing)
    for value, right in zip(jax.tree.leaves((gradients, once)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_of_large_hidden_units_have_finite_gradients(activation, implementation):
    """In float16, a hidden value of 150 gives finite outputs and gradients with every activation.

    Some activations contain a third power, and 150^3 is too large for float16.
    """
    x = jnp.asarray([[150.0, 1.0], [-150.0, 1.0]], jnp.float16)
    parts = 2 if activation in GATED else 1
    w_in = jnp.zeros((1, 2, parts), x.dtype).at[0, 0, 0].set(1).at[0, 1, parts - 1].add(parts - 1)
    w_out, gates = jnp.full((1, 1, 2), 2.0**-4, x.dtype), jnp.ones((2, 1), x.dtype)
    routing = route(np.zeros((2, 1), int), 1)

    @jax.jit
    def run(*arrays):
        def function(x, w_in, w_out, gates):
            return expert_mlp(x, w_in, w_out, routing, gates, activation=activation, implementation=implementation)

        out, vjp = jax.vjp(function, *arrays)
        return out, vjp(jnp.full_like(out, 2.0**-4))

    out, gradients = run(x, w_in, w_out, gates)
    large = 150.0**2 if activation == "relu2" else 150.0
    np.testing.assert_allclose(out[:, 0], [large / 16, 0], rtol=2e-3)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)
    hidden = jnp.asarray([150.0, 1.0], x.dtype)
    assert jnp.isfinite(jax.grad(lambda h: ACTIVATIONS[activation](h).sum())(hidden)).all()  # in a dense layer


# Routers.


def test_a_vector_without_direction_has_no_gradient():
    x = jnp.array([[0.0, 0, 0], [1e-30, 0, 0], [3, 4, 0], [1e-10, 0, 0]])
    np.testing.assert_allclose(_unit(x, 1), [[0, 0, 0], [0, 0, 0], [0.6, 0.8, 0], [1, 0, 0]], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: _unit(x, 1)[:, 0].sum()))(x)
    np.testing.assert_allclose(gradient[:3], [[0, 0, 0], [0, 0, 0], [0.128, -0.096, 0]], rtol=1e-5)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("order", ["topk_softmax", "softmax_topk"])
@pytest.mark.parametrize("network", ["linear", "gmm"])
def test_a_token_of_zeros_leaves_the_gradients_of_a_router_finite(network, order):
    config = ModelConfig(D=6, experts=ExpertsConfig(E=4, k=2, network=network, order=order, hidden=5))
    router = Router(config, config.experts, 2, jax.random.key(0))
    tokens = jax.random.normal(jax.random.key(1), (5, 6)).at[0].set(0)

    def loss(router, tokens):
        _, gates, sums = router(tokens)
        return (gates**2).sum() + sums.z + sums.entropy + (sums.probability**2).sum()

    found = jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(router, tokens))
    assert all(jnp.isfinite(g).all() for g in found) and any((g != 0).any() for g in found)
