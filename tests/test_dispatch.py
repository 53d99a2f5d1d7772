"""Test dispatch: which implementation an op chooses, how it explains the choice, and errors for wrong names."""

import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch, expert_mlp, explain, route, stick_breaking_attention
from pallas_kernels.scatter_moe.xla import plan

X = jax.ShapeDtypeStruct((2, 40, 4, 8), jnp.float32)


@pytest.fixture
def op():
    """Yield an op for tests. The op takes one number and has three implementations.

    mosaic supports even numbers, xla supports positive numbers, and reference supports every number.
    """
    ran = dispatch.Implementation
    implementations = {
        "mosaic": ran(lambda n: ("mosaic", n), lambda n: "the number is odd" if n % 2 else None),
        "xla": ran(lambda n: ("xla", n), lambda n: None if n > 0 else "the number is negative", lambda n: f"{n} steps"),
        "reference": ran(lambda n: ("reference", n), lambda n: None),
    }
    yield dispatch.register(dispatch.Op("count", lambda n: n, implementations))
    del dispatch._ops["count"]
    dispatch._logged.clear()


@pytest.mark.parametrize(
    "implementation, number, ran",
    [
        (None, 2, "mosaic"),
        (None, 3, "xla"),
        ("xla", 2, "xla"),
        ("reference", 3, "reference"),
        (("mosaic", "reference"), 3, "reference"),
        (("triton", "xla"), 2, "xla"),
        (["xla", "mosaic"], -2, "mosaic"),
    ],
)
def test_the_first_that_takes_the_call_runs(op, implementation, number, ran):
    assert dispatch.run(op, number, implementation) == (ran, number)
    assert explain("count", number, implementation=implementation).startswith(f"count: {ran}")


@pytest.mark.parametrize(
    "implementation, number, error, message",
    [
        ("mosiac", 2, ValueError, r"'mosiac' is not one of mosaic, triton, xla, reference \(did you mean 'mosaic'\?\)"),
        (("xla", "cuda"), 2, ValueError, "implementation='cuda' is not one of"),
        ((), 2, ValueError, "names no implementation"),
        ("triton", 2, NotImplementedError, "triton: this op has no such implementation yet; use mosaic or xla or"),
        ("mosaic", 3, NotImplementedError, "implementation mosaic: the number is odd; use xla or reference"),
        (("triton", "mosaic"), 3, NotImplementedError, "triton: .*; mosaic: the number is odd; use xla or reference"),
        (None, -3, NotImplementedError, "mosaic: the number is odd; .*xla: the number is negative; use reference"),
    ],
)  # fmt: skip
def test_what_cannot_run_says_what_can(op, implementation, number, error, message):
    for call in (
        lambda: dispatch.run(op, number, implementation),
        lambda: explain("count", number, implementation=implementation),
    ):
        with pytest.raises(error, match=message):
            call()


def test_the_choice_is_logged_once_with_its_reasons(op, caplog):
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for number in (3, 3, 5, 3):
            dispatch.run(op, number, None)
        dispatch.run(op, 3, "xla")
    reasons = f"on {jax.default_backend()}; mosaic: the number is odd; triton: this op has no such implementation yet"
    assert caplog.messages == [f"count: xla (3 steps), {reasons}", f"count: xla (5 steps), {reasons}"]
    assert explain("count", 3) == caplog.messages[0]
    assert explain("count", 3, implementation="xla") == "count: xla (3 steps), asked for"


def test_explain_of_an_unknown_op():
    with pytest.raises(
        ValueError, match="there is no op 'softmax'; the ops are expert_linear, expert_mlp, stick_breaking_attention"
    ):
        explain("softmax", 1)


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "xla (1 query tile of 40 rows, each against all its keys), on cpu; mosaic: "),
        ({"tiles": (16, 8)}, "xla (loop over 16 x 8 tiles), on cpu"),
        ({"skip_below": -24.0}, "xla (loop over 40 x 40 tiles, skipping below 2^-24), on cpu"),
        ({"implementation": "reference", "return_stats": True}, "reference, asked for"),
        ({"query_offset": jax.ShapeDtypeStruct((2,), jnp.int32), "scale": 0.1}, "xla ("),
        (
            {"query_offset": jax.ShapeDtypeStruct((), jnp.int32), "scale": jax.ShapeDtypeStruct((), jnp.float32)},
            "xla (",
        ),
        ({"segment_ids": jax.ShapeDtypeStruct((2, 40), jnp.int32)}, "xla ("),
    ],
)
def test_explain_takes_shapes_as_well_as_arrays(options, said):
    sentence = explain("stick_breaking_attention", X, X, X, **options)
    assert sentence.startswith(f"stick_breaking_attention: {said}")
    full = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, (X, options)
    )
    assert explain("stick_breaking_attention", full[0], full[0], full[0], **full[1]) == sentence


def test_explain_takes_no_memory_for_shapes():
    huge = jax.ShapeDtypeStruct((1, 2**20, 64, 128), jnp.bfloat16)
    assert "loop over 256 x 256 tiles" in explain("stick_breaking_attention", huge, huge, huge)


def test_explain_raises_as_the_op_does():
    with pytest.raises(ValueError, match="N=4 query heads must be a multiple of K=3"):
        explain("stick_breaking_attention", X, *[jax.ShapeDtypeStruct((2, 40, 3, 8), jnp.float32)] * 2)


def test_explain_of_the_experts():
    routing = jax.eval_shape(lambda i: route(i, 8), jax.ShapeDtypeStruct((100, 2), jnp.int32))
    x, w_in, w_out, gates = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((100, 8), (8, 8, 32), (8, 16, 8), (100, 2)))
    said = "xla ({} rows of every expert together, the rest in blocks of {}), on cpu".format(*plan(200, 8))
    assert explain("expert_mlp", x, w_in, w_out, routing, gates).startswith(f"expert_mlp: {said}")
    assert explain("expert_linear", x, w_in, routing).startswith(f"expert_linear: {said}")


@pytest.mark.parametrize("name, error", [("mosiac", ValueError), ("triton", NotImplementedError)])
def test_the_ops_pass_the_name_on(name, error):
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(error, match=name):
        stick_breaking_attention(x, x, x, implementation=name)
    routing = route(jnp.zeros((4, 1), int), 2)
    with pytest.raises(error, match=name):
        expert_mlp(
            x[0, :, 0], jnp.zeros((2, 8, 8)), jnp.zeros((2, 4, 8)), routing, jnp.ones((4, 1)), implementation=name
        )
