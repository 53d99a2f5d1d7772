"""Small calls of stick-breaking attention, a feature each: checked on a GPU before anything is timed."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import stick_breaking_attention

from . import gpu_check, trained_logits
from .gpu_run import Run

PART = "stick_breaking checks"


@dataclass(frozen=True)
class Feature:
    """`segments`: lengths of the documents, padding where negative, ending at the last query or key.

    `shift`: mean of the logits instead of those of a trained model. `forward_only`: decoding is never differentiated,
    and with gradients the op would take the kernels for long queries instead.
    """

    T: int = 200
    B: int = 1
    N: int = 2
    H: int = 128
    S: int | None = None
    K: int | None = None
    Hv: int | None = None
    dtype: str = "bfloat16"
    offset: int | tuple[int, ...] | None = None
    segments: tuple[int, ...] | None = None
    key_segments: tuple[int, ...] | None = None
    shift: float | None = None
    forward_only: bool = False
    settings: dict = field(default_factory=dict)

    def arrays(self, key):
        q, k, v = trained_logits.inputs(
            key, self.B, self.T, self.N, self.H, K=self.K, S=self.S, dtype=jnp.dtype(self.dtype)
        )
        if self.shift is not None:
            q = q.at[..., 0].set(self.shift * self.H**0.5)
        if self.Hv is not None:
            v = jax.random.normal(jax.random.fold_in(key, 3), (*v.shape[:3], self.Hv), v.dtype)
        return q, k, v

    def options(self) -> dict:
        options = dict(self.settings)
        if self.offset is not None:
            options["query_offset"] = jnp.asarray(self.offset) if isinstance(self.offset, tuple) else self.offset
        for name, lengths in (("segment_ids", self.segments), ("key_segment_ids", self.key_segments)):
            if lengths is not None:
                options[name] = _documents(lengths, self.B)
        return options


def _documents(lengths: tuple[int, ...], B: int):
    """Segment ids [B,T]."""
    ids = np.concatenate([np.full(abs(n), i if n > 0 else -1, np.int32) for i, n in enumerate(lengths)])
    return jnp.tile(ids, (B, 1))


SKIP = {"skip_below": trained_logits.SKIP}
DECODE = dict(T=1, S=2000, N=8, K=2, B=3, forward_only=True)
# From the plain to the special: what fails first says the most.
FEATURES = {
    "plain": Feature(),
    "H=64": Feature(H=64),
    "H=32": Feature(H=32),
    "H=256": Feature(H=256, N=1),
    "fp16": Feature(dtype="float16"),
    "fp16 H=64": Feature(dtype="float16", H=64, T=130),
    "one token": Feature(T=1),
    "T=63": Feature(T=63),
    "T=64": Feature(T=64),
    "T=129": Feature(T=129),
    "T=1000 B=2 N=6": Feature(T=1000, B=2, N=6),
    "grouped heads": Feature(T=300, N=8, K=2, B=2),
    "one key head": Feature(T=100, N=6, K=1, H=64),
    "wide values": Feature(H=64, Hv=128),
    "narrow values": Feature(H=64, Hv=32, T=63),
    "packed": Feature(T=500, segments=(200, 1, 2, 127, 170)),
    "padded": Feature(T=300, B=2, segments=(-70, 100, 90, -40)),
    "key segments": Feature(T=80, S=300, segments=(50, 25, -5), key_segments=(200, 80, -20), offset=220),
    "window": Feature(T=500, settings={"window": 100}),
    "attend current": Feature(T=300, settings={"attend_current": True}),
    "current only": Feature(T=100, settings={"attend_current": True, "window": 0}),
    "chunk of a prefill": Feature(T=200, S=700),
    "offsets per entry": Feature(T=100, S=300, B=3, offset=(200, 30, -40)),
    "more queries than keys": Feature(T=300, S=100),
    "saturated": Feature(shift=12.0),
    "nothing attended": Feature(shift=-8.0, T=700),
    "everything": Feature(
        T=180, S=400, B=2, N=8, K=2, H=64, Hv=128, segments=(100, 60, -20), key_segments=(250, 130, -20),
        offset=(220, 100), settings={"window": 150, "attend_current": True},
    ),
    "skip": Feature(T=1000, N=12, settings=SKIP),
    "skip, H=64, grouped, packed": Feature(T=700, N=8, K=2, H=64, segments=(300, 400), settings=SKIP),
    "skip, fp16, far": Feature(T=600, dtype="float16", shift=-5.0, settings=SKIP),
    "decode": Feature(**DECODE),
    "decode, H=64, fp16": Feature(**DECODE | dict(H=64, dtype="float16")),
    "decode, lengths per entry": Feature(**DECODE, offset=(1999, 700, 0)),
    "decode, 5 tokens": Feature(**DECODE | dict(T=5)),
    "decode, many entries": Feature(**DECODE | dict(B=80)),
    "decode, window": Feature(**DECODE, settings={"window": 900}),
    "decode, skip": Feature(**DECODE, settings=SKIP),
    "decode, skip, lengths": Feature(**DECODE, offset=(1999, 700, 0), settings=SKIP),
}  # fmt: skip
QUICK = ("one token", "decode, lengths per entry")


def check(case: Feature, implementation: str) -> gpu_check.Errors:
    arrays, options = case.arrays(jax.random.key(0)), case.options()
    f = partial(stick_breaking_attention, **options, implementation=implementation)
    reference = partial(stick_breaking_attention, **options, implementation="reference")
    if case.forward_only:
        return gpu_check.errors(f, gpu_check.exact_forward(reference, arrays), None, arrays)
    cotangent = trained_logits.cotangents(jax.random.key(1), arrays[0], arrays[2])
    return gpu_check.errors(f, gpu_check.exact(reference, cotangent, arrays), cotangent, arrays)


def rows(run: Run, implementation: str, names=tuple(FEATURES)) -> None:
    for name in names:
        case = FEATURES[name]
        run.checked(PART, name, implementation, case.dtype, partial(check, case, implementation))
