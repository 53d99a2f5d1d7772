"""Every test case of the Mosaic kernels can be lowered for a Hopper GPU, without the CUDA wheels and without a GPU.

The interpreter does not lower kernels. So only the tests here find errors of the lowering, or races that only lowered
kernels have.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from cases import DECODED, KERNEL_CASES, KERNEL_EXPERTS, ODD, Experts, Stick, dtype_of
from jax.experimental.mosaic.gpu import FragmentedArray

from benchmarks.gpu_cases import FEATURES
from pallas_kernels import expert_mlp, explain, platform, route, stick_breaking_attention

LISTS = {"interpreted": KERNEL_CASES, "odd": ODD, "benchmark": FEATURES}
CASES = {f"{which}: {name}": case for which, cases in LISTS.items() for name, case in cases.items()}
# `make test-ptx` lowers and executes nearly all of these calls. So `make test` lowers only a few of them.
LOWERED = (
    "benchmark: skip, H=64, grouped, packed", "interpreted: everything", "odd: T=131", "odd: T=3, S=1001",
    *(f"odd: {name}" for name in DECODED),
)  # fmt: skip
EXHAUSTIVE = {
    "test_attention_that_is_chosen_for_hopper_lowers": lambda name: name not in LOWERED,
    "test_experts_that_are_chosen_for_hopper_lower": lambda name, dtype: name != "some-idle",
}


@contextlib.contextmanager
def reductions_through_shared_memory(monkeypatch) -> Iterator[list]:
    """Yield a list that receives the shape of every reduction that is lowered with a scratch buffer in shared memory.

    All warpgroups of a block share this buffer, so such a reduction can be a race between two of them.
    """
    found, reduce = [], FragmentedArray.reduce

    def recorded(self, op, axis, scratch=None, **options):
        if scratch is not None:
            found.append(self.shape)
        return reduce(self, op, axis, scratch, **options)

    with monkeypatch.context() as patch:
        patch.setattr(FragmentedArray, "reduce", recorded)
        yield found


def lower(function, *arrays) -> str:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    with platform.absent_gpu():
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def forward_and_backward(function):
    """Return a function that computes `function` and its gradients, for cotangents of ones."""

    def run(*arrays):
        outputs, vjp = jax.vjp(function, *arrays)
        return outputs, vjp(jax.tree.map(jnp.ones_like, outputs))

    return run


def prepared(name: str):
    """Return (arrays, options, whether the case has a backward pass) for the test case `name`.

    The arrays and options are the arguments of the op.
    """
    case = CASES[name]
    if isinstance(case, Stick):
        return case.arrays(dtype_of(name.split(": ")[1])), case.options(), name.removeprefix("odd: ") not in DECODED
    return case.arrays(jax.random.key(0)), case.options(), not case.forward_only


@pytest.mark.parametrize("name", CASES)
def test_attention_that_is_chosen_for_hopper_lowers(name, monkeypatch):
    arrays, options, has_backward = prepared(name)
    with platform.absent_gpu():
        said = explain("stick_breaking_attention", *arrays, **options)
    if not said.startswith("stick_breaking_attention: mosaic"):
        pytest.skip(said)
    attend = partial(stick_breaking_attention, **options)
    with reductions_through_shared_memory(monkeypatch) as reductions:
        text = lower(forward_and_backward(attend) if has_backward else attend, *arrays)
    assert text.count("mosaic_gpu") >= (3 if has_backward else 1)
    assert not reductions, "two warpgroups that reduce at the same time overwrite each other's values"


@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
@pytest.mark.parametrize("name", KERNEL_EXPERTS)
def test_experts_that_are_chosen_for_hopper_lower(name, dtype, monkeypatch):
    case: Experts = KERNEL_EXPERTS[name]
    if not case.T:
        pytest.skip("no tokens, no kernel")
    indices = case.indices()
    shapes = (case.T, case.D), (case.E, case.D, 2 * case.F), (case.E, case.F, case.D), (case.T, case.k)
    arrays = [jnp.zeros(shape, dtype) for shape in shapes]

    def mlp(x, w_in, w_out, gates):
        return expert_mlp(x, w_in, w_out, route(indices, case.E), gates)

    with reductions_through_shared_memory(monkeypatch) as reductions:
        text = lower(forward_and_backward(mlp), *arrays)
    assert "mosaic_gpu" in text
    assert not reductions


def test_an_odd_cache_is_copied_and_explain_says_so():
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 64), jnp.bfloat16) for n in (1, 1001))
    with platform.absent_gpu():
        assert "keys and values copied, padded from S=1001 to 1008 rows" in explain("stick_breaking_attention", q, k, k)
        even = jax.ShapeDtypeStruct((1, 1000, 2, 64), jnp.bfloat16)
        assert "copied" not in explain("stick_breaking_attention", q, even, even)
