"""Named calls of the ops that test the GPU kernels. They are small, and have unusual sizes and options.

The tests run these calls in an interpreter, lower them, and compile them for GPUs that the machine does not have.
`python -m benchmarks --gpu` checks them on the GPU of the machine.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Stick:
    """A call of stick_breaking_attention on random inputs. The logits have mean `shift` and standard deviation `std`.

    Sizes: T queries, S keys (None: T), B batch entries, N query heads, K key heads (None: N), width H of queries and
    keys, width `Hv` of values (None: H).
    `offset`: the position of the first query among the keys (None: S - T); a tuple has one position per batch entry.
    `segments`: the lengths of the packed documents of the queries; the sum of the lengths is T. A negative length -n
    stands for n tokens of padding. Batch entries 1, 3, ... have the documents in reverse order.
    `key_segments`: the same for the keys; the sum of the lengths is S.
    """

    T: int = 37
    S: int | None = None
    B: int = 1
    N: int = 2
    K: int | None = None
    H: int = 8
    Hv: int | None = None
    offset: int | tuple[int, ...] | None = None
    segments: tuple[int, ...] | None = None
    key_segments: tuple[int, ...] | None = None
    window: int | None = None
    attend_current: bool = False
    std: float = 1.0
    shift: float = 0.0

    @property
    def is_saturated(self) -> bool:
        return abs(self.shift) + self.std > 20

    def arrays(self, dtype=np.float32, seed=0):
        """Return random (query [B,T,N,H], key [B,S,K,H], value [B,S,K,Hv])."""
        S, K = self.T if self.S is None else self.S, self.K or self.N
        rng = np.random.default_rng(seed)
        q = self.std * rng.standard_normal((self.B, self.T, self.N, self.H))
        k = rng.standard_normal((self.B, S, K, self.H))
        v = rng.standard_normal((self.B, S, K, self.Hv or self.H))
        if self.shift:
            q[..., 0], k[..., 0] = self.shift * self.H**0.5, 1
        return tuple(jnp.asarray(x, dtype) for x in (q, k, v))

    def options(self) -> dict:
        offset = jnp.asarray(self.offset, jnp.int32) if isinstance(self.offset, tuple) else self.offset
        options = {"query_offset": offset, "window": self.window, "attend_current": self.attend_current}
        for name in ("segments", "key_segments"):
            if getattr(self, name) is not None:
                ids = documents(getattr(self, name), self.B)
                options[{"segments": "segment_ids", "key_segments": "key_segment_ids"}[name]] = ids
        return options


def documents(lengths: tuple[int, ...], B: int = 1):
    """Return the segment ids [B,T] of packed documents with these lengths. A length -n stands for n padding tokens.

    Batch entries 1, 3, ... have the documents in reverse order.
    """
    ids = np.concatenate([np.full(abs(n), i if n > 0 else -1, np.int32) for i, n in enumerate(lengths)])
    return jnp.stack([ids[:: (-1) ** b] for b in range(B)])


# Tiles have 64 queries and 64 keys, and most kernels need heads of 32 channels or more. If the name of a case begins
# with fp16 or fp32, its arrays have this type. All other cases are bfloat16.
KERNEL_CASES = {
    "plain": Stick(T=200, N=1, H=64),
    "one-token": Stick(T=1, N=1, H=32),
    "grouped": Stick(T=66, B=2, N=2, K=1, H=32),
    "two-groups": Stick(T=40, N=4, K=2, H=32, Hv=64),
    "narrow-values": Stick(T=63, N=1, H=64, Hv=32),
    "fp16-128": Stick(T=130, N=1, H=128),
    "wide-256": Stick(T=70, N=1, H=256),
    "wide-grouped": Stick(T=200, N=2, K=1, H=32, Hv=256, window=70),
    "cache": Stick(T=40, S=150, N=1, H=32),
    "more-queries": Stick(T=140, S=70, N=1, H=32),
    "offsets": Stick(T=60, S=140, B=3, N=1, H=32, offset=(70, 3, -40)),
    "packed": Stick(T=200, N=1, H=32, segments=(70, 1, 2, 127)),
    "padded": Stick(T=150, N=1, H=32, segments=(-30, 60, 20, -40)),
    "left-padded": Stick(T=128, N=1, H=32, segments=(-70, 58)),  # the first tile of queries has only padding
    "window": Stick(T=200, N=1, H=32, window=70),
    "current-only": Stick(T=70, N=1, H=32, attend_current=True, window=0),
    "everything": Stick(
        T=80, S=150, B=2, N=2, K=1, H=32, Hv=64, segments=(50, 25, -5), key_segments=(100, 40, -10),
        offset=(70, 30), window=66, attend_current=True,
    ),
    "saturated": Stick(T=100, N=1, H=32, std=1.0, shift=12.0),
    "wild": Stick(T=100, N=1, H=32, std=12.0, shift=-6.0),
    "all-far": Stick(T=200, N=1, H=32, shift=-8.0),
    "odd-widths": Stick(T=70, N=2, K=1, H=20, Hv=35),
    "fp32-odd-widths": Stick(T=70, N=2, K=1, H=20, Hv=35),
    "fp32-offsets": Stick(T=40, S=90, B=2, N=1, H=8, offset=(50, -7)),
    "fp32-saturated": Stick(T=70, N=1, H=16, std=4.0, shift=-3.0),
}  # fmt: skip
# Numbers of queries and keys that are not multiples of the tile size, as in real calls.
ODD = {
    "T=131": Stick(T=131, H=64),
    "T=1, S=1001": Stick(T=1, S=1001, N=12, K=1, H=64),
    "T=2, S=1001, H=256": Stick(T=2, S=1001, N=2, K=1, H=256),
    "T=3, S=1001": Stick(T=3, S=1001, N=12, K=4, H=64, Hv=256),
    "T=131, S=1001": Stick(T=131, S=1001, N=1, H=64, Hv=32),
    "prompts of unequal lengths": Stick(T=77, B=3, N=1, H=64, segments=(-9, 30, 38)),
}
# The cases of ODD that are decode steps. They are never differentiated: with gradients, the op does not use its code
# for decoding.
DECODED = "T=1, S=1001", "T=2, S=1001, H=256"


def dtype_of(name: str) -> str:
    """Return the dtype, such as "bfloat16", of the case with this name in KERNEL_CASES, ODD or KERNEL_EXPERTS."""
    return {"fp16": "float16", "fp32": "float32"}.get(name.split("-")[0], "bfloat16")


@dataclass(frozen=True)
class Experts:
    """The sizes and the random routing of a call of expert_mlp or expert_linear.

    T tokens of width D, each with k of E experts of width F.
    `share`: the probability that a (token, choice) pair is moved from its random expert to the first expert.
    `idle`: the probability that a pair is moved from its expert to no expert.
    `used`: only the first `used` experts get tokens; None: all experts.
    """

    T: int = 37
    k: int = 2
    E: int = 5
    D: int = 8
    F: int = 12
    share: float = 0.0
    idle: float = 0.0
    used: int | None = None

    def indices(self, seed=0):
        rng = np.random.default_rng(seed)
        used = self.used or self.E
        if self.k <= used:
            chosen = np.argsort(rng.random((self.T, used)), axis=1)[:, : self.k]
        else:
            chosen = rng.integers(0, used, (self.T, self.k))
        chosen = np.where(rng.random(chosen.shape) < self.share, 0, chosen)
        return np.where(rng.random(chosen.shape) < self.idle, self.E, chosen).astype(np.int32)

    @property
    def rows(self) -> int:
        return self.T * self.k


# A tile has up to 128 rows and 128 columns. The kernels sum over the input width in blocks of 64. Some cases have the
# same sizes, so that they share one compiled program: a program takes much longer to compile than to run.
KERNEL_EXPERTS = {
    "two-tiles": Experts(T=150, k=2, E=2, D=64, F=64),
    "odd": Experts(T=9, E=3, D=7, F=5),
    "one-token": Experts(T=1, E=4),
    "no-tokens": Experts(T=0),
    "all-chosen": Experts(T=7, k=3, E=3),
    "one-expert": Experts(T=140, k=1, E=1),
    "one-takes-all": Experts(T=40, E=3, share=1.0),
    "some-idle": Experts(T=40, E=3, share=0.3, idle=0.5),
    "all-idle": Experts(T=40, E=3, idle=1.0),
    "more-experts-than-rows": Experts(T=4, E=20),
    "wide": Experts(T=5, E=2, D=200, F=300),
}
