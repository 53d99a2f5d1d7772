"""The expert products for Hopper GPUs, in the interpreter with race detection, against the loop over experts."""

import pytest
from cases import MOSAIC_EXPERTS, Experts
from test_scatter_moe import check_linear, check_mlp

from pallas_kernels import seam


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    # So few that each takes several tiles.
    monkeypatch.setattr("pallas_kernels.scatter_moe.mosaic_pipeline.MULTIPROCESSORS", 2)
    with seam.interpret(detect_races=True):  # a race raises
        yield


@pytest.mark.parametrize("name", MOSAIC_EXPERTS)
def test_mlp_is_the_loop_over_experts(name):
    check_mlp(MOSAIC_EXPERTS[name], "mosaic", dtype="bfloat16")


@pytest.mark.parametrize("activation", ["gelu", "relu2"])  # the others: test_scatter_moe.py, test_absent_gpu.py
def test_activations_without_a_gate(activation):
    check_mlp(Experts(T=5, E=3), "mosaic", activation, "float16")


def test_many_experts():
    check_linear(Experts(T=6, E=128), "token", "sorted", "mosaic", "bfloat16")


@pytest.mark.parametrize("rows_in", ["token", "slot", "sorted"])
@pytest.mark.parametrize("rows_out", ["token", "slot", "sorted"])
def test_linear_in_every_order(rows_in, rows_out):
    check_linear(MOSAIC_EXPERTS["some-idle"], rows_in, rows_out, "mosaic", "bfloat16")
