"""Test the Mosaic GPU kernels: what the interpreter cannot run, the tables that plan the work, the supported calls.

The results of the kernels are tested in tests/test_kernels.py.
"""

import operator
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import STICK
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import explain, mosaic_shims, platform
from pallas_kernels.stick_breaking import key_ranges
from pallas_kernels.stick_breaking.api import _prepare

MOSAIC_ONLY = {"implementation": "mosaic"}


@pytest.fixture(autouse=True)
def interpreted():
    with platform.interpret():
        yield


# The GPU body of the scan, on the registers that a thread has according to the layout.


class Numbers:
    """NumPy operations that replace the GPU operations of `mosaic_shims.scan_registers`, for 128 threads at once.

    An array [128, n] stands for a register of n elements: row t has the elements in thread t.
    """

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
    """Return the elements of x that each of 128 threads holds, if x is in registers with this Mosaic layout.

    The result is an array of objects, one for each register of a thread. Such an object is an array [128, n]: row t has
    the n elements of the register in thread t.
    """
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
    tile, row = (layout.to_mgpu() for layout in (mosaic_shims.TILE, mosaic_shims.ROW))
    x, minuend, factor = rng.integers(-9, 9, (3, 64, columns)).astype(float)
    start = rng.integers(-9, 9, 64).astype(float)
    held = [registers(tile, a) for a in (minuend, factor, x)]
    result, sums = mosaic_shims.scan_registers(Numbers(), *held, registers(row, start), right=right)
    direction = slice(None, None, -1) if right else slice(None)
    before = start[:, None] + np.cumsum(x[:, direction], 1)[:, direction] - x
    for got, want in ((result, registers(tile, minuend - factor * before)), (sums, registers(row, x.sum(1)))):
        for index in np.ndindex(*want.shape):
            np.testing.assert_array_equal(got[index], want[index])


def test_a_thread_knows_the_rows_that_it_holds():
    held = registers(mosaic_shims.ROW.to_mgpu(), np.arange(64))
    for half, index in enumerate(np.ndindex(held.shape)):
        for first in (0, 128):  # the first thread of each of two warpgroups
            threads = first + np.arange(128)
            rows = mosaic_shims.row_of_thread(threads, half, operator.rshift, operator.and_, operator.or_)
            np.testing.assert_array_equal(held[index][:, 0], rows)
    assert half == 1
    np.testing.assert_array_equal(mosaic_shims.row_numbers(), np.arange(64))


def test_interpreted_bodies_are_the_same_sums():
    rng = np.random.default_rng(0)
    x, minuend, factor = rng.standard_normal((3, 64, 16)).astype(np.float32)
    start = rng.standard_normal(64).astype(np.float32)
    right = start[:, None] + np.cumsum(x[:, ::-1], 1)[:, ::-1] - x
    left = start[:, None] + np.cumsum(x, 1) - x
    for function, before in ((mosaic_shims.minus_sum_right, right), (mosaic_shims.minus_sum_left, left)):
        result, total = function(*(jnp.asarray(a) for a in (minuend, factor, x, start)))
        np.testing.assert_allclose(result, minuend - factor * before, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(total, x.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("window, attend_current", [(None, False), (0, True), (9, False), (30, True)])
@pytest.mark.parametrize("T, S, rows, columns, G", [(21, 40, 4, 8, 1), (1, 33, 4, 4, 3), (17, 7, 8, 9, 2)])
def test_key_tile_ranges_hold_every_visible_key_and_whole_tiles_are_whole(
    T, S, rows, columns, G, window, attend_current, segments
):
    rng = np.random.default_rng(0)

    @jax.jit
    def plan(offset, ids):
        options = {"query_offset": offset, "window": window, "attend_current": attend_current} | ids
        call = _prepare(jnp.zeros((2, T, 1, 4)), *jnp.zeros((2, 2, S, 1, 4)), **options)
        seen = jax.vmap(lambda where: call.mask.visible(where, jnp.arange(T), jnp.arange(S)))(call.where)
        return key_ranges.key_tile_ranges(call, rows, columns, G), seen.repeat(G, 1)

    for _ in range(20):
        ids = {name: rng.integers(-1, 3, (2, n)) for name, n in (("segment_ids", T), ("key_segment_ids", S))}
        for table, seen in zip(*map(np.asarray, plan(rng.integers(-20, 45, 2), ids if segments else {})), strict=True):
            for i, (stop, whole_stop, whole_start, start) in enumerate(table):
                mine = seen[i * rows : (i + 1) * rows]
                assert stop >= whole_stop >= whole_start >= start >= 0
                assert not mine[:, : start * columns].any() and not mine[:, stop * columns :].any()
                assert mine[:, whole_start * columns : whole_stop * columns].all() and whole_stop * columns <= S


def test_query_tile_ranges_hold_the_query_tiles_that_visit_a_key_tile():
    """`query_tile_ranges` returns, for each key tile, a range that contains all query tiles which read this key tile.

    `query_tile_ranges` also returns a part of this range in which no query tile needs a mask. Its two arguments are
    random: the range of key tiles of each query tile (as from `key_tile_ranges`), and the key tile at which each query
    tile of each query head stops early.
    """
    rng = np.random.default_rng(0)
    for _ in range(50):
        table = -np.sort(-rng.integers(0, 9, (2, 6, 4)), -1)
        reached = rng.integers(0, 9, (2, 2, 6))
        ranges = np.asarray(key_ranges.query_tile_ranges(jnp.asarray(table), jnp.asarray(reached), 8))
        for b, n, j in np.ndindex(2, 2, 8):
            stop, whole_stop, whole_start, start = table[b].T
            visits = (np.maximum(start, reached[b, n]) <= j) & (j < stop)
            whole = visits & (whole_start <= j) & (j < whole_stop)
            first, whole_first, whole_end, last = ranges[b, n, j]
            assert 0 <= first <= whole_first <= whole_end <= last <= 6
            assert not visits[:first].any() and not visits[last:].any() and whole[whole_first:whole_end].all()
            assert whole_end > whole_first or not whole.any()


# The calls that Mosaic supports.


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


def test_on_a_mesh_it_takes_the_part_of_a_device():
    mesh = jax.make_mesh((2, 1), ("data", "model"))
    seen = []

    def local(x):
        seen.append(explain("stick_breaking_attention", x, x, x, **MOSAIC_ONLY))
        return x

    with jax.sharding.set_mesh(mesh):
        x = jax.device_put(jnp.zeros((2, 104, 2, 64), jnp.bfloat16), jax.NamedSharding(mesh, jax.P("data")))
        assert "mosaic (128 x 64 tiles)" in explain("stick_breaking_attention", x, x, x, **MOSAIC_ONLY)
        jax.eval_shape(jax.shard_map(local, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False), x)
    assert "mosaic (128 x 64 tiles)" in seen[0]


def test_in_a_shard_map_over_some_axes_it_asks_for_all():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def local(x):
        assert "needs jax.shard_map over the mesh axes model;" in refusal(x, x, x)
        return x

    x = jax.ShapeDtypeStruct((2, 104, 2, 64), jnp.bfloat16)
    jax.eval_shape(
        jax.shard_map(local, mesh=mesh, axis_names={"data"}, in_specs=jax.P("data"), out_specs=jax.P("data")), x
    )


def test_elsewhere_it_says_why_not():
    x = jax.ShapeDtypeStruct((1, 104, 2, 64), jnp.bfloat16)
    token = platform._interpreted.set(False)
    try:
        assert "(128 x 64 tiles)" in explain("stick_breaking_attention", x, x, x)  # the GPU may be absent
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            assert "mosaic: needs compute capability 9.0, found cpu" in explain("stick_breaking_attention", x, x, x)
    finally:
        platform._interpreted.reset(token)


def test_the_interpreter_does_not_hang_for_want_of_threads(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda backend: 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(RuntimeError, match="4 CPU devices, found 2 cores, 1 devices; set"), platform.interpret():
        pass


def test_every_case_of_the_portable_list_is_taken_or_refused_with_a_reason():
    for name, case in STICK.items():
        reason = explain("stick_breaking_attention", *case.arrays("bfloat16"), **case.options())
        assert "mosaic" in reason, name
