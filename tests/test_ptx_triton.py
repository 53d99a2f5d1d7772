"""Test compiled Triton kernels in the PTX machine: how they are launched, and that their results are correct."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNEL_CASES, KERNEL_EXPERTS, Stick

from pallas_kernels import stick_breaking_attention, triton_call

pytestmark = pytest.mark.skipif(
    not triton_call.is_installed() or triton_call.is_interpreted(),
    reason="needs triton and jax-triton, and a process that interprets no Triton kernel: make test-ptx",
)
CASE = Stick(T=100, N=4, K=2, H=32, Hv=64)


def attention(*qkv):
    return stick_breaking_attention(*qkv, implementation="triton")[0]


@pytest.mark.parametrize(("device", "target"), [("NVIDIA A100", "sm_80"), ("NVIDIA H200", "sm_90a")])
def test_a_kernel_is_launched_with_its_arrays_and_then_its_outputs(device, target):
    from ptx import capture_triton

    launches = []

    def launch(program, arrays):
        launches.append((program, [x.copy() for x in arrays]))
        for x in arrays[-3:]:
            assert np.isnan(np.float32(x)).all() or (x == 99).all()
            x[...] = 7

    qkv = CASE.arrays(jnp.bfloat16)
    out = capture_triton.run(attention, *qkv, launch=launch, device=device)
    assert out.shape == (1, 100, 4, 64) and (out == 7).all()
    ((program, arrays),) = launches
    for x, like in zip(arrays, qkv, strict=False):
        np.testing.assert_array_equal(x, np.asarray(like))
    assert program.name == "forward" and f".target {target}" in program.ptx
    # The parameters are all arrays and two pointers that Triton adds. A block has 64 rows of one head and four warps.
    assert program.parameters == (*range(len(arrays)), bytes(8), bytes(8))
    assert program.ptx[: program.ptx.index(")")].count(".param") == len(program.parameters)
    assert program.grid == (8, 1, 1) and program.block == (128, 1, 1) and program.shared > 0


def test_the_kernels_of_a_function_and_of_its_derivative():
    import jax
    from ptx import capture_triton

    def backward(*qkv):
        out, vjp = jax.vjp(attention, *qkv)
        return vjp(out)

    names = [program.name for program in capture_triton.programs(backward, *CASE.arrays(jnp.bfloat16))]
    assert names == ["forward", "d_query", "d_key_value"]


@pytest.mark.parametrize(
    ("device", "name", "dtype"),
    [
        ("NVIDIA A100", "grouped", "bfloat16"),
        ("NVIDIA L40S", "saturated", "float16"),
        ("NVIDIA H200", "everything", "bfloat16"),
        ("NVIDIA A100", "wide-256", "bfloat16"),  # eight warps on 64 rows: pairs of warps write the same
        ("NVIDIA A100", "odd-widths", "bfloat16"),
    ],
)
def test_the_compiled_kernels_agree_with_the_reference(device, name, dtype):
    from ptx import capture_triton
    from test_kernels import compare, run
    from test_stick_breaking import expected

    case = KERNEL_CASES[name]
    with capture_triton.kernels_launched_by(capture_triton.launch, device) as programs:
        values = run("triton", case, dtype)
    assert {program.name for program in programs} == {"forward", "d_query", "d_key_value"}
    compare(values, expected(case, dtype, False), dtype)


@pytest.mark.parametrize("name", [name for name, case in KERNEL_EXPERTS.items() if case.T])
def test_the_compiled_products_of_experts_are_the_loop_over_experts(name):
    from ptx import capture_triton
    from test_scatter_moe import check_mlp

    with capture_triton.kernels_launched_by(capture_triton.launch):
        check_mlp(KERNEL_EXPERTS[name], "triton", "swiglu", "bfloat16")
