"""Every kernel that dispatch chooses for a call on a GPU can be lowered for that GPU, which need not be present.

The calls come from the GPU benchmark, or are random. If a kernel does not support a call, dispatch refuses the call,
and the error names implementations that support it. The lowering itself never fails. test_lowering.py tests
further calls of the Mosaic kernels.
"""

import contextlib

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from benchmarks import gpu_cases
from benchmarks.gpu_cases import SKIP, Call, Feature
from benchmarks.kernel_cases import Experts
from pallas_kernels import triton_call
from pallas_kernels.scatter_moe.call import ACTIVATIONS

needs_triton = pytest.mark.skipif(
    not triton_call.is_installed(), reason="needs triton and jax-triton, and no GPU: make test-absent"
)
TYPES = "bfloat16", "float16", "float32"
HOPPER, AMPERE = "NVIDIA H200", "NVIDIA A100"


@contextlib.contextmanager
def absent(kind: str):
    device = AbstractDevice(device_kind=kind, platform="gpu", num_cores=108)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def documents(rng, size: int) -> tuple[int, ...]:
    """Return random lengths of documents; a negative length is padding. The absolute values add up to `size`."""
    cuts = np.unique(rng.integers(1, size, 3)) if size > 1 else []
    lengths = np.diff([0, *cuts, size])
    return tuple(int(n) for n in np.where(rng.random(len(lengths)) < 0.2, -lengths, lengths))


def an_attention(seed: int) -> Feature:
    rng = np.random.default_rng(seed)
    T, S = (int(rng.choice([1, rng.integers(2, 17), rng.integers(17, 400)])) for _ in range(2))
    S = T if rng.random() < 0.4 else S + int(rng.choice([0, 1001]))
    K, H = int(rng.integers(1, 4)), int(rng.choice([1, 20, 32, 64, 64, 128, 128, 256, 300]))
    Hv = H if rng.random() < 0.6 else int(rng.choice([1, 32, 64, 100, 128, 256]))
    B, N = int(rng.integers(1, 4)), K * int(rng.integers(1, 5))
    settings = {"attend_current": True} if rng.random() < 0.3 else {}
    settings |= {"window": int(rng.integers(0, 200))} if rng.random() < 0.3 else {}
    settings |= SKIP if rng.random() < 0.4 else {}
    settings |= {"tiles": (int(rng.choice([64, 128])), 64)} if rng.random() < 0.2 else {}
    packed = rng.random() < 0.3
    return Feature(
        T=T, S=S, B=B, N=N, K=K, H=H, Hv=Hv, dtype=str(rng.choice(TYPES, p=(0.5, 0.3, 0.2))), settings=settings,
        segments=documents(rng, T) if packed else None, key_segments=documents(rng, S) if packed else None,
        offset=tuple(map(int, rng.integers(-50, 300, B))) if rng.random() < 0.3 else None,
        forward_only="tiles" not in settings and T <= 16 and S >= 512,  # a decode step, which has no gradients
    )  # fmt: skip


def an_expert_call(seed: int) -> Call:
    """Return a random call of `expert_mlp` or `expert_linear`.

    The order of its input and output rows is random too, and k may be larger than E.
    """
    rng = np.random.default_rng(seed)
    T, k, E = int(rng.choice([1, 5, 131, 300])), int(rng.integers(1, 6)), int(rng.choice([1, 3, 8, 40]))
    D, F = (int(rng.choice([1, 7, 64, 100, 129, 300])) for _ in range(2))
    case, dtype = Experts(T=T, k=k, E=E, D=D, F=F, idle=0.2), str(rng.choice(TYPES))
    if rng.random() < 0.6:
        return gpu_cases.mlp(case, dtype, str(rng.choice(list(ACTIVATIONS))))
    return gpu_cases.linear(case, dtype, *map(str, rng.choice(gpu_cases.ORDERS, 2)))


# Sizes at which shared memory is nearly full, found by random trials.
WIDE = dict(H=256, Hv=256, N=1)
SHORT = {
    "wide, decoding": Feature(T=3, S=1011, forward_only=True, **WIDE),
    "wide, one warpgroup": Feature(T=130, settings={"tiles": (64, 64)}, **WIDE),
    "wide, two warpgroups": Feature(T=130, settings={"tiles": (128, 64)}, **WIDE),
}
FEATURES = SHORT | {f"attention {seed}": an_attention(seed) for seed in range(28, 52)}
CALLS = {name: gpu_cases.attention(case, case.dtype, case.forward_only) for name, case in FEATURES.items()}
CALLS |= {f"experts {seed}": an_expert_call(seed) for seed in range(8)}
CALLS |= {name: gpu_cases.mlp(Experts(T=9, E=3, D=7, F=5), "bfloat16", name) for name in ACTIVATIONS}
LINEAR = {name: gpu_cases.CALLS[f"linear {name}"] for name in ("token to pair", "pair to sorted", "sorted to token")}

# `make test` lowers these calls. Some of them Mosaic takes, and some it refuses. Every type and every option occurs.
CHOSEN = (
    *SHORT, *LINEAR, *(f"attention {seed}" for seed in (30, 32, 33, 42, 50)), "experts 1", "experts 7", "gelu", "geglu",
)  # fmt: skip
EXHAUSTIVE = {"test_what_is_chosen_for_hopper_lowers": lambda name: name not in CHOSEN}


def lowered(call: Call, implementation: str) -> str:
    return call.program(implementation).trace(*call.shapes()).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", CALLS | LINEAR)
def test_what_is_chosen_for_hopper_lowers(name, monkeypatch):
    monkeypatch.setattr(triton_call, "_missing", lambda: ("triton",))
    call = (CALLS | LINEAR)[name]
    with absent(HOPPER):
        (chosen,) = call.implementations()
        assert (chosen == "mosaic") == ("mosaic_gpu" in lowered(call, chosen))
        if chosen != "mosaic":
            with pytest.raises(NotImplementedError, match="implementation mosaic: takes .*; use xla or reference"):
                lowered(call, "mosaic")


@needs_triton
@pytest.mark.parametrize("name", CALLS | gpu_cases.CALLS)
def test_what_triton_takes_lowers(name):
    call = (CALLS | gpu_cases.CALLS)[name]
    has_tokens = all(array.size for array in jax.tree.leaves(call.shapes()))
    for gpu in (AMPERE, HOPPER) if name in CALLS else (AMPERE,):
        with absent(gpu):
            if "triton" in call.implementations():
                assert ("triton_kernel_call" in lowered(call, "triton")) == has_tokens
            else:
                with pytest.raises(NotImplementedError, match="implementation triton: takes .*; use (mosaic or )?xla"):
                    lowered(call, "triton")


def test_the_calls_by_chance_are_of_both_kinds(monkeypatch):
    """Mosaic supports some of the random attention calls of this file and refuses others.

    The supported calls include every option. If all calls were refused, the other tests would prove nothing.
    """
    monkeypatch.setattr(triton_call, "_missing", lambda: ("triton",))
    with absent(HOPPER):
        taken = [case for name, case in FEATURES.items() if CALLS[name].implementations() == ("mosaic",)]
    assert len(FEATURES) / 3 < len(taken) < len(FEATURES)
    for option in ("window", "skip_below", "attend_current"):
        assert any(option in case.settings for case in taken), option
    assert any(case.segments for case in taken) and any(case.offset for case in taken)
    assert any(case.forward_only for case in taken)
    assert any(case.T > 8 and case.T % 8 for case in taken) and any(case.S > 8 and case.S % 8 for case in taken)
