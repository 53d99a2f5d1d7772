"""Compile the Triton kernels for GPUs that are not present, and check the compiled programs.

No kernel needs more shared memory than its GPU has. No kernel spills more registers than in the recorded table. No
kernel has an instruction by which a thread block could wait for another one, or add to its results.
"""

import importlib.util
import io
import json

import pytest
from rich.console import Console

from benchmarks import absent_triton
from pallas_kernels import triton_call

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or not triton_call.is_installed(),
    reason="needs the CUDA wheels and no GPU: make test-absent",
)
KEPT = json.loads(absent_triton.RESULT.read_text())["kernels"]
ATTENTION = {"forward", "d_query", "d_key_value"}
EXPERTS = {"activated", "product", "d_activated", "d_weights"}
NAMES = {
    "stick_breaking_decode": {"forward"},
    "experts_odd": EXPERTS | {"d_bias"},
    "experts_decode": {"activated", "product"},
    "expert_heads": EXPERTS - {"activated"},
    "expert_heads_float32": EXPERTS - {"activated"},
}


@pytest.fixture(scope="module")
def compiled():
    return absent_triton.compile_all(absent_triton.CASES)


@pytest.mark.parametrize("name", absent_triton.CASES)
def test_compiles(compiled, name):
    case = absent_triton.CASES[name]()
    kernels = {u.name for u in compiled[name]}
    assert kernels == NAMES.get(name, ATTENTION if name.startswith("stick") else EXPERTS)
    for usage in compiled[name]:
        assert absent_triton.CHIPS[usage.target] == case.chip
        most = triton_call.SHARED_MEMORY.get(int(usage.target.removeprefix("sm_")), 99 * 1024)
        assert usage.shared <= most and not usage.sharing, usage
        if name.startswith("expert") and usage.name != "d_bias":
            assert usage.copies and (usage.products > 0) == ("float32" not in name), usage
    # No thread may spill more than in the table. Two sums of 128 columns in fp32 and the scores need slightly more
    # registers than a thread has. Expert rows that cannot be copied 16 bytes at a time need a register for every few
    # elements.
    for usage, before in zip(compiled[name], KEPT[name], strict=True):
        assert usage.spill_stores <= before["spill_stores"] and usage.spill_loads <= before["spill_loads"], usage


def test_the_kept_table_has_every_case():
    assert list(KEPT) == list(absent_triton.CASES)


def test_table(compiled):
    console = Console(width=160, record=True, file=io.StringIO())
    absent_triton.print_table(compiled, console)
    text = console.export_text()
    assert all(name in text for name in absent_triton.CASES)
