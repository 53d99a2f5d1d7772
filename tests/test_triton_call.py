"""`triton_call.launch` runs a Triton kernel in the interpreter and compiles it for an absent GPU.

Where a kernel cannot run, an error says why.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platform, triton_call

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(not triton_call.is_installed(), reason="needs triton and jax-triton, and no GPU")
needs_wheels = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the CUDA wheels and no GPU: make test-absent"
)


def kernel():
    from triton_add import add

    return add


def add(x, y, block=8):
    grid = (-(-x.size // block),)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return triton_call.launch(kernel, x, y, out=out, grid=grid, num_warps=1, num_stages=1, size=x.size, block=block)


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32"])
def test_a_kernel_runs_in_the_interpreter(dtype):
    x, y = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (2, 3, 13)), dtype)
    with triton_call.interpret():
        np.testing.assert_array_equal(jax.jit(jax.vmap(add))(x, y), x + y)
        np.testing.assert_array_equal(add(x[0], y[0]), x[0] + y[0])


@needs_triton
def test_what_a_kernel_does_not_write_is_no_result():
    x = jnp.ones(13)
    out = jax.ShapeDtypeStruct((16,), x.dtype)
    with triton_call.interpret():
        y = triton_call.launch(kernel, x, x, out=out, grid=(2,), num_warps=1, num_stages=1, size=13, block=8)
    assert (y[:13] == 2).all() and jnp.isnan(y[13:]).all()


def round_by(name: str, *arrays, out):
    """Run kernel `name` of triton_round.py in the interpreter, in one thread block; return its output."""

    def kernel():
        import triton_round

        return getattr(triton_round, name)

    with triton_call.interpret():
        size = arrays[0].shape[0]
        return triton_call.launch(kernel, *arrays, out=out, grid=(1,), num_warps=1, num_stages=1, size=size)


@needs_triton
def test_a_cast_to_bfloat16_rounds_to_the_nearest():
    special = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, 3e38, 3.4e38, 1e-40, np.inf, np.nan]
    x = jnp.concatenate([jnp.asarray(special), jax.random.normal(jax.random.key(0), (54,))])
    got = round_by("to_bfloat16_and_back", x, out=x)
    np.testing.assert_array_equal(got, x.astype(jnp.bfloat16).astype(jnp.float32))


@needs_triton
def test_a_product_takes_what_was_rounded_to_the_type_of_the_other_side():
    x, y = jax.random.normal(jax.random.key(0), (2, 16, 16))
    y = y.astype(jnp.bfloat16)
    got = round_by("product_of_rounded", x, y, out=x)
    wide = np.asarray(x.astype(jnp.bfloat16), np.float64) @ np.asarray(y, np.float64)
    np.testing.assert_allclose(got, wide, rtol=1e-5, atol=1e-5)


@needs_triton
def test_arithmetic_of_bfloat16_rounds_every_result():
    x = jax.random.normal(jax.random.key(0), (64,), jnp.bfloat16).at[:2].set(0)
    np.testing.assert_array_equal(round_by("cube", x, out=x), x * x * x)


COMPILE = """
import jax, jax.numpy as jnp
from benchmarks.absent_gpu import compile_for
from test_triton_call import add

x = jax.ShapeDtypeStruct((13,), jnp.float32)
_, compiled = compile_for(lambda x, y: 2 * add(x, y), x, x, chip="a100-80")
assert "triton_kernel_call" in compiled.as_text(), compiled.as_text()
"""


@needs_triton
@needs_wheels
def test_a_kernel_compiles_for_a_gpu_that_is_not_there():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_it_says_where_it_does_not_run(monkeypatch):
    x = jnp.ones(4)
    assert triton_call.refuses(x) == "needs compute capability 8.0 or newer, found cpu"
    monkeypatch.setattr(triton_call, "_missing", lambda: ("jax_triton",))
    with platform.absent_gpu():
        assert triton_call.refuses(x) == "needs pip install 'stickjax[triton]' (jax_triton not found)"
        monkeypatch.setattr(triton_call, "_missing", tuple)
        assert triton_call.refuses(x) is None and triton_call.capability() == 90


@pytest.mark.parametrize("chip, capability, memory", [("sm_80", 80, 163), ("sm_89", 89, 99), ("cpu", None, 99)])
def test_shared_memory(monkeypatch, chip, capability, memory):
    monkeypatch.setattr(platform, "chip", lambda: chip)
    assert triton_call.capability() == capability and triton_call.shared_memory() == memory * 1024
