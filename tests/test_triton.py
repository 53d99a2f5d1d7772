"""Test the Triton kernels of stick-breaking attention: supported calls and GPUs, and tiles of many sizes.

The results of the kernels are tested in tests/test_kernels.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import STICK, Stick
from conftest import FORWARD, GRADIENT, assert_close
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from test_kernels import compare, interpreted, run
from test_stick_breaking import TRANSFORMATIONS, expected

from pallas_kernels import explain, stick_breaking_attention, triton_call

TRITON_ONLY = {"implementation": "triton"}


@pytest.fixture
def installed(monkeypatch):
    """Make the code believe that Triton is installed; nothing is compiled."""
    monkeypatch.setattr(triton_call, "_missing", tuple)


def on(kind: str):
    """Return a context in which functions are traced as on an absent GPU with the name `kind`."""
    device = AbstractDevice(device_kind=kind, platform="gpu", num_cores=100)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def said(shape=(1, 100, 2, 64), dtype="bfloat16", **options) -> str:
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return explain("stick_breaking_attention", x, x, x, **options).removeprefix("stick_breaking_attention: ")


def test_mosaic_where_it_takes_the_call_else_triton_else_xla(installed):
    with on("NVIDIA H200"):
        assert said().startswith("mosaic")
        assert said(dtype="float32") == (
            "triton (64 x 32 tiles), on gpu; mosaic: takes bfloat16 and float16, not float32"
        )
        assert said((1, 100, 2, 300)).startswith("xla")
    for kind, found in (("NVIDIA A100-SXM4-80GB", "sm_80"), ("NVIDIA B200", "sm_100")):
        with on(kind):
            assert said() == f"triton (64 x 32 tiles), on gpu; mosaic: needs compute capability 9.0, found {found}"
    with on("Tesla V100"):
        assert "triton: needs compute capability 8.0 or newer, found Tesla V100" in said()
    assert "triton: needs compute capability 8.0 or newer, found cpu" in said()


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(triton_call, "_missing", lambda: ("jax_triton",))
    with on("NVIDIA L40S"):
        assert said().endswith("triton: needs pip install 'stickjax[triton]' (jax_triton not found)")


def test_it_says_what_it_does_not_take(installed):
    def refusal(*arguments, **options):
        with pytest.raises(NotImplementedError) as error:
            said(*arguments, **options, **TRITON_ONLY)
        return str(error.value)

    with on("NVIDIA A100"):
        with jax.enable_x64(True):
            assert "takes bfloat16, float16 and float32, not float64" in refusal(dtype="float64")
        assert "takes H and Hv up to 256 in bfloat16, not H=257, Hv=257" in refusal((1, 8, 2, 257))
        assert "takes H and Hv up to 128 in float32, not H=129, Hv=129" in refusal((1, 8, 2, 129), "float32")
        assert "takes tile sizes that are powers of two from 16 on, not (64, 24)" in refusal(tiles=(64, 24))
        assert "needs queries, keys and channels" in refusal((1, 0, 2, 64))


def test_tiles_by_the_width(installed):
    with on("NVIDIA A100"):
        assert "triton (128 x 32 tiles, skipping below 2^-24)" in said((1, 100, 2, 100), skip_below=-24.0)
        assert "triton (16 x 64 tiles)" in said(tiles=(16, 64))


def test_every_case_of_the_portable_list_is_taken_or_refused_with_a_reason(installed):
    with on("NVIDIA A100"):
        for name, case in STICK.items():
            sentence = explain("stick_breaking_attention", *case.arrays(), **case.options())
            assert ("triton (" in sentence or "triton: needs queries" in sentence) or name == "decode", sentence


@pytest.mark.parametrize("keys", [16, 32, 64])
def test_the_sum_over_nearer_keys_keeps_its_digits_beside_large_numbers(keys):
    """`sum_of_nearer` adds, for each key, the numbers of all keys on its right, without losing small sums.

    In most rows, the numbers decrease from 160 at the left to about 2^-24 at the right. A kernel that subtracted the
    sum on the left from the total would lose all digits of a small sum on the right.
    """
    rng = np.random.default_rng(0)
    x = np.sort(2 ** rng.uniform(-24, 7, (16, keys)), axis=1)[:, ::-1]
    x[:, :4], x[0] = 160, rng.uniform(0, 1, keys)
    x = jnp.asarray(x, jnp.float32)

    def kernel():
        import triton_tiles

        return triton_tiles.sum_of_nearer

    with interpreted("triton"):
        got = triton_call.launch(kernel, x, out=x, grid=(1,), num_warps=4, num_stages=1, rows=16, keys=keys)
    from_right = np.cumsum(np.asarray(x, np.float64)[:, ::-1], axis=1)[:, ::-1]
    # The kernel splits each number into two float16 numbers. Each may be off by half of the smallest float16 number.
    np.testing.assert_allclose(got, from_right - np.asarray(x), rtol=keys * 2**-24, atol=keys * 2**-25)
    assert (got[:, -1] == 0).all()


@pytest.mark.parametrize("tiles", [(16, 16), (16, 64), (64, 16)])
def test_tiles_that_are_no_squares(tiles):
    case = Stick(T=50, S=70, N=2, K=1, H=24, Hv=8)
    with interpreted("triton"):
        compare(run("triton", case, "float32", tiles=tiles), expected(case, "float32", False), "float32")


def test_skipping_where_the_backward_pass_has_smaller_tiles():
    """Early exit is correct if query tiles have 128 rows in the forward pass and 64 rows in the backward pass.

    Each of the two backward tiles with the rows of one forward tile must stop at the key tile where the forward tile
    stopped.
    """
    case = Stick(T=300, N=1, H=72, std=2.0)
    with interpreted("triton"):
        values = run("triton", case, "float16", skip_below=-24.0)
    compare(values, expected(case, "float16", True), "float16", skips=True)
    assert float(values["kept"][0, 0]) < 0.9


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations(name):
    arrays = Stick(T=17, B=2, N=1, H=16).arrays()

    def loss(transform, implementation, *arrays):
        def one(*x):
            return stick_breaking_attention(*(y[None] for y in x), implementation=implementation)

        out, rem = transform(one)(*arrays)
        return (out * out).sum() + jnp.cos(rem).sum()

    with interpreted("triton"):
        got = jax.jit(jax.grad(partial(loss, TRANSFORMATIONS[name], "triton"), (0, 1, 2)))(*arrays)
    for value, want in zip(got, jax.grad(partial(loss, jax.vmap, "reference"), (0, 1, 2))(*arrays), strict=True):
        assert_close(value, want, GRADIENT["float32"])


def test_inside_of_shard_map():
    arrays = Stick(T=17, B=2, N=1, H=16).arrays()
    wanted = stick_breaking_attention(*arrays)
    with interpreted("triton"), jax.set_mesh(jax.make_mesh((2,), ("data",))):
        sharded = jax.device_put(arrays, jax.P("data"))

        def local(*x):
            return stick_breaking_attention(*x, implementation="triton")

        results = jax.jit(jax.shard_map(local, out_specs=jax.P("data"), check_vma=False))(*sharded)
    for got, want in zip(results, wanted, strict=True):
        assert_close(got, want, FORWARD["float32"])
