"""The calls of the attention op and the expert ops that the GPU benchmark checks."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, expert_linear, expert_mlp, explain, route, stick_breaking_attention
from pallas_kernels.scatter_moe.call import GATED

from . import trained_logits
from .gpu_check import attended
from .kernel_cases import DECODED, KERNEL_CASES, KERNEL_EXPERTS, ODD, Experts, Stick, dtype_of
from .timing import forward_backward


@dataclass(frozen=True)
class Feature:
    """A call of stick_breaking_attention that tests one feature, such as padding or a window.

    Sizes: T queries, S keys (None: T), B batch entries, N query heads, K key heads (None: N), width H of queries and
    keys, width `Hv` of values (None: H).
    `offset`: the position of the first query among the keys (None: S - T); a tuple has one position per batch entry.
    `segments`: the lengths of the packed documents of the queries; the sum of the lengths is T. A negative length -n
    stands for n tokens of padding.
    `key_segments`: the same for the keys; the sum of the lengths is S.
    `shift`: the mean of all logits. None: the logits are distributed as in a trained model.
    `forward_only`: compute no gradients. Decode steps need this: with gradients, the op does not use its code for
    decoding.
    `settings`: further keyword arguments of the op.
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
    """Return the segment ids [B,T] of packed documents with these lengths. A length -n stands for n padding tokens."""
    ids = np.concatenate([np.full(abs(n), i if n > 0 else -1, np.int32) for i, n in enumerate(lengths)])
    return jnp.tile(ids, (B, 1))


SKIP = {"skip_below": trained_logits.SKIP}
DECODE = dict(T=1, S=2000, N=8, K=2, B=3, forward_only=True)
# Simple calls come first, so that the first failure has the simplest cause.
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
# This call has more thread blocks than the GPU has multiprocessors, and each block decides many times whether to stop
# early. So it can show errors that small calls hide.
AT_SIZE = Feature(T=4096, B=4, N=12, settings=SKIP)


class Call(NamedTuple):
    """One call of an op, which can run with any implementation. It makes its inputs from a random key."""

    op: Callable
    dtype: str
    inputs: Callable  # random key -> (cotangent, *arrays), where the arrays are the differentiable inputs
    bind: Callable  # (*arrays) -> (positional arguments, keyword arguments) of the op
    forward_only: bool = False
    skips: bool = False  # whether the call is attention with `skip_below`

    def function(self, implementation: str | None) -> Callable:
        def run(*arrays):
            arguments, options = self.bind(*arrays)
            return self.op(*arguments, **options, implementation=implementation)

        return attended(run) if self.skips else run

    def program(self, implementation: str | None) -> Callable:
        """Return the jitted function (cotangent, *arrays) -> (outputs, gradients) of an implementation.

        `implementation` None: the op chooses. If the call is `forward_only`, the gradients are ().
        """
        function = self.function(implementation)
        if self.forward_only:
            return jax.jit(lambda _, *arrays: (function(*arrays), ()))
        return forward_backward(function)

    def shapes(self):
        return jax.eval_shape(self.inputs, jax.random.key(0))

    def implementations(self) -> tuple[str, ...]:
        """Return the names of the kernels that can run this call on this machine, such as ("mosaic", "triton").

        The first is the kernel that the op chooses by default. If no kernel can run the call, return ("xla",).
        """
        found = []

        def look(_, *arrays):
            arguments, options = self.bind(*arrays)
            found.extend(implementations(self.op.__name__, *arguments, **options))

        jax.eval_shape(look, *self.shapes())
        return tuple(name for name in found if name != "xla") or tuple(found)


def implementations(op: str, *arguments, **settings) -> Iterator[str]:
    """Yield the names of the implementations that can run a call on this machine, except the reference.

    `op`: the name of the op. `arguments` and `settings`: the arguments of the call.
    """
    for name in dispatch.NAMES[:-1]:
        try:
            explain(op, *arguments, **settings, implementation=name)
        except NotImplementedError:
            continue
        yield name


def attention(case: Feature | Stick, dtype: str, forward_only: bool = False) -> Call:
    skips = isinstance(case, Feature) and "skip_below" in case.settings

    def inputs(key):
        arrays = case.arrays(key) if isinstance(case, Feature) else case.arrays(dtype)
        return trained_logits.cotangents(jax.random.fold_in(key, 4), arrays[0], arrays[2]), *arrays

    def bind(*arrays):
        return arrays, case.options()

    return Call(stick_breaking_attention, dtype, inputs, bind, forward_only, skips)


def _normal(key, dtype: str, *shapes):
    keys = jax.random.split(key, len(shapes))
    return tuple(0.7 * jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True))


def mlp(case: Experts, dtype: str, activation: str = "swiglu") -> Call:
    T, k, E, D, F = case.T, case.k, case.E, case.D, case.F
    width = F * (2 if activation in GATED else 1)
    shapes = (T, D), (T, D), (E, D, width), (E, F, D), (T, k), (E, width), (E, D)

    def bind(x, w_in, w_out, gates, b_in, b_out):
        options = dict(b_in=b_in, b_out=b_out, activation=activation)
        return (x, w_in, w_out, route(jnp.asarray(case.indices()), E), gates), options

    return Call(expert_mlp, dtype, lambda key: _normal(key, dtype, *shapes), bind)


def linear(case: Experts, dtype: str, rows_in: str, rows_out: str) -> Call:
    """Return a call of `expert_linear`. `rows_in` and `rows_out` are the orders of its input rows and output rows.

    An order is "token": one row per token; "pair": one row per (token, choice) pair; or "sorted": the rows of "pair",
    sorted by expert. If `rows_out` is "token", an output row is the sum over the k experts of a token, weighted by the
    gates.
    """
    T, k, E, D, F = case.T, case.k, case.E, case.D, case.F
    results, rows = (T if order == "token" else T * k for order in (rows_out, rows_in))
    shapes = (results, F), (rows, D), (E, D, F), (E, F), (T, k)

    def bind(x, weight, bias, gates):
        options = dict(grouped_in=rows_in == "sorted", grouped_out=rows_out == "sorted", bias=bias)
        options |= dict(gates=gates) if rows_out == "token" else {}
        return (x, weight, route(jnp.asarray(case.indices()), E)), options

    return Call(expert_linear, dtype, lambda key: _normal(key, dtype, *shapes), bind)


ORDERS = "token", "pair", "sorted"
ATTENTION = {
    **{name: attention(case, case.dtype, case.forward_only) for name, case in FEATURES.items()},
    **{f"odd {name}": attention(case, dtype_of(name), name in DECODED) for name, case in ODD.items()},
}
SMALL = {f"small {name}": attention(case, dtype_of(name)) for name, case in KERNEL_CASES.items()}
EXPERTS = {
    **{f"experts {name}": mlp(case, "bfloat16") for name, case in KERNEL_EXPERTS.items()},
    **{
        f"linear {a} to {b}": linear(KERNEL_EXPERTS["some-idle"], "bfloat16", a, b)
        for a, b in itertools.product(ORDERS, ORDERS)
    },
    **{f"experts {name}, float32": mlp(case, "float32") for name, case in KERNEL_EXPERTS.items()},
}
CALLS = ATTENTION | EXPERTS | SMALL
# The calls with skip_below. The stage "exit" runs each of them a thousand times. "skip at size" is not compared with
# the reference, because the scores of the reference would not fit into memory.
EXITS = {name: ATTENTION[name] for name, case in FEATURES.items() if SKIP.items() <= case.settings.items()}
EXITS |= {"skip at size": attention(AT_SIZE, "bfloat16")}
QUICK = "one token", "decode, skip", "linear token to sorted"
