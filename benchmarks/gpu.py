"""The run for a machine with a GPU: check every feature against the fp32 reference, then time what agrees.

In one process and under ten minutes on an H200, the rows that matter most first: a case that would begin after
`gpu_run.DEADLINE` seconds is left out, and its row says so. Should a kernel hang, the rows so far are still reported:
see `give_up_after`.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, explain

from . import cost, experts, gpu_attention, gpu_cases, gpu_decode, gpu_experts, stick_breaking, trained_logits
from .gpu_run import DEADLINE, Run, with_ratios
from .report import Row
from .timing import ceilings

PEERS = (*gpu_attention.PEERS, *gpu_experts.PEERS)
TILES = {"mosaic": ((64, 64),), "triton": ((128, 32), (64, 64))}  # to time next to those chosen
HANGS = DEADLINE + 90  # seconds: a row that began before the deadline ends by then


def available() -> bool:
    """Whether JAX sees a GPU. Asks JAX to allocate as it goes: the torch peers need memory of the same GPU."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return jax.default_backend() == "gpu"


def chip() -> str:
    """A file name: "NVIDIA H200" -> "nvidia-h200"."""
    return "-".join(jax.devices()[0].device_kind.lower().split())


def implementations(op: str, *arguments, **settings) -> Iterator[str]:
    """Those of an op that take this call here, but the quadratic reference."""
    for name in dispatch.NAMES[:-1]:
        try:
            explain(op, *arguments, **settings, implementation=name)
        except NotImplementedError:
            continue
        yield name


def attention_kernels() -> tuple[str, ...]:
    """Those that take a plain call of attention here, the best first; plain JAX only where no kernel does."""
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    every = tuple(implementations("stick_breaking_attention", x, x, x))
    return tuple(name for name in every if name != "xla") or every


@contextlib.contextmanager
def give_up_after(seconds: float, report: Callable[[], None], leave=os._exit) -> Iterator[None]:
    """If the body takes longer, report and end the process: nothing else stops a kernel that waits for ever."""

    def give_up():
        print(f"error: still running after {seconds:.0f} s; these are the rows so far", file=sys.stderr)
        report()
        sys.stdout.flush()
        leave(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def measured_ceilings(quick: bool) -> cost.Ceilings:
    size, copied = (256, 2**20) if quick else (8192, 2**32)
    return ceilings(size, jnp.bfloat16, copied, seconds=0.1 if quick else 2.0, queued=True)


def rows(only: str | None, quick: bool, measured: cost.Ceilings, collected: list[Row]) -> None:
    """Append every row to `collected` as it comes."""
    run = Run(measured, seconds=0.05 if quick else 0.4, rows=collected)
    best, *others = kernels = attention_kernels()
    features = gpu_cases.QUICK if quick else tuple(gpu_cases.FEATURES)
    first, *shapes = gpu_attention.QUICK if quick else gpu_attention.SHAPES
    if attends := only in (None, stick_breaking.PART):
        gpu_cases.rows(run, best, features)
        # Plain JAX only once, as a measure of what the kernels bring: its loops take seconds at the larger shapes.
        _shape(run, gpu_attention, first, kernels, **({} if quick else dict(others=("xla",), tiles=TILES)))
        for shape in gpu_decode.QUICK if quick else gpu_decode.SHAPES:
            _shape(run, gpu_decode, shape, kernels, gpu_decode.QUICK_LENGTHS if quick else gpu_decode.LENGTHS)
    if only in (None, experts.PART):
        for shape in gpu_experts.QUICK if quick else gpu_experts.SHAPES:
            _shape(run, gpu_experts, shape, implementations)
    if attends:
        for shape in shapes:
            _shape(run, gpu_attention, shape, kernels)
        for other in others:
            gpu_cases.rows(run, other, features)


def _shape(run: Run, part, shape: dict, *arguments, **settings) -> None:
    """A shape whose inputs do not even fit costs only itself."""
    try:
        run.require_time()
        part.rows(run, shape, *arguments, **settings)
    except Exception as error:
        run.failed(part.PART, " ".join(f"{letter}{size}" for letter, size in shape.items()), "all", error)


def finished(collected: list[Row]) -> list[Row]:
    """The rows so far, with ratios, and last what the checks said."""
    rows = with_ratios(list(collected), PEERS)
    checks = [row for row in rows if " checks" in row.part]
    passed = [row for row in checks if row.extra.get("passed") == "yes"]
    others = [f"{row.case} ({row.contestant})" for row in checks if row not in passed]
    extra = {"passed": len(passed), "did not": "; ".join(others) or "none"}
    logits = Row("summary", "logits", "stick_breaking", extra={"of": trained_logits.source()})
    return [*rows, logits, Row("summary", "checks", "all", extra=extra)]
