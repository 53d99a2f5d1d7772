"""python -m benchmarks.halting RUN [--seconds S]: what a lower halting threshold saves of a trained language model.

RUN is a run of a Sparse Universal Transformer. Expert rows are counted; the thresholds take turns on the same held-out
text, so that other work on the machine slows all of them.
"""

import argparse
import sys
from functools import partial

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from stickjax.accuracy import THRESHOLDS
from stickjax.corpus import load_corpus
from stickjax.data import heldout_windows
from stickjax.models import sut
from stickjax.run import load

from .timing import interleave

TOKENS = 4096


@jax.jit
def _read(model, windows, threshold):
    """Bits per token, mean depth, and expert rows per token."""
    output = sut.apply(model, {"tokens": windows[:, :-1]}, threshold=threshold)
    nll = optax.softmax_cross_entropy_with_integer_labels(output.logits, windows[:, 1:])
    rows = sum(counts.sum() for counts in output.rows.values())
    return nll.mean() / jnp.log(2), output.depth.mean(), rows / nll.size


def measured(run: str, seconds: float) -> Table:
    """A row per threshold. ValueError for a run of another model."""
    loaded = load(run)
    if not isinstance(loaded.model, sut.LanguageModel):
        raise ValueError(f"{run} has no language model that halts; python -m stickjax.train configs/sut_lm_tiny.py")
    data = loaded.config.data
    _, heldout = load_corpus(data)
    windows = jnp.asarray(heldout_windows(heldout, data.T, lengths=(1,), max_tokens=TOKENS).pieces(1))
    calls = {t: partial(_read, loaded.model, windows, jnp.float32(t)) for t in THRESHOLDS}
    found, times = {t: call() for t, call in calls.items()}, interleave(calls, seconds=seconds)
    table = Table(title=f"{run}, {windows.shape[0]} x {data.T} tokens")
    for name in ("threshold", "bits per token", "depth", "expert rows per token", "median ms", "best ms"):
        table.add_column(name, justify="right")
    for t, (bits, depth, rows) in found.items():
        said = f"{t:g}", f"{bits:.3f}", f"{depth:.2f}", f"{rows:.2f}"
        table.add_row(*said, f"{times[t].median:.0f}", f"{times[t].best:.0f}")
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.halting", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing")
    arguments = parser.parse_args(argv)
    try:
        table = measured(arguments.run, arguments.seconds)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
