"""The GPU benchmark: it checks the results of the kernels against the fp32 reference, and times the kernels.

`python -m benchmarks --gpu` runs it. A run uses one process, and should take less than eight minutes on an H200. It
measures the most important rows of the tables first. Every stage has a deadline. A row that has not begun at the
deadline is recorded as left out, and the next run measures it. `gpu_record.py` decides which rows the next run takes
from the file of the last run.
"""

import os
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from . import experts, gpu_attention, gpu_cases, gpu_decode, gpu_experts, gpu_stages, stick_breaking, trained_logits
from .gpu_cases import implementations
from .gpu_record import LEFT_OUT
from .gpu_run import Run, with_ratios
from .report import Row

DEADLINE = 450  # no row begins later than this many seconds after the start; the last row should end within 480
PEERS = (*gpu_attention.PEERS, *gpu_experts.PEERS)
# {kernel: pairs (queries, keys) of tile sizes}: they are timed in addition to the sizes that the kernel chooses.
TILES = {"mosaic": ((64, 64),), "triton": ((128, 32), (64, 64))}
SPEED = "speed"
STAGES = (*gpu_stages.STAGES, SPEED)
TIMED = (stick_breaking.PART, experts.PART)


def available() -> bool:
    """Return whether JAX finds a GPU. Before the search, turn off the preallocation of GPU memory by JAX.

    JAX must not take all memory of the GPU, because the benchmark also times torch implementations on the same GPU.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return jax.default_backend() == "gpu"


def chip() -> str:
    """Return the name of the GPU as a part of a file name, such as "nvidia-h200" for "NVIDIA H200"."""
    return "-".join(jax.devices()[0].device_kind.lower().split())


def names() -> list[str]:
    """Return the names that the option `--only` accepts: stages, parts, calls to check, and shapes to time."""
    shapes = [*gpu_attention.SHAPES, *gpu_decode.SHAPES, *gpu_experts.SHAPES]
    return [*STAGES, *TIMED, *gpu_cases.CALLS, *gpu_cases.EXITS, *map(_name, shapes)]


def is_one(only: str | None) -> bool:
    """Return whether `only` is the name of a single call or shape, and not of a stage or a part.

    If it is, the rows of this call or shape are measured again, even if an earlier run recorded them.
    """
    return only is not None and only not in (*STAGES, *TIMED)


def attention_kernels() -> tuple[str, ...]:
    """Return the names of the kernels that can run stick-breaking attention on this GPU, such as ("triton",).

    The best kernel comes first. The function asks for a bfloat16 call without options such as a window. If no kernel
    can run this call, it returns ("xla",), the name of the implementation in plain JAX.
    """
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    every = tuple(implementations("stick_breaking_attention", x, x, x))
    return tuple(name for name in every if name != "xla") or every


def rows(run: Run, only: str | None = None) -> None:
    """Measure the rows of all checks and timings, and add each new row to the record of `run`.

    If `only` is given, measure only the rows of one stage, part, call or shape. `only` is its name, one of `names()`.
    """

    def wanted(*belongs_to: str) -> bool:
        return only is None or only in belongs_to

    def is_checked(stage: str, name: str) -> bool:
        return wanted(stage, name, experts.PART if name in gpu_cases.EXPERTS else stick_breaking.PART)

    def time_shapes(part, shapes: Iterable[dict], kernels, *arguments, **settings) -> None:
        for shape in shapes:
            if wanted(SPEED, _name(shape), experts.PART if part is gpu_experts else stick_breaking.PART):
                _time(run, part, shape, kernels, *arguments, **settings)

    def time_everything() -> None:
        first, *shapes = gpu_attention.QUICK if run.quick else gpu_attention.SHAPES
        lengths = gpu_decode.QUICK_LENGTHS if run.quick else gpu_decode.LENGTHS
        # Plain JAX ("xla") is timed at one shape only, to show the gain of the kernels. At the larger shapes its loops
        # take seconds.
        time_shapes(gpu_attention, [first], kernels, **({} if run.quick else dict(others=("xla",), tiles=TILES)))
        time_shapes(gpu_decode, gpu_decode.QUICK if run.quick else gpu_decode.SHAPES, kernels, lengths)
        time_shapes(gpu_experts, gpu_experts.QUICK if run.quick else gpu_experts.SHAPES, implementations)
        time_shapes(gpu_attention, shapes, kernels)

    checks, kernels = gpu_stages.Checks(run, is_checked), attention_kernels()
    try:
        checks.chosen()
        run.until(DEADLINE)
        time_everything()
        checks.others()
    finally:
        checks.close()


def _name(shape: dict) -> str:
    return " ".join(f"{letter}{size}" for letter, size in shape.items())


def _time(run: Run, part, shape: dict, *arguments, **settings) -> None:
    """Measure all rows of one shape. The function `rows` of the module `part` does the work.

    At the end, this function records a row whose field `contestant` is "every row". The row says that all rows of the
    shape were measured, or it names the error that stopped them, such as too little memory. The error is not raised, so
    the next shape is measured too. If an earlier run recorded the row "every row", this function does nothing, unless
    `run.again` is set.
    """
    row = SPEED, f"{part.PART} {_name(shape)}", "every row"
    if run.record.find(*row) and not run.again:
        return
    try:
        run.require_time()
        part.rows(run, shape, *arguments, **settings)
        run.require_time()
    except Exception as error:
        run.failed(*row, error)
    else:
        run.record.add(Row(*row, extra={"timed": "yes"}))


def finished(collected: list[Row]) -> list[Row]:
    """Return the rows of a run, with their times compared to the times of the peers, and then two summary rows.

    `collected`: the rows in the record of the run. The peers (PEERS) are other programs, such as "cudnn softmax". The
    first summary row says where the attention logits come from. The second one counts the checks that passed and the
    rows that were left out, and lists the checks that failed.
    """
    rows = with_ratios(collected, PEERS)
    checks = [row for row in rows if row.part in gpu_stages.STAGES or " checks" in row.part]
    passed = [row for row in checks if row.extra.get("passed") == "yes"]
    late = [row for row in rows if LEFT_OUT in row.extra]
    others = [f"{row.part} {row.case} ({row.contestant})" for row in checks if row not in passed and row not in late]
    extra = {"passed": len(passed), "did not pass": "; ".join(others) or "none", LEFT_OUT: len(late)}
    logits = Row("summary", "logits", "stick_breaking", extra={"of": trained_logits.source()})
    return [*rows, logits, Row("summary", "checks", "all", extra=extra)]


def is_passed_check(row: Row) -> bool:
    """Return whether the row is a passed check of the stage "lower", "correct" or "exit".

    The printed table leaves these rows out, because there are hundreds of them.
    """
    return row.part in gpu_stages.STAGES and row.extra.get("passed") == "yes"
