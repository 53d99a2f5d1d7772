"""python -m benchmarks.halting RUN [--seconds S] [--json]: what a language model saves with a lower halting threshold.

RUN is the run folder of a Sparse Universal Transformer that was trained as a language model. Such a model applies one
block repeatedly. A token halts when the sum of its halting probabilities reaches the threshold. Then the block is not
applied to it any more. For each threshold, the benchmark measures the loss, the blocks per token, the rows that the
experts compute per token, and the time. The calls with different thresholds take turns on the same held-out text, so
that other work on the machine slows all of them equally. --json also writes benchmarks/results/halting.json.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from stickjax.config.command import Parser, command
from stickjax.data.corpus import load_corpus
from stickjax.data.heldout import heldout_windows
from stickjax.evaluation.pairs import THRESHOLDS
from stickjax.models import universal
from stickjax.storage.run_folder import load

from .report import Row, compared, machine, write_json
from .timing import interleave

TOKENS = 4096
RESULTS = Path(__file__).parent / "results" / "halting.json"


@jax.jit
def _read(model, windows, threshold):
    """Return three means over tokens: loss in bits, number of blocks, number of rows that the experts compute.

    `windows` [windows, T + 1]: held-out tokens. `threshold`: the halting threshold.
    """
    output = universal.apply(model, {"tokens": windows[:, :-1]}, threshold=threshold)
    nll = optax.softmax_cross_entropy_with_integer_labels(output.logits, windows[:, 1:])
    rows = sum(counts.sum() for counts in output.rows.values())
    return nll.mean() / jnp.log(2), output.depth.mean(), rows / nll.size


def measured(run: str, seconds: float) -> list[Row]:
    """Measure the model in the run folder `run` for about `seconds`. Return one row per halting threshold.

    The field `contestant` of a row is the threshold. Raises ValueError if the model is not a language model that halts,
    or if every held-out document is shorter than `data.T` tokens.
    """
    loaded = load(run)
    if not isinstance(loaded.model, universal.LanguageModel):
        raise ValueError(f"{run} has no language model that halts; use, for example, a run of configs/sut_lm_tiny.py")
    data = loaded.config.data
    _, heldout = load_corpus(data)
    pieces, real = heldout_windows(heldout, data.T, lengths=(1,), max_tokens=TOKENS).pieces(1)
    windows = jnp.asarray(pieces[real.all(1)])
    if not len(windows):
        raise ValueError(
            f"every held-out document of {heldout.source} is shorter than data.T={data.T} tokens; use a run with a "
            "smaller data.T"
        )
    calls = {f"{t:g}": partial(_read, loaded.model, windows, jnp.float32(t)) for t in THRESHOLDS}
    found, times = {t: map(float, call()) for t, call in calls.items()}, interleave(calls, seconds=seconds)
    case = f"F={loaded.config.model.F}, {windows.shape[0]} x {data.T} tokens"
    names = "bits per token", "depth", "expert rows per token"
    return [
        dataclasses.replace(row, extra=dict(zip(names, found[row.contestant], strict=True)))
        for row in compared("halting", case, times, next(iter(calls)), {}, {})
    ]


def table(rows: list[Row]) -> Table:
    result = Table(title=rows[0].case)
    for name in ("threshold", *rows[0].extra, "median ms", "best ms"):
        result.add_column(name, justify="right")
    for row in rows:
        bits, depth, ran = row.extra.values()
        said = row.contestant, f"{bits:.3f}", f"{depth:.2f}", f"{ran:.2f}"
        result.add_row(*said, f"{row.milliseconds:.0f}", f"{row.best:.0f}")
    return result


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.halting", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="run folder of a language model that halts")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to measure (default 30)")
    parser.add_argument("--json", action="store_true", help=f"also write benchmarks/results/{RESULTS.name}")
    arguments = parser.parse_args(argv)
    info = machine()
    rows = measured(arguments.run, arguments.seconds)
    if arguments.json:
        write_json(RESULTS, info, rows)
    Console(width=100).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
