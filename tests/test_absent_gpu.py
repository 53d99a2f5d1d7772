"""Test the Mosaic kernels, compiled for an H200 that is not present.

Their machine code has no atomics and spills no registers. A lower bound on the time comes from a count of its
instructions.
"""

import importlib.util
import io
import json

import pytest
from rich.console import Console

from benchmarks import absent_gpu, sass
from benchmarks.absent_kernels import KERNELS, MEMORY, WIDTHS, stick_breaking

needs_wheels = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the CUDA wheels and no GPU: make test-absent",
)

# A kernel with an outer loop (0x10), an inner loop with a product (0x30), a wait for a barrier (0x80), a final trap.
LISTING = """
.L_x_0:
        /*0010*/                   MOV R1, R2 ;                            /* 0x0 */
                                                                           /* 0x1 */
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0040*/                   MUFU.EX2 R3, R4 ;
        /*0050*/             @!UP1 FFMA.FTZ R3, R4, R5, R6 ;
        /*0060*/                   SHFL.BFLY PT, R5, R3, 0x1, 0x1f ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3 ;
        /*0090*/              @!P0 BRA `(.L_x_2) ;
        /*00a0*/                   ATOMG.E.ADD.STRONG.GPU PT, R3, [R2.64], R3 ;
        /*00b0*/               @P2 BRA `(.L_x_0) ;
.L_x_3:
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""


def test_a_listing_is_read():
    instructions, labels = sass.read(LISTING)
    assert labels == {".L_x_0": 0x10, ".L_x_1": 0x30, ".L_x_2": 0x80, ".L_x_3": 0xC0, ".L_x_4": 0xD0}
    assert [i.address for i in instructions] == list(range(0x10, 0xE0, 0x10))
    assert instructions[2] == (0x30, "HGMMA", ".64x64x16.F32.BF16", "R24, gdesc[UR4], RZ, !UPT ")
    assert instructions[4][1:3] == ("FFMA", ".FTZ")
    assert [i.op for i in instructions if i.op in sass.ATOMICS] == ["ATOMG"]


def test_only_the_innermost_loop_that_works_is_found():
    (loop,) = sass.find_loops(LISTING)
    assert (loop.start, loop.instructions, loop.special, loop.fp32, loop.shuffles) == (0x30, 5, 1, 1, 1)
    assert loop.products == {"64x64x16": 1} and loop.flops == 2 * 64 * 64 * 16
    # 128 threads on 16 lanes; five instructions of four warps on four schedulers; 4096 operations per clock cycle.
    assert loop.cycles == {"special": 8, "issue": 5, "tensor": 32} and loop.bound == "tensor"


def test_a_loop_with_products_counts_with_a_search_inside_it():
    """`find_loops` returns an outer loop with a matrix product as well as the loop inside it.

    In the listing, the outer loop starts at 0x10. The inner loop, without a product, starts at 0x20.
    """
    nested = """
.L_x_0:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
.L_x_1:
        /*0020*/                   MUFU.EX2 R3, R4 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/               @P2 BRA `(.L_x_0) ;
"""
    assert [(x.start, x.instructions, bool(x.products)) for x in sass.find_loops(nested)] == [
        (0x10, 4, True),
        (0x20, 2, False),
    ]


def test_a_wait_that_goes_on_below_the_code_is_no_loop():
    below = """
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0030*/                   MUFU.EX2 R3, R4 ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R3 ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/                   BRA `(.L_x_1) ;
"""
    assert sass.find_loops(below) == []


def test_usage_takes_the_last_word():
    log = """ptxas         .     48 bytes stack frame, 64 bytes spill stores, 116 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 17 bytes smem
info    : used 162 registers, used 16 barriers, 48 stack, 1025 bytes smem"""
    usage = dict(registers=162, stack=48, spill_stores=64, spill_loads=116, static_shared=1025)
    assert absent_gpu._usage(log) == usage


def test_bound_by_hand():
    """At 1.755 GHz, 132 multiprocessors take 1 ms for 1e6 iterations in total, of 231.66 cycles each."""
    assert absent_gpu.milliseconds(231.66, 10**6) == pytest.approx(1)


def test_tiles_by_hand():
    """The iterations of the kernels' main loops equal a count by hand for T=512, which is eight tiles of 64 queries.

    Of the 64 x 64 tiles of scores, 8 are on the diagonal and need a mask; 28 are left of it and need none. The gradient
    kernel of keys and values takes query tiles in pairs. For key tiles 0 to 7, it needs no mask for 3, 3, 2, 2, 1, 1, 0
    and 0 pairs.
    """
    small = dict(B=1, T=512, N=1, H=64)
    assert stick_breaking(**small).tiles == (8, 28, 0)
    assert stick_breaking(**small, backward=True).tiles == (12, 8, 12, 8, 0, 28, 8, 8, 28, 0)
    # Two documents of four tiles each have 1 1 0 0 such pairs.
    assert stick_breaking(**small, backward=True, document=256).tiles == (4, 8, 4, 8, 0, 12, 8, 8, 12, 0)


@pytest.fixture(scope="module")
def compiled():
    return absent_gpu.compile_all(KERNELS)


@needs_wheels
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(compiled, name):
    tiles, _, machines = compiled[name]
    assert machines and absent_gpu.bound(machines, tiles) > 0
    for m in machines:
        assert not m.atomics and not m.sharing, f"{m.name}: {m.atomics} {m.sharing}"
        # A block has 227 KiB. `alone` does not count the 1 KiB that the system reserves, the linker does.
        assert m.alone["static_shared"] + m.dynamic_shared <= 227 * 1024


@needs_wheels
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "softmax_mosaic"])
def test_nothing_spills(compiled, name):
    _, scores, machines = compiled[name]
    for m in machines:
        assert (m.spill_stores, m.spill_loads, m.stack) == (0, 0, 0), m.name
        if (name, m.name) != ("experts_odd", "expert_activated_0"):  # spills 8 bytes, but only without the linker
            assert (m.alone["spill_stores"], m.alone["spill_loads"]) == (0, 0), m.name
        if m.name.startswith("stick_breaking_forward"):
            assert max(x.special for x in m.main_loops) <= 2.1 * scores


@pytest.fixture(scope="module")
def compiled_widths():
    return absent_gpu.compile_all(WIDTHS)


@needs_wheels
@pytest.mark.parametrize("name", WIDTHS)
def test_every_width_that_mosaic_takes_compiles_without_a_spill(compiled_widths, name):
    """For every supported width, the kernels of the forward and the backward pass compile without register spills.

    The call has packed documents, a window, early exit and attend_current.
    """
    machines = compiled_widths[name].machines
    assert len(machines) == 3
    for m in machines:
        assert (m.spill_stores, m.spill_loads, m.stack) == (0, 0, 0), m.name
        assert (m.alone["spill_stores"], m.alone["spill_loads"]) == (0, 0), m.name
        assert not [x for x in m.warnings if "wgmma" in x], m.warnings


@needs_wheels
def test_forward_bound(compiled):
    """The lower bound on the forward pass at B=4, T=4096, N=12, H=128 on an H200 is at most 0.32 ms.

    The bound is computed from the instructions of the compiled main loops.
    """
    tiles, _, machines = compiled["stick_breaking"]
    assert absent_gpu.bound(machines, tiles) <= 0.32


@needs_wheels
def test_products_of_experts_are_bound_by_the_tensor_cores(compiled):
    _, _, machines = compiled["experts_powermoe_3b"]
    assert all(loop.bound == "tensor" for m in machines for loop in m.main_loops)


@needs_wheels
@pytest.mark.parametrize("name", MEMORY)
def test_memory(name):
    kernel, most = MEMORY[name]
    assert absent_gpu.temporaries(kernel()) <= most


@needs_wheels
def test_table_and_json(compiled, tmp_path):
    console = Console(width=160, record=True, file=io.StringIO())
    absent_gpu.print_table(compiled, console)
    absent_gpu.write_json(tmp_path / "h200.json", compiled)
    text, info = console.export_text(), json.loads((tmp_path / "h200.json").read_text())
    assert all(name in text for name in KERNELS) and info.keys() >= KERNELS.keys()
    assert info["stick_breaking"]["kernels"][0]["alone"]["spill_loads"] == 0
