"""The Triton kernels, compiled for five GPUs that are not there: tensor cores, copies ahead, no atomics, no spills."""

import importlib.util
import io

import pytest
from rich.console import Console

from benchmarks import absent_triton
from benchmarks.absent_triton import CHIPS, KERNELS
from pallas_kernels import triton_call

needs_wheels = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or not triton_call.is_installed(),
    reason="needs the CUDA wheels and no GPU: make test-absent",
)


@pytest.fixture(scope="module")
def compiled():
    return absent_triton.compile_all(KERNELS, CHIPS)


@needs_wheels
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(compiled, name, chip):
    machines = compiled[name, chip]
    limit = {"a100-80": 163, "h200": 227, "b200": 227}.get(chip, 99) * 1024
    assert machines
    for m in machines:
        assert not m.sharing, f"{m.name}: {m.sharing}"
        assert m.shared <= limit
        if m.name != "d_bias":
            assert m.copies and (m.products > 0) == ("float32" not in name), m
        if name != "experts_odd":  # rows of which no 16 bytes can be copied at once take more registers
            assert (m.spill_stores, m.spill_loads) == (0, 0), m


@needs_wheels
def test_table(compiled):
    console = Console(width=160, record=True, file=io.StringIO())
    absent_triton.print_table(compiled, console)
    text = console.export_text()
    assert all(name in text for name in (*KERNELS, *CHIPS))
