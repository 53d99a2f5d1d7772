"""The run for a machine with a GPU: check every implementation against the fp32 reference, then time those that agree.

Under ten minutes on an H200: a case that would begin after DEADLINE seconds is left out, and its row says so. Whatever
a contestant raises becomes its row's note, so that one of them cannot cost the others their run.
"""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, explain, route

from . import cost, experts, gpu_peers, stick_breaking
from .report import PASSES, Row
from .timing import Times, ceilings, forward_backward, rotating

DEADLINE = 480
# The tolerances of tests/conftest.py for bfloat16: relative L2 error of the outputs, of the gradients.
FORWARD, GRADIENT = 5e-3, 1e-2
ATTENTION = [dict(B=4, T=T, N=12, H=128) for T in (4096, 8192)]
EXPERTS = [
    dict(T=8192, k=8, D=1536, F=512, E=40),
    dict(T=65536, k=8, D=1536, F=512, E=40),
    dict(T=8192, k=2, D=2048, F=3072, E=8),
    dict(T=16384, k=4, D=2560, F=1280, E=64),
]


def available() -> bool:
    """Whether JAX sees a GPU. Asks JAX to allocate as it goes: the torch peers need memory of the same GPU."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return jax.default_backend() == "gpu"


def chip() -> str:
    """A file name: "NVIDIA H200" -> "nvidia-h200"."""
    return "-".join(jax.devices()[0].device_kind.lower().split())


def implementations(op: str, *arguments, **settings) -> Iterator[str]:
    """Those of an op that take this call here; kernels appear as soon as they are registered."""
    for name in dispatch.NAMES:
        try:
            explain(op, *arguments, **settings, implementation=name)
        except NotImplementedError:
            continue
        yield name


def _poison(like) -> None:
    """Leave NaN in the memory that the next outputs are likely to get, so that an unwritten row is seen."""
    jax.block_until_ready(jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), like))


def exact(reference: Callable, cotangent, arguments):
    """(output, gradients) of the reference on the same numbers in fp32, on the host."""
    fp32 = jax.tree.map(lambda x: x.astype(jnp.float32), (cotangent, *arguments))
    return jax.device_get(forward_backward(reference)(*fp32))


def errors(function: Callable, expected, cotangent, arguments) -> tuple[float, float]:
    """Largest relative L2 error of the outputs and of the gradients; infinite if any of them is not finite."""

    def relative(a, b):
        error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
        return float(error) if np.isfinite(error) else float("inf")

    run = forward_backward(function)
    _poison(jax.eval_shape(run, cotangent, *arguments))
    got = jax.device_get(run(cotangent, *arguments))
    forward, gradient = (max(jax.tree.leaves(jax.tree.map(relative, a, b))) for a, b in zip(got, expected, strict=True))
    return forward, gradient


class _Case(NamedTuple):
    """One shape of one op: what a pass costs, and two sets of inputs, together several times the L2 (H200: 60 MB)."""

    part: str
    name: str
    work: list[cost.Cost]
    sets: list[tuple]


class _Run:
    """Collects rows until the deadline."""

    def __init__(self, ceilings: cost.Ceilings, seconds: float):
        self.rows: list[Row] = []
        self.ceilings, self.seconds, self.end = ceilings, seconds, time.monotonic() + DEADLINE

    def contestant(self, case: _Case, name: str, measure: Callable[[bool], Times], check: Callable | None = None):
        """Rows of both passes: `measure(backward)`, its ratio over the larger limit. Timed only if its check passes."""
        extra = {}
        for backward, passes in enumerate(PASSES):
            where = (case.part, f"{case.name} {passes}", name)
            work = case.work[backward]
            try:
                if time.monotonic() > self.end:
                    raise TimeoutError(f"left out after {DEADLINE} s")
                if check is not None and not extra:
                    extra = dict(zip(("error", "gradient error"), check(), strict=True))
                if extra and not (extra["error"] <= FORWARD and extra["gradient error"] <= GRADIENT):
                    raise ArithmeticError("it disagrees with the reference")
                times = measure(bool(backward))
            except Exception as error:  # out of memory, a peer that does not run here: said in the row, not hidden
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:90]
                self.rows.append(Row(*where, extra=extra | {"not timed": reason}))
                continue
            limit = max(work.limits(self.ceilings).values())
            rate = {"TFLOP/s": work.flops / times.median / 1e9}
            row = Row.timed(*where, times, ratio=times.median / limit, against="limit", extra=rate | extra)
            self.rows.append(row)

    def jax(self, case: _Case, name: str, function: Callable, check: Callable | None = None) -> None:
        f, g = jax.jit(function), forward_backward(function)
        plain = [arguments for _, *arguments in case.sets]

        def measure(backward):
            return rotating(*((g, case.sets) if backward else (f, plain)), seconds=self.seconds)

        self.contestant(case, name, measure, check)

    def torch(self, case: _Case, peer: Callable, shape: dict) -> None:
        self.contestant(case, peer.__name__, lambda backward: peer(shape, backward, self.seconds))

    def limits(self, case: _Case) -> None:
        for passes, work in zip(PASSES, case.work, strict=True):
            for name, milliseconds in work.limits(self.ceilings).items():
                self.rows.append(Row(case.part, f"{case.name} {passes}", name, milliseconds))


def rows(only: str | None, quick: bool) -> tuple[cost.Ceilings, list[Row]]:
    measured = ceilings(256 if quick else 8192, jnp.bfloat16, 2**20 if quick else 2**31)
    run = _Run(measured, seconds=0.1 if quick else 1.0)
    if only in (None, stick_breaking.PART):
        for shape in [dict(B=2, T=256, N=2, H=64)] if quick else ATTENTION:
            _attention(run, shape)
    if only in (None, experts.PART):
        for shape in [dict(T=128, k=2, D=32, F=32, E=4)] if quick else EXPERTS:
            _experts(run, shape)
    return run.ceilings, sorted(run.rows, key=lambda row: (row.part, row.case))


def _attention(run: _Run, shape: dict) -> None:
    # Logits N(-4,1) are those that early exit is honest on: plain normal ones would skip nearly everything.
    make = partial(stick_breaking.inputs, dtype=jnp.bfloat16, mean=-4.0)
    work = [cost.stick_breaking(**shape, itemsize=2, backward=b) for b in (False, True)]
    sets = [(cotangent, *qkv) for cotangent, *qkv in (make(jax.random.key(i), **shape) for i in (0, 1))]
    case = _Case(stick_breaking.PART, "B{B} N{N} T{T} H{H} bf16".format(**shape), work, sets)
    # Two heads are enough to compare, and the reference's scores of all of them are tens of gigabytes.
    cotangent, *small = make(jax.random.key(2), **(shape | dict(B=1, N=2)))
    expected = exact(stick_breaking.attention(implementation="reference"), cotangent, small)
    for settings in ({}, {"skip_below": -24.0}):
        for name in implementations("stick_breaking_attention", *sets[0][1:], **settings):
            if settings and name == "reference":
                continue  # it skips nothing
            f = stick_breaking.attention(implementation=name, **settings)
            label = " ".join([name, *(f"{k}={v:g}" for k, v in settings.items())])
            run.jax(case, label, f, lambda f=f: errors(f, expected, cotangent, small))
    no_rem = [(cotangent[0], *qkv) for cotangent, *qkv in sets]
    run.jax(case._replace(sets=no_rem), "cudnn softmax", gpu_peers.softmax)
    for peer in gpu_peers.attention():
        run.torch(case, peer, shape)
    run.limits(case)


def _experts(run: _Run, shape: dict) -> None:
    E, make = shape["E"], partial(experts.inputs, dtype=jnp.bfloat16)
    work = [cost.experts(**shape, itemsize=2, backward=b) for b in (False, True)]
    (first, chosen), (second, _) = (make(jax.random.key(i), **shape) for i in (0, 1))
    case = _Case(experts.PART, "T{T} D{D} F{F} E{E} k{k} bf16".format(**shape), work, [first, second])
    (cotangent, *small), few = make(jax.random.key(2), **(shape | dict(T=min(shape["T"], 2048))))
    expected = exact(experts.experts(few, E, implementation="reference"), cotangent, small)
    _, x, w_in, w_out, gates = first
    names = implementations("expert_mlp", x, w_in, w_out, jax.eval_shape(lambda: route(chosen, E)), gates)
    # Each as a function of the routing: the check has fewer tokens.
    contestants = {name: lambda c, name=name: experts.experts(c, E, implementation=name) for name in names}
    contestants |= {name: lambda c, dot=dot: gpu_peers.ragged_mlp(dot, c, E) for name, dot in gpu_peers.ragged_dots()}
    for name, routed in contestants.items():
        run.jax(case, name, routed(chosen), lambda routed=routed: errors(routed(few), expected, cotangent, small))
    for peer in gpu_peers.experts():
        run.torch(case, peer, shape)
    run.limits(case)
