"""Test the GPU kernels of stick-breaking attention in interpreters, against the reference.

With the CUDA wheels, the same tests also compile the kernels and execute their PTX on a CPU (`make test-ptx`).
"""

import contextlib
from functools import partial

import chex
import jax
import jax.numpy as jnp
import limits
import numpy as np
import pytest
from cases import KERNEL_CASES, Stick, dtype_of
from conftest import FORWARD, GRADIENT, relative_error
from ptx import HAS_WHEELS, capture, machine
from test_stick_breaking import assert_close_d_scale, expected, random_cotangents

from pallas_kernels import explain, merge_stick_breaking, platform, stick_breaking_attention, triton_call

INTERPRETERS = {
    "mosaic": partial(platform.interpret, detect_races=True),  # a race raises
    "triton": triton_call.interpret,
    "mosaic-ptx": partial(capture.kernels_launched_by, machine.launch),
}
# Cases that an implementation does not support; the support table of the README lists them.
LACKS = {"mosaic": ("odd-widths", "fp32-odd-widths", "fp32-offsets", "fp32-saturated")}
REM = 1e-5  # relative tolerance of rem
# The interpreter of Mosaic is slower than the PTX machine, which runs all tests of this file in `make test-ptx`. So
# `make test` interprets only these cases and tests.
INTERPRETED = "everything", "saturated"
EXHAUSTIVE = {
    "test_outputs_and_gradients_are_those_of_the_reference": lambda kernels, name: (
        kernels == "mosaic" and name not in INTERPRETED
    ),
    "test_decoding": lambda kernels, name: kernels == "mosaic" and name in ("several", "window"),
} | dict.fromkeys(
    [
        "test_skipping_beside_a_tile_without_queries",
        "test_padding_does_not_keep_a_tile_from_stopping_early",
        "test_the_gradient_of_the_scale_is_no_quotient_by_it",
        "test_far_keys_keep_their_weight_behind_a_long_row",
        "test_saturated_logits_give_the_limits_and_their_gradients",
        "test_shards_of_the_keys_join_forward_and_backward",
        "test_few_heads_at_a_time_give_the_same_gradients",
    ],
    lambda kernels: kernels == "mosaic",
)


@contextlib.contextmanager
def interpreted(implementation: str):
    if implementation == "triton" and not triton_call.is_installed():
        pytest.skip("needs triton and jax-triton, and no GPU: pip install 'stickjax[triton]'")
    if implementation == "mosaic-ptx" and not HAS_WHEELS:
        pytest.skip("needs the CUDA wheels and no GPU: make test-ptx")
    with INTERPRETERS[implementation]():
        yield implementation.removesuffix("-ptx")


@pytest.fixture(params=INTERPRETERS)
def kernels(request):
    """Yield the name of an implementation, mosaic or triton.

    During the test, its kernels are interpreted, or compiled and executed as PTX on the CPU.
    """
    with interpreted(request.param) as name:
        yield name


def attend(kernels: str, case: Stick, **options):
    return partial(stick_breaking_attention, **(case.options() | options), implementation=kernels, return_stats=True)


def run(kernels: str, case: Stick, dtype: str, *, twice: bool = False, **options) -> dict:
    """Run one attention call and return a dict of its outputs and gradients.

    The keys of the dict are out, rem (what remains of the stick after all keys), log_rem (the logarithm of rem),
    d_query, d_key, d_value, d_scale, kept (the share of key tiles that each head has computed) and query (the argument
    of the call).

    Args:
      kernels: the name of the implementation.
      case: the sizes and arguments of the call.
      dtype: the type of query, key and value.
      twice: run the call twice and require bitwise equal results.
      options: more arguments of the call.
    """
    arrays = case.arrays(dtype)

    def function(query, key, value, scale):
        out, rem, stats = attend(kernels, case, **options)(query, key, value, scale=scale)
        return (out, rem, stats.log_rem), stats.kept

    @jax.jit
    def both(arrays, cotangents):
        outputs, vjp, kept = jax.vjp(function, *arrays, jnp.float32(case.H**-0.5), has_aux=True)
        return outputs, vjp(tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True))), kept

    cotangents = random_cotangents(arrays, "skip_below" in options)
    outputs, gradients, kept = both(arrays, cotangents)
    if twice:
        chex.assert_trees_all_equal(both(arrays, cotangents), (outputs, gradients, kept))
    names = "out", "rem", "log_rem", "d_query", "d_key", "d_value", "d_scale"
    return dict(zip(names, (*outputs, *gradients), strict=True)) | {"kept": kept, "query": arrays[0]}


def compare(values: dict, wanted: dict, dtype: str, *, skips: bool = False) -> None:
    for name in ("out", "d_query", "d_key", "d_value"):
        error, bound = relative_error(values[name], wanted[name]), (GRADIENT if name[0] == "d" else FORWARD)[dtype]
        assert error <= bound, f"{name}: {error:.1e} above {bound:.0e}"
    assert_close_d_scale(values["d_scale"], wanted, values["query"], GRADIENT[dtype])
    if not skips:
        np.testing.assert_allclose(values["log_rem"], wanted["log_rem"], rtol=1e-6, atol=REM)


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_outputs_and_gradients_are_those_of_the_reference(kernels, name):
    """The outputs and gradients are close to the reference. Two runs of the case "everything" are bitwise equal."""
    case = KERNEL_CASES[name]
    dtype = dtype_of(name)
    try:
        explain("stick_breaking_attention", *case.arrays(dtype), **case.options(), implementation=kernels)
    except NotImplementedError as refusal:
        assert name in LACKS.get(kernels, ()), refusal
        pytest.skip(str(refusal))
    compare(run(kernels, case, dtype, twice=name == "everything"), expected(case, dtype, False), dtype)


def test_the_stick_left_is_exact_to_fp32(kernels):
    case = Stick(T=130, H=32, std=0.5, shift=-5.0)
    out, rem, stats = jax.jit(attend(kernels, case))(*case.arrays("bfloat16"))
    wanted = expected(case, "bfloat16", False)
    np.testing.assert_allclose(rem, wanted["rem"], rtol=REM)
    assert (out[:, 0] == 0).all() and (rem[:, 0] == 1).all() and (stats.kept == 1).all()


def test_skipping_stops_early_forward_and_backward(kernels):
    case = Stick(T=450, N=1, H=32)
    values = run(kernels, case, "bfloat16", skip_below=-24.0)
    compare(values, expected(case, "bfloat16", True), "bfloat16", skips=True)
    assert 0.1 < float(values["kept"][0, 0]) < 0.6
    assert (values["log_rem"][:, 300:] <= -24 * np.log(2)).all()


def test_skipping_beside_a_tile_without_queries(kernels):
    """Early exit is correct in the last thread block, which has one tile with queries and one empty tile.

    There are nine tiles of 64 queries, and every thread block has two tiles. The empty tile must not wait for keys.
    """
    case = Stick(T=520, N=1, H=32)
    values = run(kernels, case, "bfloat16", skip_below=-24.0)
    compare(values, expected(case, "bfloat16", True), "bfloat16", skips=True)


def test_padding_does_not_keep_a_tile_from_stopping_early(kernels):
    """A query tile that is mostly padding stops as early as it does without the padding.

    In the last tile with queries, two rows are queries and all others are padding.
    """
    case = Stick(T=320, N=1, H=32, segments=(258, -62))
    values = run(kernels, case, "bfloat16", skip_below=-24.0)
    compare(values, expected(case, "bfloat16", True), "bfloat16", skips=True)
    whole = run(kernels, Stick(T=258, N=1, H=32), "bfloat16", skip_below=-24.0)
    assert float(values["kept"][0, 0]) <= float(whole["kept"][0, 0]) < 0.9


def test_an_entry_without_keys_left_does_not_keep_the_others_reading(kernels):
    """In a decode step, early exit works for each batch entry by itself.

    The first entry has 100 keys and still has much of its stick at its last key. The second has 2000 keys and uses up
    its stick soon, so it must stop early.
    """
    case = Stick(T=1, S=2000, B=2, N=2, K=1, H=32, offset=(100, 1999))
    query, key, value = case.arrays("bfloat16")
    key = key.at[0].set(0).at[0, :, :, 0].set(-9)
    arrays = query.at[..., 0].set(8), key, value
    attended = jax.jit(attend(kernels, case, skip_below=-24.0))(*arrays)
    wanted = stick_breaking_attention(*(x.astype(jnp.float32) for x in arrays), **case.options(), implementation="xla")
    assert relative_error(attended[0], wanted[0]) <= FORWARD["bfloat16"]
    assert float(wanted[1][0].min()) > 0.9 and float(attended[2].kept[1, 0]) < 0.5


def test_far_keys_keep_their_weight_behind_a_long_row(kernels):
    """The gradients are exact although the remaining stick grows from 2^-2000 to 1 in the backward pass.

    A running sum in one float32 number would lose the digits of the far keys.
    """
    case = Stick(T=300, N=1, H=32, std=0.3, shift=7.0)
    values, wanted = run(kernels, case, "bfloat16"), expected(case, "bfloat16", False)
    assert wanted["log_rem"].min() < -1000
    compare(values, wanted, "bfloat16")


def test_the_gradient_of_the_scale_is_no_quotient_by_it(kernels):
    arrays = Stick(T=40, N=1, H=32).arrays("bfloat16")

    def total(scale, arrays, implementation):
        out, rem = stick_breaking_attention(*arrays, scale=scale, implementation=implementation)
        return out.astype(jnp.float32).sum() + rem.sum()

    got = jax.jit(jax.grad(total), static_argnums=2)(0.0, arrays, kernels)
    wide = [x.astype(jnp.float32) for x in arrays]
    np.testing.assert_allclose(got, jax.grad(total)(0.0, wide, "reference"), rtol=GRADIENT["bfloat16"])


def test_saturated_logits_give_the_limits_and_their_gradients(kernels):
    """Saturated logits give correct and finite outputs and gradients.

    One exception is allowed: with logits of 1e5, Mosaic's d_value may be inaccurate, but it must be finite. For each
    key, the backward pass needs the sum of -log2(1 - beta) over the nearer keys, where beta = sigmoid(logit). It
    computes this sum as a difference of two larger sums, of up to several million. Near the query the difference is
    small, and rounding leaves none of its digits.
    """
    errors = limits.errors(limits.results("bfloat16", implementation=kernels), "bfloat16")
    assert np.isfinite(list(errors.values())).all(), errors
    beyond = [entry for entry, logits in limits.LOGITS.items() if kernels == "mosaic" and max(logits) > 1e3]
    tolerance = {name: (GRADIENT if name.startswith("d_") else FORWARD)["bfloat16"] for name in errors}
    wrong = {name for name, error in errors.items() if error > tolerance[name]}
    assert wrong <= {f"d_value, logits {entry}" for entry in beyond}, errors


DECODING = {
    "lengths": Stick(T=1, S=700, B=3, N=4, K=2, H=32, offset=(699, 64, 5)),
    "several": Stick(T=5, S=600, B=1, N=4, K=1, H=64, offset=(590,)),
    "window": Stick(T=2, S=600, N=2, H=32, offset=400, window=90, attend_current=True),
    "padded": Stick(T=1, S=600, B=2, H=32, segments=(1,), key_segments=(-100, 450, -50)),
}


@pytest.mark.parametrize("name", DECODING)
def test_decoding(kernels, name):
    case = DECODING[name]
    if name == "padded":  # the key segments count the documents: the query is in document 1
        options = case.options() | {"segment_ids": jnp.ones((2, 1), jnp.int32), "query_offset": 560}
    else:
        options = case.options()
    arrays = case.arrays("bfloat16")
    assert "decoding" in explain("stick_breaking_attention", *arrays, **options, implementation=kernels)
    call = partial(stick_breaking_attention, **options, return_stats=True)
    out, rem, stats = jax.jit(partial(call, implementation=kernels))(*arrays)
    want, _, want_stats = call(*(x.astype(jnp.float32) for x in arrays), implementation="reference")
    assert relative_error(out, want) <= FORWARD["bfloat16"]
    np.testing.assert_allclose(stats.log_rem, want_stats.log_rem, rtol=1e-6, atol=REM)


def test_decoding_reads_the_recent_cache_only(kernels):
    case = Stick(T=1, S=6_000, N=2, K=1, H=32)
    out, rem, stats = jax.jit(attend(kernels, case, skip_below=-24.0))(*case.arrays("bfloat16"))
    want, _ = stick_breaking_attention(*case.arrays("bfloat16"), implementation="xla", skip_below=-60.0)
    assert relative_error(out, want) <= FORWARD["bfloat16"]
    assert float(stats.kept.max()) < 0.5, stats.kept
    assert (rem < 2**-24).all()


def test_shards_of_the_keys_join_forward_and_backward(kernels):
    """Two calls on two parts of the keys, joined by `merge_stick_breaking`, equal one call on all keys.

    Context parallelism needs this. The backward pass of each call gets from the merge only the cotangents of `out` and
    `log_rem`, which must be enough for the gradients.
    """
    case = Stick(T=90, N=1, H=32)
    query, key, value = case.arrays("bfloat16")

    def joined(query, key, value):
        near, far = (
            stick_breaking_attention(
                query, key[:, part], value[:, part], query_offset=-part.start, return_stats=True, implementation=kernels
            )
            for part in (slice(64, 90), slice(0, 64))
        )
        return merge_stick_breaking((near[0], near[2].log_rem), (far[0], far[2].log_rem))

    def whole(query, key, value):
        out, _, stats = stick_breaking_attention(query, key, value, return_stats=True, implementation="reference")
        return out, stats.log_rem

    cotangents = random_cotangents((query, key, value), False)[0], jnp.ones((1, 90, 1))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (query, key, value))
    wanted, vjp = jax.vjp(whole, *wide)
    outputs, joined_vjp = jax.vjp(jax.jit(joined), query, key, value)
    assert relative_error(outputs[0], wanted[0]) <= FORWARD["bfloat16"]
    gradients = jax.jit(joined_vjp)((cotangents[0].astype(jnp.bfloat16), cotangents[1]))
    for got, want in zip(gradients, vjp((cotangents[0].astype(jnp.float32), cotangents[1])), strict=True):
        assert relative_error(got, want) <= GRADIENT["bfloat16"]


def test_few_heads_at_a_time_give_the_same_gradients(kernels, monkeypatch):
    case = Stick(T=40, B=2, N=2, H=32)
    together = run(kernels, case, "bfloat16")
    monkeypatch.setattr("pallas_kernels.stick_breaking.fused.SNAPSHOTS", 1)
    apart = run(kernels, case, "bfloat16")
    # d_scale is a sum over all heads, which is computed in another order here.
    np.testing.assert_allclose(apart.pop("d_scale"), together.pop("d_scale"), rtol=1e-5)
    chex.assert_trees_all_equal(apart, together)


def test_vmap(kernels):
    case = Stick(T=40, B=2, H=32)
    arrays = case.arrays("bfloat16")
    one = lambda *x: stick_breaking_attention(*(y[None] for y in x), implementation=kernels)[0][0]  # noqa: E731
    chex.assert_trees_all_equal(
        jax.jit(jax.vmap(one))(*arrays), stick_breaking_attention(*arrays, implementation=kernels)[0]
    )
