"""Test the Mosaic and Triton kernels of the experts in interpreters, against a NumPy loop over the experts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EXPERTS, KERNEL_EXPERTS, Experts
from conftest import GRADIENT, assert_close
from jax import lax
from test_scatter_moe import ACTIVATIONS, QUICK, check_linear, check_mlp, mlp_inputs, run_mlp

from pallas_kernels import expert_mlp, explain, platform, route, triton_call
from pallas_kernels.scatter_moe import mosaic_float32, tasks, triton_sizes

needs_triton = pytest.mark.skipif(
    not triton_call.is_installed(), reason="needs triton and jax-triton, and no GPU: pip install 'stickjax[triton]'"
)


# `make test-ptx` executes the compiled kernels of Mosaic on all of these calls (test_ptx_calls.py), and is faster than
# the interpreter. So `make test` interprets only some calls.
INTERPRETED = "odd", "one-token", "no-tokens"
EXHAUSTIVE = {
    "test_mlp_is_the_loop_over_experts": lambda kernels, name: kernels == "mosaic" and name not in INTERPRETED,
    "test_float32_is_not_rounded": lambda kernels: kernels == "mosaic",
    "test_linear_in_every_order": lambda kernels, rows_in, rows_out: (
        kernels == "mosaic" and (rows_in, rows_out) != ("sorted", "token")  # test_odd_sizes.py has the opposite
    ),
    "test_tiles_hold_every_row_once_and_one_expert_each": lambda name, M: (
        name not in (("skewed", "all-idle") if M == 64 else ("odd", "many-experts", "some-idle"))
    ),
}


@pytest.fixture
def mosaic(monkeypatch):
    # So few multiprocessors that each of them computes several tiles.
    monkeypatch.setattr("pallas_kernels.platform.multiprocessors", lambda: 2)
    with platform.interpret(detect_races=True):  # a race raises
        yield "mosaic"


@pytest.fixture
def triton():
    with triton_call.interpret():
        yield "triton"


@pytest.fixture(params=["mosaic", pytest.param("triton", marks=needs_triton)])
def kernels(request):
    """Return the name of an implementation, mosaic or triton, whose kernels run in an interpreter during the test."""
    return request.getfixturevalue(request.param)


# Two cases use activations without a gate, in float16. Other activations are tested in test_every_activation,
# test_scatter_moe.py and test_absent_gpu.py.
OTHERS = {"one-token": ("gelu", "float16"), "all-chosen": ("relu2", "float16")}


@pytest.mark.parametrize("name", KERNEL_EXPERTS)
def test_mlp_is_the_loop_over_experts(name, kernels):
    check_mlp(KERNEL_EXPERTS[name], kernels, *OTHERS.get(name, ("swiglu", "bfloat16")))


def test_float32_is_not_rounded(kernels):
    """With float32 inputs, the errors of the kernels are within the tolerance of float32.

    If just one of the matrix products were computed in bfloat16 or tf32, the error would be a hundred times larger.
    """
    check_mlp(Experts(T=30, D=40, F=36, share=0.3, idle=0.5), kernels, dtype="float32")


@pytest.mark.parametrize("rows_in", ["token", "pair", "sorted"])
@pytest.mark.parametrize("rows_out", ["token", "pair", "sorted"])
def test_linear_in_every_order(rows_in, rows_out, kernels):
    check_linear(KERNEL_EXPERTS["some-idle"], rows_in, rows_out, kernels, "bfloat16")


def test_rows_that_no_expert_reads_may_hold_anything_and_two_runs_are_equal(kernels):
    """Rows of tokens without an expert have no effect, even if they contain NaN, and results are reproducible.

    Two runs, one with NaN and infinity in these rows, give bitwise equal results.
    """
    case = KERNEL_EXPERTS["odd"]
    *inputs, d_out = mlp_inputs(case, "swiglu", "bfloat16")
    indices = case.indices()
    indices[1::3] = case.E
    poisoned = [inputs[0].at[1::3].set(jnp.nan).at[1].set(jnp.inf), *inputs[1:]]
    clean, again = (run_mlp(x, indices, d_out, case.E, "swiglu", kernels) for x in (inputs, poisoned))
    chex.assert_trees_all_equal(again, clean)


# Mosaic only.


def test_the_parts_of_a_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32).at[:4].set([jnp.inf, -3e38, 0, 1e-30])
    parts = jax.jit(mosaic_float32.split)(x)
    assert all(part.dtype == jnp.bfloat16 for part in parts)
    assert [float(part[0]) for part in parts] == [np.inf, 0, 0]
    total = sum(np.asarray(part, np.float64) for part in parts)
    np.testing.assert_array_equal(total[1:], x[1:])  # three parts of 8 bits hold all 24 bits


# Triton only.


@needs_triton
@pytest.mark.parametrize("name", EXPERTS)
def test_triton_in_float32(name, triton):
    check_mlp(EXPERTS[name], triton)


@needs_triton
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_has_every_activation(activation, triton):
    check_mlp(EXPERTS["odd"], triton, activation)


@needs_triton
@pytest.mark.parametrize("rows_in", ["token", "pair", "sorted"])
def test_gates_of_a_linear_map_to_float32(rows_in, triton):
    """Triton's expert_linear computes correct gradients of gates and rows in float32, for every order of input rows.

    A single grouped GEMM computes both gradients. Some rows have no expert and must not be read.
    """
    check_linear(EXPERTS["some-idle"], rows_in, "token", triton)


@needs_triton
def test_triton_keeps_its_inputs_and_the_pre_activation(triton):
    T, k, E, D, F = 6, 2, 3, 8, 20
    shapes = (T, D), (E, D, 2 * F), (E, F, D), (T, k)
    routing = route(Experts(T=T, E=E).indices(), E)

    def vjp(x, w_in, w_out, gates):
        return jax.vjp(lambda *xs: expert_mlp(*xs[:3], routing, xs[3], implementation=triton), x, w_in, w_out, gates)[1]

    kept = jax.tree.leaves(jax.eval_shape(vjp, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)))
    assert {x.shape for x in kept if x.dtype == jnp.float32} == {*shapes, (T * k, 2 * F)}


@needs_triton
def test_columns_in_pieces(triton, monkeypatch):
    """The output of the experts is correct if the op computes one group of columns after the other.

    The op uses groups of columns if the outputs of all (token, choice) pairs take more than `fused.UNCOMBINED` bytes.
    The test sets this limit to 1 byte.
    """
    monkeypatch.setattr("pallas_kernels.scatter_moe.fused.UNCOMBINED", 1)
    check_mlp(Experts(T=3, k=1, E=2, D=300, F=20), triton, "gelu")


@needs_triton
def test_under_transformations(triton):
    """The gradients under vmap, and under scan with checkpoint, equal the gradients of separate calls.

    Each transformation maps over the leading axis of all arguments, including the expert indices.
    """
    case = Experts(T=5, E=4, share=0.5)
    indices = jnp.stack([case.indices(seed) for seed in range(2)])
    inputs = [jnp.stack([x, 0.5 * x]) for x in mlp_inputs(case, "swiglu")[:4]]

    def one(x, w_in, w_out, gates, indices):
        return expert_mlp(x, w_in, w_out, route(indices, 4), gates, implementation=triton)

    def total(function):
        loss = lambda *inputs: jnp.sin(function(*inputs, indices)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2, 3)), compiler_options=QUICK)(*inputs)

    wanted = total(lambda *xs: jnp.stack([one(*[x[i] for x in xs]) for i in range(2)]))
    for transformed in (
        jax.vmap(one),
        lambda *xs: lax.scan(lambda carry, x: (carry, jax.checkpoint(one)(*x)), None, xs)[1],
    ):
        for value, want in zip(total(transformed), wanted, strict=True):
            assert_close(value, want, GRADIENT["float32"])


@needs_triton
def test_explain_says_the_tiles(triton):
    inputs = mlp_inputs(Experts(T=300, E=2, D=40, F=24), "swiglu", "bfloat16")[:4]
    said = explain("expert_mlp", *inputs[:3], route(np.zeros((300, 2), np.int32), 2), inputs[3], implementation=triton)
    assert said == "expert_mlp: triton (128 x 64 tiles), asked for"


@pytest.mark.parametrize("memory", [99, 163, 227])  # KiB of sm_120, sm_80 and sm_90
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_of_triton_fit_every_gpu(memory, dtype, monkeypatch):
    monkeypatch.setattr(triton_call, "shared_memory", lambda: memory * 1024)
    bytes_of = jnp.dtype(dtype).itemsize
    for R, E, D, F in ((1, 1, 1, 1), (8, 40, 1536, 512), (1000, 9, 200, 300), (2**19, 40, 1536, 512)):
        M = triton_sizes.rows_of_tile(R, E, dtype)
        every = [triton_sizes.product_sizes(M, D, F, dtype, products=n, widest=128 * n) for n in (1, 2)]
        every += [triton_sizes.product_sizes(M, D, F, dtype), triton_sizes.weight_sizes(D, F, dtype)]
        for products, s in zip((1, 2, 1, 1), every, strict=True):
            assert all(n & (n - 1) == 0 for n in s[:4]) and min(s[:3]) >= 16
            stages = s.stages // (2 if s is every[-1] else 1)
            assert stages >= 2 and (s.rows + products * s.columns) * s.depth * bytes_of * stages <= memory * 1024


# The work list.


@pytest.mark.parametrize("M", [4, 64])
@pytest.mark.parametrize("name", EXPERTS)
def test_tiles_hold_every_row_once_and_one_expert_each(name, M):
    case = EXPERTS[name]
    if not case.T:
        return
    indices = case.indices()
    routing = route(indices, case.E)
    work = jax.tree.map(np.asarray, jax.jit(lambda: tasks.make_tasks(routing, M))())
    pairs, position = work.pairs.reshape(-1, M), work.sorted.reshape(-1, M)
    flat, count = indices.reshape(-1), int(work.count[0])
    for tile, (expert, s) in enumerate(zip(work.expert, pairs, strict=True)):
        assert (s[s >= 0].size > 0) == (tile < count)
        assert (flat[s[s >= 0]] == expert).all()
    np.testing.assert_array_equal(np.sort(pairs[pairs >= 0]), np.arange(case.rows))
    np.testing.assert_array_equal(position[position >= 0], np.arange(case.rows))
    np.testing.assert_array_equal(work.pairs[work.tile_row], np.arange(case.rows))
    np.testing.assert_array_equal(work.rows, np.bincount(flat, minlength=case.E + 1)[: case.E])
    for e in range(case.E):
        assert work.rows[e] == 0 or work.expert[work.first[e]] == e
        assert e == 0 or work.first[e] == work.first[e - 1] + -(-work.rows[e - 1] // M)
