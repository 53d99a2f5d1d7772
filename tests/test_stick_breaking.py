"""Test every implementation of stick-breaking attention against the original code and a quadratic reference."""

from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SKIP_CASES, STICK, STICK_IMPLEMENTATIONS, Stick, documents
from conftest import FORWARD, GRADIENT, LOG1P, SATURATED, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from pallas_kernels import merge_stick_breaking, stick_breaking_attention, stick_breaking_weights
from pallas_kernels.stick_breaking import tile

ORACLES = sorted((Path(__file__).parent / "oracles" / "stick_breaking").glob("*.npz"))
REFERENCE = {"implementation": "reference"}
every_implementation = pytest.mark.parametrize(
    "options", STICK_IMPLEMENTATIONS.values(), ids=STICK_IMPLEMENTATIONS.keys()
)


# The cases that `make test` runs. test_any_mask has more masks. "xla-skip" does all that "xla-loop" does, and skips.
EVERY = (
    "plain", "saturated", "very-saturated", "all-far", "all-near", "packed", "padded", "all-padding", "everything",
    "no-keys", "no-queries",
)  # fmt: skip
HARD = {
    "xla": (*EVERY, "one-token", "above-short", "decode", "wide-values"),
    "xla-loop": (*EVERY, "window", "offsets"),
    "xla-skip": (*EVERY, "grouped-heads"),
}
QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time; everything here is small
STATIC = "attend_current", "window", "skip_below", "return_stats", "implementation", "tiles"
attend = jax.jit(stick_breaking_attention, static_argnames=STATIC, compiler_options=QUICK)


# All cases with the same shapes and static options share one compilation.
@partial(jax.jit, static_argnames="options", compiler_options=QUICK)
def _run(arrays, scale, cotangents, given, options):
    def function(query, key, value, scale):
        options_ = dict(options) | given | {"scale": scale, "return_stats": True}
        out, rem, stats = stick_breaking_attention(query, key, value, **options_)
        return out, rem, stats.log_rem

    outputs, vjp = jax.vjp(function, *arrays, scale)
    return outputs, vjp(tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True)))


def results(arrays, options, cotangents, scale=None) -> dict:
    """Run one attention call and return a dict of out, rem, log_rem, d_query, d_key, d_value and d_scale.

    `rem` is what remains of the stick after all keys, and `log_rem` its logarithm. The entries with `d_` are gradients.

    Args:
      arrays: query, key and value.
      options: the other arguments of the call.
      cotangents: the cotangents of out, rem and log_rem.
      scale: the scale of the logits; None: H^-0.5.
    """
    query = arrays[0]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    given = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    static = tuple((name, x) for name, x in options.items() if name not in given)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    values = _run(arrays, jnp.asarray(scale, wide), tuple(cotangents), given, static)
    names = "out", "rem", "log_rem", "d_query", "d_key", "d_value", "d_scale"
    return dict(zip(names, (*values[0], *values[1]), strict=True))


def random_cotangents(arrays, skips: bool) -> tuple:
    """Return random cotangents of out, rem and log_rem, in the type of the inputs.

    A wider type would be rounded to the type of the outputs, and the rounding would count as an error. If `skips`, the
    call uses early exit, and the cotangent of log_rem is zero: early exit stops before log_rem has its final value.
    """
    shape, rng = arrays[0].shape[:3], np.random.default_rng(1)
    shapes = (*shape, arrays[2].shape[-1]), shape, shape
    out, rem, log_rem = (jnp.asarray(rng.standard_normal(s), arrays[0].dtype) for s in shapes)
    return out, rem, 0 * log_rem if skips else log_rem  # with skip_below, log_rem is its value at the exit


@lru_cache(maxsize=64)
def expected(case: Stick, dtype: str, skips: bool) -> dict:
    """Return the results of the reference for a case, computed in float64 from inputs and cotangents of type `dtype`.

    `skips`: whether the call under test uses early exit.
    """
    arrays = case.arrays(dtype)
    cotangents = random_cotangents(arrays, skips)
    with jax.enable_x64(True):
        arrays, cotangents = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (arrays, cotangents))
        values = results(arrays, case.options() | REFERENCE, cotangents)
        return {name: np.asarray(x) for name, x in values.items()}


def assert_close_d_scale(value, wanted: dict, query, tolerance: float) -> None:
    """Assert that `value`, a gradient of the scale, is close to wanted["d_scale"].

    This gradient is a sum of many terms that can cancel to nearly zero, so the tolerance is relative to the size of the
    terms.
    """
    want = wanted["d_scale"]
    terms = float(np.linalg.norm(np.asarray(wanted["d_query"]) * np.asarray(query, np.float64)))
    assert abs(value - want) <= tolerance * (abs(want) + terms * query.shape[-1] ** 0.5), (value, want, terms)


def compare(values: dict, wanted: dict, query, options: dict, forward: float, gradient: float) -> None:
    for name, want in wanted.items():
        if name == "log_rem" and options.get("skip_below") is not None:
            continue
        value = values[name]
        if name == "d_scale":
            assert_close_d_scale(value, wanted, query, gradient)
        else:
            assert_close(value, want, gradient if name.startswith("d_") else forward, name)


def check(case: Stick, options: dict, dtype="float32", forward=None, gradient=None) -> None:
    arrays, skips = case.arrays(dtype), options.get("skip_below") is not None
    values = results(arrays, case.options() | options, random_cotangents(arrays, skips))
    wanted = expected(case, dtype, skips)
    compare(values, wanted, arrays[0], options, forward or FORWARD[dtype], gradient or GRADIENT[dtype])


def is_loop(options: dict, **_) -> bool:
    return options == STICK_IMPLEMENTATIONS["xla-loop"]


EXHAUSTIVE = {
    "test_no_gradient_crosses_documents": is_loop,
    "test_packed_documents_are_the_documents_alone": is_loop,
    "test_transformations": is_loop,
    "test_types_do_not_leak": is_loop,
    "test_outputs_and_gradients_are_those_of_the_reference": lambda options, name: any(
        options == STICK_IMPLEMENTATIONS[which] and name not in names for which, names in HARD.items()
    ),
    # test_numerics.py has saturated logits in half precision.
    "test_half_precision": lambda options, name, dtype: (
        name != ("grouped-heads" if "skip_below" in options else "packed")
    ),
    "test_the_numbers_of_the_original": lambda options, path, dtype: (
        dtype == "float32" and (path.stem != "gqa" or "tiles" in options)
        or path.stem != "gqa" and options != REFERENCE or "skip_below" in options
    ),
    "test_weights_and_rest_sum_to_one": lambda options, name: name in ("current", "above-short"),
    "test_no_gradient_reaches_the_future": lambda options, current: current != is_loop(options),
    "test_chunks_of_queries_give_the_whole": lambda options, chunk: (
        is_loop(options) or (chunk == 7) != ("tiles" in options)
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "options, name",
    [
        pytest.param(options, name, id=f"{name}-{which}")
        for name in STICK
        for which, options in STICK_IMPLEMENTATIONS.items()
        if which != "xla-skip" or name in SKIP_CASES
    ],
)
def test_outputs_and_gradients_are_those_of_the_reference(name, options):
    tolerance = SATURATED if STICK[name].is_saturated else None
    check(STICK[name], options, forward=tolerance, gradient=tolerance)


@every_implementation
@pytest.mark.parametrize(
    "name, dtype", [("grouped-heads", "float16"), ("packed", "bfloat16"), ("saturated", "bfloat16")]
)
def test_half_precision(name, dtype, options):
    check(STICK[name], options, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "options", [REFERENCE, *STICK_IMPLEMENTATIONS.values()], ids=["reference", *STICK_IMPLEMENTATIONS]
)
@pytest.mark.parametrize("path", ORACLES, ids=lambda p: p.stem)
def test_the_numbers_of_the_original(path, options, dtype, x64):
    oracle = np.load(path)
    arrays = tuple(jnp.asarray(oracle[name], dtype) for name in ("query", "key", "value"))
    cotangents = [jnp.asarray(oracle[name], dtype) for name in ("cot_out", "cot_rem")]
    options = options | {"attend_current": bool(oracle["attend_current"])}
    values = results(arrays, options, (*cotangents, 0 * cotangents[1]), float(oracle["scale"]))
    names = "out", "rem", "d_query", "d_key", "d_value"
    assert all(values[name].dtype == dtype for name in names)
    wanted = {name: oracle[name] for name in names}
    compare(values, wanted, arrays[0], options, FORWARD[dtype], GRADIENT[dtype])


def test_there_are_oracles():
    assert len(ORACLES) == 5


def _ids(length):
    return st.lists(st.integers(-1, 2), min_size=2 * length, max_size=2 * length).map(
        lambda ids: jnp.asarray(ids, jnp.int32).reshape(2, length)
    )


@settings(max_examples=50, deadline=None)
@given(
    std=st.sampled_from([1.0, 6.0]),
    offset=st.tuples(*[st.integers(-20, 40)] * 2).map(lambda x: jnp.asarray(x, jnp.int32)),
    query_segments=_ids(18),
    key_segments=_ids(30),
    static=st.sampled_from([  # few, because each is compiled
        {"window": 6},
        {"window": 5, "attend_current": True, "tiles": (7, 4)},
        {"tiles": (4, 8), "skip_below": -90.0},
    ]),
)  # fmt: skip
def test_any_mask(std, offset, query_segments, key_segments, static):
    options = static | {
        "query_offset": offset, "segment_ids": query_segments, "key_segment_ids": key_segments, "implementation": "xla",
    }  # fmt: skip
    reference = {name: x for name, x in options.items() if name not in ("tiles", "skip_below")} | REFERENCE
    arrays = Stick(T=18, S=30, B=2, N=4, K=2, H=4, Hv=3, std=std).arrays()
    cotangents = random_cotangents(arrays, "skip_below" in static)
    wanted = results(arrays, reference, cotangents)
    compare(results(arrays, options, cotangents), wanted, arrays[0], options, SATURATED, SATURATED)


# Properties that hold for any numbers.


@every_implementation
def test_the_first_token_keeps_the_whole_stick(options):
    out, rem = attend(*STICK["plain"].arrays(), **options)
    assert (out[:, 0] == 0).all() and (rem[:, 0] == 1).all()


@every_implementation
@pytest.mark.parametrize("name", ["plain", "saturated", "padded", "current", "above-short"])
def test_weights_and_rest_sum_to_one(name, options):
    case = STICK[name]
    query, key, value = case.arrays()
    out, rem = attend(query, key, jnp.ones_like(value), **case.options(), **options)
    np.testing.assert_allclose(out + rem[..., None], 1, atol=5e-6)


@every_implementation
def test_padding_is_exactly_nothing(options):
    case = STICK["padded"]
    arrays = case.arrays()
    values = results(arrays, case.options() | options, random_cotangents(arrays, skips=False))
    padding = np.asarray(case.options()["segment_ids"]) < 0
    assert (np.asarray(values["out"])[padding] == 0).all() and (np.asarray(values["rem"])[padding] == 1).all()
    for name in ("d_query", "d_key", "d_value"):
        assert (np.asarray(values[name])[padding] == 0).all(), name


def test_a_remainder_too_small_for_fp32_has_a_logarithm():
    query, key, value = STICK["all-near"].arrays()
    _, rem, stats = attend(query, key, value, return_stats=True)
    assert (rem[:, -1] == 0).all()
    np.testing.assert_allclose(stats.log_rem[:, -1], -80.0 * 69, rtol=0.02)


@every_implementation
@pytest.mark.parametrize("current", [False, True])
def test_no_gradient_reaches_the_future(current, options):
    arrays, t = STICK["plain"].arrays(), 20

    def before(query, key, value):
        out, rem = stick_breaking_attention(query, key, value, attend_current=current, **options)
        return (out[:, :t] ** 2).sum() + (rem[:, :t] ** 2).sum()

    d_query, d_key, d_value = jax.jit(jax.grad(before, (0, 1, 2)), compiler_options=QUICK)(*arrays)
    first_unseen = t if current else t - 1
    assert (d_query[:, t:] == 0).all()
    for d in (d_key, d_value):
        assert (d[:, first_unseen:] == 0).all() and (d[:, :first_unseen] != 0).any(-1).all()


@every_implementation
def test_no_gradient_crosses_documents(options):
    arrays = Stick(T=60).arrays()

    def second(query, key, value):
        out, rem = stick_breaking_attention(query, key, value, segment_ids=documents((25, 35)), **options)
        return (out[:, 25:] ** 2).sum() + (rem[:, 25:] ** 2).sum()

    for d in jax.jit(jax.grad(second, (0, 1, 2)), compiler_options=QUICK)(*arrays):
        assert (d[:, :25] == 0).all() and (d[:, 26:-1] != 0).any()


@every_implementation
def test_packed_documents_are_the_documents_alone(options):
    arrays = Stick(T=60).arrays()
    whole = attend(*arrays, segment_ids=documents((30, 30)), **options)
    for part in (slice(0, 30), slice(30, 60)):
        alone = attend(*(x[:, part] for x in arrays), **options)
        for a, b in zip(alone, whole, strict=True):
            assert_close(a, b[:, part], FORWARD["float32"])


@every_implementation
def test_two_runs_are_bitwise_equal(options):
    case = STICK["everything"]
    arrays = case.arrays()
    cotangents = random_cotangents(arrays, skips=False)
    first, second = (results(arrays, case.options() | options, cotangents) for _ in range(2))
    for name in first:
        assert (np.asarray(first[name]) == np.asarray(second[name])).all(), name


# The weights as an array.


@pytest.mark.parametrize("name", ["plain", "saturated", "everything", "no-keys", "half"])
def test_weights_are_those_of_the_attention(name):
    """`stick_breaking_weights` returns the weights that the attention uses.

    If the values are the identity matrix, the output of the attention is the matrix of its weights.
    """
    case = STICK["window" if name == "half" else name]
    query, key, _ = case.arrays("bfloat16" if name == "half" else "float32")
    B, S, K, _ = key.shape
    identity = jnp.broadcast_to(jnp.eye(S, dtype=key.dtype)[None, :, None], (B, S, K, S))
    options = case.options() | {"scale": 0.2}
    out, rem = attend(query, key, identity, **options, **REFERENCE)
    static = {name: options.pop(name) for name in ("window", "attend_current")}
    weights = jax.jit(partial(stick_breaking_weights, **static), compiler_options=QUICK)(query, key, **options)
    assert weights.shape == (B, case.N, case.T, S) and weights.dtype == jnp.float32
    tolerance = FORWARD[str(query.dtype)]
    np.testing.assert_allclose(weights.swapaxes(1, 2), out.astype(jnp.float32), rtol=tolerance, atol=1e-7)
    np.testing.assert_allclose(weights.sum(-1).swapaxes(1, 2) + rem, 1, atol=1e-6)


# Parts of the keys and of the queries.


@every_implementation
@pytest.mark.parametrize("chunk", [7, 30])
def test_chunks_of_queries_give_the_whole(chunk, options):
    query, key, value = Stick(T=61, N=4, K=2).arrays()
    whole = attend(query, key, value, **REFERENCE)
    parts = [
        attend(query[:, start : start + chunk], key, value, query_offset=start, **options)
        for start in range(0, 61, chunk)
    ]
    for name, part, want in zip(("out", "rem"), zip(*parts, strict=True), whole, strict=True):
        assert_close(jnp.concatenate(part, 1), want, FORWARD["float32"], name)


def test_merged_runs_of_keys_give_the_whole_with_gradients(x64):
    arrays = Stick(T=40, N=4, K=2).arrays(np.float64)
    cotangents = random_cotangents(arrays, skips=False)

    def part(start, stop, query, key, value):
        key, value = key[:, start:stop], value[:, start:stop]
        out, _, stats = stick_breaking_attention(query, key, value, query_offset=-start, return_stats=True)
        return out, stats.log_rem

    def merged(*arrays):
        far, middle, near = (part(*ends, *arrays) for ends in ((0, 13), (13, 29), (29, 40)))
        return merge_stick_breaking(near, merge_stick_breaking(middle, far))

    def loss(*arrays):
        out, log_rem = merged(*arrays)
        return (out * cotangents[0]).sum() + (log_rem * cotangents[2]).sum(), (out, log_rem)

    gradients, outputs = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), compiler_options=QUICK)(*arrays)
    wanted = results(arrays, REFERENCE, (cotangents[0], 0 * cotangents[1], cotangents[2]))
    names = "out", "log_rem", "d_query", "d_key", "d_value"
    for name, value in zip(names, (*outputs, *gradients), strict=True):
        assert_close(value, wanted[name], GRADIENT["float64"], name)


def test_merge_is_associative(x64):
    rng = np.random.default_rng(0)
    near, middle, far = ((rng.standard_normal((5, 3)), -rng.random(5)) for _ in range(3))
    left = merge_stick_breaking(merge_stick_breaking(near, middle), far)
    right = merge_stick_breaking(near, merge_stick_breaking(middle, far))
    for a, b in zip(left, right, strict=True):
        assert_close(a, b, FORWARD["float64"])


# Transformations.


def _stacked():
    parts = [Stick(T=20, B=2, N=4, K=2).arrays(seed=seed) for seed in range(2)]
    arrays = [jnp.stack(x) for x in zip(*parts, strict=True)]
    segments = jnp.stack([documents((9, 11), 2), documents((3, 15, -2), 2)])
    return (*arrays, jnp.asarray([0.3, 0.5])), (jnp.asarray([[0, 2], [1, -1]]), segments)


TRANSFORMATIONS = {
    "vmap": jax.vmap,
    "scan of a checkpoint": lambda f: lambda *xs: lax.map(lambda x: jax.checkpoint(f)(*x), xs),
}


@every_implementation
def test_transformations(options):
    """Values and gradients under vmap, and under scan with checkpoint, equal the results of separate calls.

    Each transformation maps over the leading axis of all arguments, including the scale.
    """
    arrays, integers = _stacked()

    def one(query, key, value, scale, offset, segments):
        return stick_breaking_attention(
            query,
            key,
            value,
            scale=scale,
            query_offset=offset,
            segment_ids=segments,
            key_segment_ids=segments,
            **options,
        )

    def loss(function, arrays, integers):
        out, rem = function(*arrays, *integers)
        return (jnp.sin(out) * jnp.cos(out[..., ::-1])).sum() + jnp.cos(rem).sum()

    def compiled(function):
        return jax.jit(jax.value_and_grad(partial(loss, function)), compiler_options=QUICK)

    single = compiled(one)
    each = [single(*jax.tree.map(lambda x: x[i], (arrays, integers))) for i in range(2)]  # noqa: B023
    wanted = sum(value for value, _ in each), jax.tree.map(lambda *x: jnp.stack(x), *(gradient for _, gradient in each))
    for name, transform in TRANSFORMATIONS.items():
        values = compiled(transform(one))(arrays, integers)
        for value, want in zip(jax.tree.leaves(values), jax.tree.leaves(wanted), strict=True):
            assert_close(value, want, GRADIENT["float32"], name)


def test_vmap_over_the_scale_alone():
    arrays = STICK["plain"].arrays()
    scales = jnp.asarray([0.0, 0.2, 1.0])  # at zero, the gradient cannot be a quotient by the scale
    run = jax.value_and_grad(lambda scale: stick_breaking_attention(*arrays, scale=scale)[0].sum())
    together, alone = (jax.jit(function, compiler_options=QUICK) for function in (jax.vmap(run), run))
    for batched, single in zip(together(scales), zip(*map(alone, scales), strict=True), strict=True):
        assert_close(batched, jnp.stack(single), GRADIENT["float32"])


# Types and memory.


@pytest.mark.parametrize("x64_on", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "options", [REFERENCE, *STICK_IMPLEMENTATIONS.values()], ids=["reference", *STICK_IMPLEMENTATIONS]
)
def test_types_do_not_leak(options, dtype, x64_on):
    if dtype == "float64" and not x64_on:
        pytest.skip("fp64 needs x64")
    wide = "float64" if dtype == "float64" else "float32"
    with jax.enable_x64(x64_on):
        arrays = STICK["plain"].arrays(dtype)

        def function(*arrays):
            return stick_breaking_attention(*arrays, scale=np.float64(0.3), return_stats=True, **options)

        out, rem, stats = jax.eval_shape(function, *arrays)
        gradients = jax.eval_shape(jax.grad(lambda *a: function(*a)[0].astype(wide).sum(), (0, 1, 2)), *arrays)
    assert [x.dtype for x in (out, rem, stats.log_rem, stats.kept)] == [dtype, wide, wide, "float32"]
    assert [g.dtype for g in gradients] == [dtype] * 3


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint32])
def test_segments_of_unsigned_integers(dtype):
    arrays, ids, options = Stick(T=60).arrays(), documents((25, 35)), STICK_IMPLEMENTATIONS["xla-loop"]
    out, _ = attend(*arrays, segment_ids=ids.astype(dtype), **options)
    assert_close(out, attend(*arrays, segment_ids=ids, **options)[0], FORWARD["float32"])


def _temporaries(**options) -> int:
    x = jax.ShapeDtypeStruct((1, 16384, 4, 64), jnp.float32)
    loss = lambda *arrays: sum(y.sum() for y in stick_breaking_attention(*arrays, **options))  # noqa: E731
    return (
        jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=QUICK)
        .lower(x, x, x)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


def test_memory_is_linear_in_the_length():
    assert _temporaries(implementation="xla") < 2**30
    assert _temporaries(implementation="xla", skip_below=-24.0) < 2**30
    assert _temporaries(implementation="reference") > 4 * 2**30


def test_log1p_by_multiply_adds():
    y = np.concatenate([np.linspace(0, 1, 500_001)[1:], 0.5 ** np.arange(1, 126)]).astype(np.float32)
    value = np.asarray(jax.jit(tile._log1p)(y), np.float64)
    assert np.abs(value / np.log1p(y.astype(np.float64)) - 1).max() <= LOG1P
    assert tile._log1p(jnp.zeros(1))[0] == 0
