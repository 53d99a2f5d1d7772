"""The expert products for Hopper GPUs, in the interpreter with race detection, against the loop over experts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EXPERTS, MOSAIC_EXPERTS, Experts
from test_scatter_moe import check_linear, check_mlp, mlp_inputs, run_mlp

from pallas_kernels import route, seam
from pallas_kernels.scatter_moe import mosaic_float32, tasks


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    # So few that each takes several tiles.
    monkeypatch.setattr("pallas_kernels.scatter_moe.mosaic_pipeline.MULTIPROCESSORS", 2)
    with seam.interpret(detect_races=True):  # a race raises
        yield


# Two without a gate, in float16; the other activations: test_scatter_moe.py, test_absent_gpu.py.
OTHERS = {"one-token": ("gelu", "float16"), "all-chosen": ("relu2", "float16")}


@pytest.mark.parametrize("name", MOSAIC_EXPERTS)
def test_mlp_is_the_loop_over_experts(name):
    check_mlp(MOSAIC_EXPERTS[name], "mosaic", *OTHERS.get(name, ("swiglu", "bfloat16")))


def test_float32_is_three_products_of_bfloat16():
    """To the bounds of float32, which one product would miss by a hundred times."""
    check_mlp(Experts(T=30, D=40, F=36, share=0.3, idle=0.5), "mosaic", dtype="float32")


def test_the_parts_of_a_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32).at[:4].set([jnp.inf, -3e38, 0, 1e-30])
    hi, lo = jax.jit(mosaic_float32.split)(x)
    assert hi.dtype == lo.dtype == jnp.bfloat16 and hi[0] == jnp.inf and lo[0] == 0
    total = np.asarray(hi, np.float64) + np.asarray(lo, np.float64)
    assert (np.abs(total - x)[1:] <= 2**-16.9 * np.abs(x)[1:]).all()


@pytest.mark.parametrize("rows_in", ["token", "slot", "sorted"])
@pytest.mark.parametrize("rows_out", ["token", "slot", "sorted"])
def test_linear_in_every_order(rows_in, rows_out):
    check_linear(MOSAIC_EXPERTS["some-idle"], rows_in, rows_out, "mosaic", "bfloat16")


def test_rows_that_no_expert_reads_may_hold_anything_and_two_runs_are_equal():
    """To the bit, so that the run on other rows is the second run."""
    case = Experts(T=40, E=3)
    *inputs, d_out = mlp_inputs(case, "swiglu", "bfloat16")
    indices = case.indices()
    indices[1::3] = case.E
    poisoned = [inputs[0].at[1::3].set(jnp.nan).at[1].set(jnp.inf), *inputs[1:]]
    clean, again = (run_mlp(x, indices, d_out, case.E, "swiglu", "mosaic") for x in (inputs, poisoned))
    chex.assert_trees_all_equal(again, clean)


# The work list.


@pytest.mark.parametrize("M", [4, 64])
@pytest.mark.parametrize("name", EXPERTS)
def test_tiles_hold_every_row_once_and_one_expert_each(name, M):
    case = EXPERTS[name]
    if not case.T:
        return
    indices = case.indices()
    routing = route(indices, case.E)
    work = jax.tree.map(np.asarray, jax.jit(lambda: tasks.tasks(routing, M))())
    slots, position = work.slots.reshape(-1, M), work.sorted.reshape(-1, M)
    flat, count = indices.reshape(-1), int(work.count[0])
    for tile, (expert, s) in enumerate(zip(work.expert, slots, strict=True)):
        assert (s[s >= 0].size > 0) == (tile < count)
        assert (flat[s[s >= 0]] == expert).all()
    np.testing.assert_array_equal(np.sort(slots[slots >= 0]), np.arange(case.rows))
    np.testing.assert_array_equal(position[position >= 0], np.arange(case.rows))
    np.testing.assert_array_equal(work.slots[work.place], np.arange(case.rows))
    np.testing.assert_array_equal(work.rows, np.bincount(flat, minlength=case.E + 1)[: case.E])
    for e in range(case.E):
        assert work.rows[e] == 0 or work.expert[work.first[e]] == e
        assert e == 0 or work.first[e] == work.first[e - 1] + -(-work.rows[e - 1] // M)
