"""For sizes that are no multiple of a tile, dispatch chooses an implementation that agrees with the reference."""

import jax
import numpy as np
import pytest
from cases import DECODED, ODD, Experts, Stick
from conftest import FORWARD, relative_error
from test_kernels import attend, compare, run
from test_scatter_moe import check_linear, check_mlp
from test_stick_breaking import expected

from pallas_kernels import explain, platform

DECODING = *DECODED, "T=3, S=1001"
# The interpreter needs a long time. tests/test_kernels.py and `make test-ptx` have more odd sizes.
EXHAUSTIVE = {
    "test_attention_is_the_reference_forward_and_backward": lambda name: name != "prompts of unequal lengths",
    "test_decoding_with_an_odd_cache_is_the_reference": lambda name: name != "T=1, S=1001",
}


@pytest.fixture
def hopper(monkeypatch):
    """Make dispatch choose as on a Hopper GPU with two multiprocessors, and interpret the chosen kernels.

    More multiprocessors would only make the test slower.
    """
    monkeypatch.setattr("pallas_kernels.platform.multiprocessors", lambda: 2)
    with platform.interpret():
        yield


def chosen(case: Stick, dtype: str) -> str:
    """Return a sentence that names the implementation that dispatch chooses for an attention call, and the reason."""
    sentence = explain("stick_breaking_attention", *case.arrays(dtype), **case.options())
    return sentence.removeprefix("stick_breaking_attention: ")


@pytest.mark.parametrize("name", [name for name in ODD if name not in DECODING])
def test_attention_is_the_reference_forward_and_backward(name, hopper):
    assert chosen(ODD[name], "bfloat16").startswith("mosaic")
    compare(run("mosaic", ODD[name], "bfloat16"), expected(ODD[name], "bfloat16", False), "bfloat16")


@pytest.mark.parametrize("name", DECODING)
def test_decoding_with_an_odd_cache_is_the_reference(name, hopper):
    case = ODD[name]
    assert chosen(case, "bfloat16").startswith("mosaic (decoding")
    out, rem, _ = jax.jit(attend("mosaic", case))(*case.arrays("bfloat16"))
    wanted = expected(case, "bfloat16", False)
    assert relative_error(out, wanted["out"]) <= FORWARD["bfloat16"]
    np.testing.assert_allclose(rem, wanted["rem"], rtol=1e-5)


@pytest.mark.parametrize(
    "case, dtype",
    [
        (Stick(T=13, N=1, H=20), "bfloat16"),
        (Stick(T=1, S=1001, N=4, K=2, H=64), "float32"),
        (Stick(T=13, S=7, N=2, H=300), "float16"),
        (Stick(T=1, N=1, H=1), "bfloat16"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_before_one_is_chosen(case, dtype, hopper):
    assert chosen(case, dtype).startswith("xla")
    with pytest.raises(NotImplementedError, match="call with implementation mosaic: takes .*; use xla or reference"):
        run("mosaic", case, dtype)
    compare(run(None, case, dtype), expected(case, dtype, False), dtype)


def test_experts_without_a_name(hopper):
    """The implementation that dispatch chooses for expert_mlp is correct if a token has k=2 choices of E=1 expert.

    All numbers are positive, so that sums over the choices do not cancel to nearly zero.
    """
    check_mlp(Experts(T=67, k=2, E=1, D=7, F=5), None, dtype="bfloat16", positive=True)


def test_linear_maps_without_a_name(hopper):
    check_linear(Experts(T=31, k=2, E=3, D=9, F=20, idle=0.2), "token", "sorted", None, "bfloat16")
