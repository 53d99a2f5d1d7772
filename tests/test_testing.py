"""`pallas_kernels.testing.differences` reports wrong results with their position, and accepts correct ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import expert_linear, route, stick_breaking_attention
from pallas_kernels.testing import FORWARD, GRADIENT, difference, differences, relative_error

X, Y = np.random.default_rng(0).standard_normal((2, 4, 30)).astype(np.float32)


@jax.custom_vjp
def scaled(x, factor):
    """Return 2 x, with a gradient that is `factor` times the correct one, for tests of wrong gradients."""
    return 2 * x


scaled.defvjp(lambda x, factor: (2 * x, factor), lambda factor, d: (2 * factor * d, 0 * factor))


def op(x, y, *, implementation, power=1, output=lambda a: a, gradient=1.0):
    """A test op with two implementations, which returns first = (x y)^power and second = 2 x.

    With implementation="bad", first becomes output(first), and the gradient of second is multiplied by `gradient`.
    """
    bad = implementation == "bad"
    first, second = (x * y) ** power, scaled(x, jnp.asarray(gradient if bad else 1.0, x.dtype))
    return {"first": output(first) if bad else first, "second": second}


def test_what_is_right_has_no_differences():
    found = differences(op, X, Y, implementation="bad", power=2)
    assert found.ok and not found
    names = "output['first']", "output['second']", "gradient of x", "gradient of y"
    assert tuple(d.name for d in found) == names
    assert str(found).startswith("op, bad against reference in float32: 0 of 4 differ\n")


def one_wrong(a):
    """Return `a` with one wrong element, whose error is below the L2 tolerance of bfloat16.

    `differences` must find it, because it also compares single elements.
    """
    return a.at[1, 2].add(0.1 * jnp.abs(a).max().astype(a.dtype))


@pytest.mark.parametrize(
    "options, name, message",
    [
        ({"output": lambda a: a.at[1, 2].add(1)}, "output['first']", r"farthest at [1, 2]"),
        ({"output": lambda a: a.at[0, 3].set(jnp.nan)}, "output['first']", "is nan at [0, 3], expected"),
        ({"output": lambda a: a[:1]}, "output['first']", "is float32[1, 30], expected float32[4, 30]"),
        ({"output": lambda a: a.astype(jnp.bfloat16)}, "output['first']", "is bfloat16[4, 30], expected float32"),
        ({"gradient": 1.001}, "gradient of x", "relative error"),
    ],
)
def test_what_is_wrong_is_named(options, name, message):
    found = differences(op, X, Y, implementation="bad", **options)
    assert not found.ok and found
    wrong = {d.name: str(d) for d in found if not d.ok}
    assert name in wrong and message in wrong[name]
    assert f"! {wrong[name]}" in str(found)


def test_one_wrong_element_among_many_is_a_difference():
    x = jnp.ones((100, 100), jnp.bfloat16)
    options = dict(implementation="bad", output=one_wrong)
    (wrong,) = [d for d in differences(op, x, x, **options) if not d.ok]
    assert wrong.error < FORWARD["bfloat16"] and wrong.index == (1, 2) and wrong.largest > 0.09


def test_a_reference_that_is_not_finite_is_a_failure():
    x = X.copy()
    x[2, 1] = np.nan
    assert "is nan at [2, 1], expected nan" in str(differences(op, x, Y, implementation="bad"))
    with pytest.raises(ValueError, match="must be finite"):
        relative_error([1.0], [np.inf])
    assert difference("x", np.zeros((0, 3)), np.zeros((0, 3)), 0.0).ok


def test_every_floating_array_is_differentiated_and_nothing_else():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 20, 2, 16), jnp.bfloat16)
    call = partial(stick_breaking_attention, window=5)
    options = dict(scale=jnp.float32(0.3), segment_ids=jnp.zeros((1, 20), jnp.int32), tiles=(8, 8), return_stats=True)
    found = differences(call, q, k, value=v, implementation="xla", **options)
    assert found.ok, found
    gradients = [d.name.removeprefix("gradient of ") for d in found if d.name.startswith("gradient")]
    assert gradients == ["query", "key", "value", "scale"]
    assert {d.tolerance for d in found} == {FORWARD["bfloat16"], GRADIENT["bfloat16"]}


def test_any_two_implementations_in_the_type_of_the_arguments():
    routing = route(jnp.array([[0, 1], [1, 2]]), 2)
    x, w = jnp.ones((2, 3)), jnp.arange(24.0).reshape(2, 3, 4)
    call = partial(expert_linear, routing=routing, bias=jnp.ones((2, 4)))
    assert differences(call, x, w, implementation="reference", against="xla", tolerance=1e-6).ok
    seen = []
    differences(lambda x, implementation: seen.append((implementation, x.dtype)) or x, X, against="mosaic")
    assert ("mosaic", np.float32) in seen and ("mosaic", np.float64) not in seen


def test_it_refuses_a_call_without_floating_arrays():
    with pytest.raises(ValueError, match="needs at least one floating-point array among the arguments"):
        differences(lambda x, implementation: x, np.arange(3))
