"""Test how the PTX machine gets its input: program, parameters, tensor maps and barriers of each kernel of a function.

A stub replaces the execution of the kernels.
"""

import contextlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Stick
from jax._src.pallas.mosaic_gpu import lowering
from jax.experimental.mosaic.gpu.utils import DialectBarrierRef
from ptx import capture
from ptx.host import read_launch
from ptx.program import Program, TensorMap

from pallas_kernels import stick_breaking_attention

needs_wheels = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the CUDA wheels and no GPU: make test-ptx"
)
NOTHING = Program("nothing", "", (1, 1, 1), (128, 1, 1), 0, ())

# The launch has 5 x 2 blocks. Its parameters are array 1, the tensor map of a part of array 0, and array 2.
HOST = """
define void @kernel(ptr %0, ptr %1) {
  %3 = load ptr, ptr %1, align 8
  %4 = insertvalue { ptr, ptr, i64, [1 x i64] } undef, ptr %3, 1
  %5 = insertvalue { ptr, ptr, i64, [1 x i64] } %4, i64 24, 2
  %6 = getelementptr ptr, ptr %1, i32 1
  %7 = load ptr, ptr %6, align 8
  %8 = getelementptr ptr, ptr %1, i32 2
  %9 = load ptr, ptr %8, align 8
  %10 = alloca [128 x i8], i64 1, align 64
  %11 = extractvalue { ptr, ptr, i64, [1 x i64] } %5, 1
  %12 = extractvalue { ptr, ptr, i64, [1 x i64] } %5, 2
  %13 = mul i64 %12, 2
  %14 = ptrtoint ptr %11 to i64
  %15 = add i64 %14, %13
  %16 = inttoptr i64 %15 to ptr
  %17 = alloca i64, i64 2, align 8
  %18 = getelementptr inbounds nuw i64, ptr %17, i64 0
  store i64 40, ptr %18, align 4
  %19 = getelementptr inbounds nuw i64, ptr %17, i64 1
  store i64 64, ptr %19, align 4
  %20 = alloca i64, i64 2, align 8
  store i64 72, ptr %20, align 4
  %21 = getelementptr inbounds nuw i64, ptr %20, i64 1
  store i64 1, ptr %21, align 4
  %22 = alloca i64, i64 2, align 8
  store i64 8, ptr %22, align 4
  %23 = getelementptr inbounds nuw i64, ptr %22, i64 1
  store i64 32, ptr %23, align 4
  call void @mosaic_gpu_init_tma_desc(ptr %10, ptr %16, i64 7, i64 2, ptr %17, ptr %20, i64 64, ptr %22)
  %24 = load [128 x i8], ptr %10, align 1
  %25 = alloca { ptr, [128 x i8], ptr }, align 8
  %26 = alloca [3 x i64], align 8
  %27 = getelementptr { ptr, [128 x i8], ptr }, ptr %25, i32 0, i32 0
  store ptr %7, ptr %27, align 8
  store ptr %27, ptr %26, align 8
  %28 = getelementptr i64, ptr %26, i32 1
  store ptr %10, ptr %28, align 8
  %29 = getelementptr { ptr, [128 x i8], ptr }, ptr %25, i32 0, i32 2
  store ptr %9, ptr %29, align 8
  %30 = getelementptr i64, ptr %26, i32 2
  store ptr %29, ptr %30, align 8
  %31 = alloca [3 x i32], align 4
  store i32 0, ptr %31, align 4
  %32 = getelementptr i32, ptr %31, i32 1
  store i32 128, ptr %32, align 4
  %33 = getelementptr i32, ptr %31, i32 2
  store i32 0, ptr %33, align 4
  call void @mosaic_gpu_build_kernel_spec(ptr %0, i32 5, i32 2, i32 1, i32 0, i32 0, i32 0, i32 384, i32 1, i32 1, \
i32 1000, i32 0, i32 3, ptr %26, ptr %31)
  ret void
}
"""


def attention(case: Stick):
    return lambda *qkv: stick_breaking_attention(*qkv, implementation="mosaic", **case.options())[0]


def test_the_host_code_says_how_a_kernel_is_launched():
    inner = TensorMap(
        array=0, offset=48, itemsize=2, sizes=(64, 40), strides=(2, 144), box=(32, 8), swizzle=64
    )  # dimensions from the innermost to the outermost, strides in bytes
    assert read_launch(HOST) == ((5, 2, 1), (384, 1, 1), 1000, (1, (inner,), 2))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mul i64 %12, 2", "udiv i64 %12, 2", "unknown statement"),
        ("mosaic_gpu_init_tma_desc", "mosaic_gpu_init_tma_im2col_desc", "unknown call"),
        ("i32 0, i32 0, i32 0, i32 384", "i32 2, i32 1, i32 1, i32 384", "clusters"),
        ("store ptr %9, ptr %29", "store ptr %16, ptr %29", "no array"),
        ("call void @mosaic_gpu_build_kernel_spec", "; ", "launches nothing"),
    ],
)
def test_host_code_of_another_kind_is_an_error(old, new, message):
    assert old in HOST
    with pytest.raises(ValueError, match=message):
        read_launch(HOST.replace(old, new))


def test_kernels_get_the_arrays_of_the_function_and_their_results_go_on():
    """Two kernels of one function run one after the other, and the second gets the output of the first."""
    case, launches = Stick(T=70, N=1, H=32), []

    def launch(program, arrays):
        launches.append((program, [x.copy() for x in arrays]))
        query, key, value, *_, out, spent, reached = arrays
        out[...], spent[...], reached[...] = 2 * query, 0, 0

    def twice(query, key, value):
        run = attention(case)
        return run(run(query, key, value) + 1, key, value)

    qkv = case.arrays(jnp.bfloat16)
    out = capture.run(twice, *qkv, launch=launch, program_of=lambda module: NOTHING)
    query = np.asarray(qkv[0])
    np.testing.assert_array_equal(np.asarray(out), 2 * (2 * query + 1))
    (program, arrays), (_, second) = launches
    assert program._replace(barriers=()) == NOTHING
    for x, like in zip(arrays, qkv, strict=False):  # T = 70 is no multiple of 8: the arrays of the kernel have 72 rows
        np.testing.assert_array_equal(x[:, :70], np.asarray(like))
        assert x.shape[1] == 72 and x.dtype == jnp.bfloat16 and x.flags.writeable
    np.testing.assert_array_equal(second[0][:, :70], 2 * query + 1)
    assert all(np.isnan(np.float32(x)).all() for x in arrays[-3:-1]) and (arrays[-1] == 99).all()


def test_an_error_of_the_machine_is_raised_as_it_is():
    def launch(program, arrays):
        raise LookupError("no such instruction")

    with pytest.raises(LookupError, match="no such instruction"):
        capture.run(
            attention(Stick()), *Stick(T=8, H=32).arrays(jnp.bfloat16), launch=launch, program_of=lambda _: NOTHING
        )


def test_an_error_of_the_machine_comes_before_what_follows_from_it():
    def launch(program, arrays):
        raise LookupError("no such instruction")

    with (
        pytest.raises(LookupError, match="no such instruction"),
        capture.kernels_launched_by(launch, lambda module: NOTHING),
    ):
        out = jax.jit(attention(Stick()))(*Stick(T=8, H=32).arrays(jnp.bfloat16))
        assert np.isfinite(np.float32(out)).all()


def test_barriers_have_names_in_the_order_in_which_they_are_initialised(monkeypatch):
    """Each barrier gets its right name, also if two barriers are of one type and Mosaic initialises them together.

    With two warpgroups, the barriers `used` and `full` expect the same number of arrivals, so their types are equal.
    """
    initialised, handed_out = [], []
    initialize, reserve = DialectBarrierRef.initialize, lowering.ModuleContext.reserve_barrier

    def recorded(*args, **options):
        initialised.append(initialize(*args, **options))
        return initialised[-1]

    @contextlib.contextmanager
    def reserved(self, barrier):
        with reserve(self, barrier) as reference:
            handed_out.append(reference)
            yield reference

    monkeypatch.setattr(DialectBarrierRef, "initialize", recorded)
    monkeypatch.setattr(lowering.ModuleContext, "reserve_barrier", reserved)
    with capture.kernels_launched_by(lambda *_: None, lambda module: NOTHING) as found:
        jax.jit(attention(Stick())).trace(*Stick(T=136, N=2, H=64).arrays(jnp.bfloat16)).lower()
    names = found[0].barriers
    # The barriers are handed out in the order in which the kernel declares them.
    declared = ["scratch.loaded", "scratch.ring.full", "scratch.ring.used"]
    of = dict(zip(map(id, handed_out), declared, strict=True))
    expected = [f"{of[id(x)]}[{i}]" for x in initialised for i in range(x.barrier_ref.num_barriers)]
    assert len(initialised) == 3 and list(names) == expected


@needs_wheels
def test_the_launch_of_the_forward_kernel_is_that_of_its_arrays():
    T, N, H = 136, 2, 64
    (program,) = capture.programs(attention(Stick()), *Stick(T=T, N=N, H=H).arrays(jnp.bfloat16))
    assert program.name == "stick_breaking_forward_mosaic_gpu_kernel"
    # There are 2 heads with 2 blocks each. A block has 2 warpgroups for 64 rows each, and one that copies.
    assert (program.grid, program.block) == ((4, 1, 1), (384, 1, 1))
    header, body = program.ptx.split(")", 1)
    assert header.count(".param") == len(program.parameters) and body.count("mbarrier.init") == len(program.barriers)
    *pointers, maps = program.parameters
    # Pointers to scale, ranges, offset and the two small outputs; query, key, value (0 to 2) and the output (6) have
    # tensor maps.
    assert sorted(pointers) == [3, 4, 5, 7, 8] and [x.array for x in maps] == [1, 2, 0, 6]
    tiles_of_8_rows = TensorMap(
        array=0, offset=0, itemsize=2, sizes=(H, 8, T // 8, N), strides=(2, 2 * N * H, 16 * N * H, 2 * H),
        box=(64, 8, 8, 1), swizzle=128,
    )  # fmt: skip
    assert all(x == tiles_of_8_rows._replace(array=x.array) for x in maps)
    # Shared memory holds the query rows of two warpgroups, and four stages of keys and values.
    assert program.shared >= 2 * (2 * 64 * H + 4 * 2 * 64 * H)
