"""The Mosaic GPU kernels in the interpreter, races detected, against the reference; and the parts it cannot run."""

import os
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MOSAIC, STICK, Stick
from conftest import FORWARD, GRADIENT, relative_error
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_stick_breaking import assert_close_d_scale, expected, random_cotangents

from pallas_kernels import explain, merge_stick_breaking, seam, stick_breaking_attention
from pallas_kernels.stick_breaking import _prepare, spans

MOSAIC_ONLY = {"implementation": "mosaic"}
REM = 1e-5  # relative


@pytest.fixture(autouse=True)
def interpreted():
    with seam.interpret(detect_races=True):  # a race raises
        yield


def attend(case: Stick, **options):
    return partial(stick_breaking_attention, **(case.options() | MOSAIC_ONLY | options), return_stats=True)


def run(case: Stick, dtype: str, *, twice: bool = False, **options) -> dict:
    """Outputs and gradients, named as those of `expected`; `twice` of one program, which must be equal."""
    arrays = case.arrays(dtype)

    def function(query, key, value, scale):
        out, rem, stats = attend(case, **options)(query, key, value, scale=scale)
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


@pytest.mark.parametrize("name", MOSAIC)
def test_outputs_and_gradients_are_those_of_the_reference(name):
    case, dtype = MOSAIC[name], "float16" if "fp16" in name else "bfloat16"
    compare(run(case, dtype), expected(case, dtype, False), dtype)


def test_the_stick_left_is_exact_to_fp32():
    case = Stick(T=130, H=32, std=0.5, shift=-5.0)
    out, rem, stats = jax.jit(attend(case))(*case.arrays("bfloat16"))
    wanted = expected(case, "bfloat16", False)
    np.testing.assert_allclose(rem, wanted["rem"], rtol=REM)
    assert (out[:, 0] == 0).all() and (rem[:, 0] == 1).all() and (stats.kept == 1).all()


def test_skipping_stops_early_forward_and_backward():
    case = Stick(T=450, N=1, H=32)
    values = run(case, "bfloat16", skip_below=-24.0)
    compare(values, expected(case, "bfloat16", True), "bfloat16", skips=True)
    assert 0.1 < float(values["kept"][0, 0]) < 0.6
    assert (values["log_rem"][:, 300:] <= -24 * np.log(2)).all()


def test_far_keys_keep_their_weight_behind_a_long_row():
    """The backward pass walks back from a stick of 2^-2000 to 2^0; a carry in one float would have lost the digits."""
    case = Stick(T=300, N=1, H=32, std=0.3, shift=7.0)
    values, wanted = run(case, "bfloat16"), expected(case, "bfloat16", False)
    assert wanted["log_rem"].min() < -1000
    compare(values, wanted, "bfloat16")


def test_the_gradient_of_the_scale_is_no_quotient_by_it():
    arrays = Stick(T=70, N=1, H=32).arrays("bfloat16")

    def total(scale, arrays, implementation):
        out, rem = stick_breaking_attention(*arrays, scale=scale, implementation=implementation)
        return out.astype(jnp.float32).sum() + rem.sum()

    got = jax.jit(jax.grad(total), static_argnums=2)(0.0, arrays, "mosaic")
    wide = [x.astype(jnp.float32) for x in arrays]
    np.testing.assert_allclose(got, jax.grad(total)(0.0, wide, "reference"), rtol=GRADIENT["bfloat16"])


def test_two_runs_are_equal():
    run(Stick(T=66, N=1, H=32), "bfloat16", twice=True)


DECODING = {
    "lengths": Stick(T=1, S=700, B=3, N=4, K=2, H=32, offset=(699, 64, 5)),
    "several": Stick(T=5, S=600, B=1, N=4, K=1, H=64, offset=(590,)),
    "window": Stick(T=2, S=600, N=2, H=32, offset=400, window=90, attend_current=True),
    "padded": Stick(T=1, S=600, B=2, H=32, segments=(1,), key_segments=(-100, 450, -50)),
}


@pytest.mark.parametrize("name", DECODING)
def test_decoding(name):
    case = DECODING[name]
    if name == "padded":  # ids of the reference's helper count the documents: the query belongs to the second
        options = case.options() | {"segment_ids": jnp.ones((2, 1), jnp.int32), "query_offset": 560}
    else:
        options = case.options()
    arrays = case.arrays("bfloat16")
    assert "decoding" in explain("stick_breaking_attention", *arrays, **options, **MOSAIC_ONLY)
    call = partial(stick_breaking_attention, **options, return_stats=True)
    out, rem, stats = jax.jit(partial(call, **MOSAIC_ONLY))(*arrays)
    want, _, want_stats = call(*(x.astype(jnp.float32) for x in arrays), implementation="reference")
    assert relative_error(out, want) <= FORWARD["bfloat16"]
    np.testing.assert_allclose(stats.log_rem, want_stats.log_rem, rtol=1e-6, atol=REM)


def test_decoding_reads_the_recent_cache_only():
    case = Stick(T=1, S=6_000, N=2, K=1, H=32)
    out, rem, stats = jax.jit(attend(case, skip_below=-24.0))(*case.arrays("bfloat16"))
    want, _ = stick_breaking_attention(*case.arrays("bfloat16"), implementation="xla", skip_below=-60.0)
    assert relative_error(out, want) <= FORWARD["bfloat16"]
    assert float(stats.kept.max()) < 0.5, stats.kept
    assert (rem < 2**-24).all()


def test_shards_of_the_keys_join_forward_and_backward():
    """Context parallelism: a shard's gradients need d_out and d_log_rem alone, which the merge rule passes on."""
    case = Stick(T=90, N=1, H=32)
    query, key, value = case.arrays("bfloat16")

    def joined(query, key, value):
        near, far = (
            stick_breaking_attention(
                query, key[:, part], value[:, part], query_offset=-part.start, return_stats=True, **MOSAIC_ONLY
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


def test_few_heads_at_a_time_give_the_same_gradients(monkeypatch):
    case = Stick(T=40, B=2, N=2, H=32)
    together = run(case, "bfloat16")
    monkeypatch.setattr("pallas_kernels.stick_breaking.fused.SNAPSHOTS", 1)
    apart = run(case, "bfloat16")
    # The one sum over all heads, in another order.
    np.testing.assert_allclose(apart.pop("d_scale"), together.pop("d_scale"), rtol=1e-5)
    chex.assert_trees_all_equal(apart, together)


def test_vmap():
    case = Stick(T=40, B=2, H=32)
    arrays = case.arrays("bfloat16")
    one = lambda *x: stick_breaking_attention(*(y[None] for y in x), **MOSAIC_ONLY)[0][0]  # noqa: E731
    chex.assert_trees_all_equal(jax.jit(jax.vmap(one))(*arrays), stick_breaking_attention(*arrays, **MOSAIC_ONLY)[0])


# What the interpreter cannot run: the device body of the scan, on the registers that the layout itself gives a thread.


class Numbers:
    """The arithmetic of `seam.scan_registers` for all 128 threads at once; a register is [128, elements]."""

    thread = np.arange(128)
    zero = np.zeros(128)

    def one_if(self, bit, is_set):
        return (((self.thread & bit) != 0) == is_set).astype(float)

    def shuffle(self, x, distance):
        return x[self.thread ^ distance]

    add, subtract, negate = staticmethod(np.add), staticmethod(np.subtract), staticmethod(np.negative)
    fma = staticmethod(lambda a, b, c: a * b + c)
    element = staticmethod(lambda register, i: register[:, i])
    pack = staticmethod(lambda elements, like: np.stack(elements, -1))


def registers(layout, x):
    """What each thread holds of x, by the layout's own tiling, warp and lane dimensions: objects [128, vector]."""
    for tile in layout.tiling.tiles:
        kept = x.ndim - len(tile)
        split = [size for n, t in zip(x.shape[kept:], tile, strict=True) for size in (n // t, t)]
        order = [*range(kept), *range(kept, x.ndim + len(tile), 2), *range(kept + 1, x.ndim + len(tile), 2)]
        x = x.reshape(*x.shape[:kept], *split).transpose(order)
    dims = [*layout.warp_dims, *layout.lane_dims]
    shape = [1 if i - x.ndim in dims or i - x.ndim == layout.vector_dim else n for i, n in enumerate(x.shape)]
    held = np.empty(shape, object)
    for index in np.ndindex(*shape):
        held[index] = np.empty((128, x.shape[layout.vector_dim]), x.dtype)
        for thread in range(128):
            place, rest = list(index), thread
            for dim in reversed(dims):
                size = dim.times if isinstance(dim, plgpu.Replicated) else x.shape[dim]
                if not isinstance(dim, plgpu.Replicated):
                    place[dim] = rest % size
                rest //= size
            place[layout.vector_dim] = slice(None)
            held[index][thread] = x[tuple(place)]
    return held


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("columns", [8, 32, 64])
def test_the_scan_of_the_device_adds_the_right_columns(columns, right):
    rng = np.random.default_rng(0)
    tile, row = (layout.to_mgpu() for layout in (seam.TILE, seam.ROW))
    x, minuend, factor = rng.integers(-9, 9, (3, 64, columns)).astype(float)
    start = rng.integers(-9, 9, 64).astype(float)
    held = [registers(tile, a) for a in (minuend, factor, x)]
    result, sums = seam.scan_registers(Numbers(), *held, registers(row, start), right=right)
    direction = slice(None, None, -1) if right else slice(None)
    before = start[:, None] + np.cumsum(x[:, direction], 1)[:, direction] - x
    for got, want in ((result, registers(tile, minuend - factor * before)), (sums, registers(row, x.sum(1)))):
        for index in np.ndindex(*want.shape):
            np.testing.assert_array_equal(got[index], want[index])


def test_interpreted_bodies_are_the_same_sums():
    rng = np.random.default_rng(0)
    x, minuend, factor = rng.standard_normal((3, 64, 16)).astype(np.float32)
    start = rng.standard_normal(64).astype(np.float32)
    right = start[:, None] + np.cumsum(x[:, ::-1], 1)[:, ::-1] - x
    left = start[:, None] + np.cumsum(x, 1) - x
    for function, before in ((seam.minus_sum_right, right), (seam.minus_sum_left, left)):
        result, total = function(*(jnp.asarray(a) for a in (minuend, factor, x, start)))
        np.testing.assert_allclose(result, minuend - factor * before, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(total, x.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("window, attend_current", [(None, False), (0, True), (9, False), (30, True)])
@pytest.mark.parametrize("T, S, rows, columns, G", [(21, 40, 4, 8, 1), (1, 33, 4, 4, 3), (17, 7, 8, 9, 2)])
def test_spans_hold_every_visible_key_and_whole_tiles_are_whole(
    T, S, rows, columns, G, window, attend_current, segments
):
    rng = np.random.default_rng(0)

    @jax.jit
    def plan(offset, ids):
        options = {"query_offset": offset, "window": window, "attend_current": attend_current} | ids
        call = _prepare(jnp.zeros((2, T, 1, 4)), *jnp.zeros((2, 2, S, 1, 4)), **options)
        seen = jax.vmap(lambda where: call.mask.visible(where, jnp.arange(T), jnp.arange(S)))(call.where)
        return spans.spans(call, rows, columns, G), seen.repeat(G, 1)

    for _ in range(20):
        ids = {name: rng.integers(-1, 3, (2, n)) for name, n in (("segment_ids", T), ("key_segment_ids", S))}
        for table, seen in zip(*map(np.asarray, plan(rng.integers(-20, 45, 2), ids if segments else {})), strict=True):
            for i, (stop, whole_stop, whole_start, start) in enumerate(table):
                mine = seen[i * rows : (i + 1) * rows]
                assert stop >= whole_stop >= whole_start >= start >= 0
                assert not mine[:, : start * columns].any() and not mine[:, stop * columns :].any()
                assert mine[:, whole_start * columns : whole_stop * columns].all() and whole_stop * columns <= S


# Which calls it takes.


def refusal(*arrays, **options) -> str:
    with pytest.raises(NotImplementedError) as error:
        explain("stick_breaking_attention", *arrays, **options, **MOSAIC_ONLY)
    return str(error.value)


def test_it_says_what_it_does_not_take():
    x = jax.ShapeDtypeStruct((1, 100, 2, 64), jnp.bfloat16)
    odd = jax.ShapeDtypeStruct((1, 100, 2, 48), jnp.bfloat16)
    single = jax.ShapeDtypeStruct((1, 100, 2, 64), jnp.float32)
    assert "takes bfloat16 and float16, not float32; use xla or reference" in refusal(single, single, single)
    assert "H and Hv of 32, 64, 128, 256, not H=48, Hv=48" in refusal(odd, odd, odd)
    assert "(64, 64) and (128, 64), not (32, 32)" in refusal(x, x, x, tiles=(32, 32))


def test_under_a_mesh_it_asks_for_shard_map():
    mesh = jax.make_mesh((2, 1), ("data", "model"))
    with jax.sharding.set_mesh(mesh):
        x = jax.device_put(jnp.zeros((2, 100, 2, 64), jnp.bfloat16), jax.NamedSharding(mesh, jax.P("data")))
        assert "must be inside jax.shard_map under a mesh with the axes data;" in refusal(x, x, x)
        inside = []

        def local(x):
            inside.append(explain("stick_breaking_attention", x, x, x, **MOSAIC_ONLY))
            return x

        jax.eval_shape(jax.shard_map(local, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False), x)
        assert "mosaic (128 x 64 tiles)" in inside[0]


def test_elsewhere_it_says_why_not():
    x = jax.ShapeDtypeStruct((1, 100, 2, 64), jnp.bfloat16)
    token = seam._interpreted.set(False)
    try:
        assert "(128 x 64 tiles)" in explain("stick_breaking_attention", x, x, x)  # the GPU need not be there
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            assert "mosaic: needs compute capability 9.0, found cpu" in explain("stick_breaking_attention", x, x, x)
    finally:
        seam._interpreted.reset(token)


def test_the_interpreter_does_not_hang_for_want_of_threads(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda backend: 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(RuntimeError, match="needs 4 CPU cores or XLA_FLAGS"), seam.interpret():
        pass


def test_every_case_of_the_portable_list_is_taken_or_refused_with_a_reason():
    for name, case in STICK.items():
        reason = explain("stick_breaking_attention", *case.arrays("bfloat16"), **case.options())
        assert "mosaic" in reason, name
