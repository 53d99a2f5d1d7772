"""Held-out bits per byte at 1, 2, 4 and 8 times the training length: the same bytes are scored at every length.

python -m stickjax.evaluate RUN [RUN ...] [--plot PNG]

A classifier of pairs is evaluated by `stickjax.accuracy` instead.
"""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from stickjax import accuracy, plots
from stickjax.command import Parser, command
from stickjax.config import Config
from stickjax.corpus import load_corpus
from stickjax.data import heldout_windows
from stickjax.disk import write_file
from stickjax.metrics import read_metrics
from stickjax.models.family import apply
from stickjax.models.sut import LanguageModel
from stickjax.models.transformer import Transformer
from stickjax.options import parse_changes
from stickjax.plots import Records
from stickjax.run import load, read_config

LENGTHS = (1, 2, 4, 8)


@jax.jit
def _sums(model: Transformer | LanguageModel, windows: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
    """Over the targets of windows [B, T+1] for which `real` [B] is true: the negative log-likelihood, in nats, and of a
    model that halts the mean number of blocks."""
    output = apply(model, {"tokens": windows[:, :-1]})
    by_token = {"nll": optax.softmax_cross_entropy_with_integer_labels(output.logits, windows[:, 1:])}
    if isinstance(model, LanguageModel):
        by_token["depth"] = output.depth
    return {name: jnp.where(real[:, None], values, 0).sum() for name, values in by_token.items()}


def evaluate(
    model: Transformer | LanguageModel,
    config: Config,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    max_tokens: int = 2**17,
    batch_tokens: int = 2**13,
) -> Records:
    """Bits per byte of the held-out text, at contexts of m * T tokens for every m of `lengths`.

    Windows of max(lengths) * T tokens, each within one document, are cut in pieces of m * T; every piece begins
    without context. So all lengths score the same targets, and a longer one only adds context.

    Args:
      model: the parameters.
      config: its data section names the text and T.
      lengths: multiples of T; each must divide the largest.
      max_tokens: targets to score.
      batch_tokens: tokens in one call of the model.

    Returns:
      A record {"multiple", "context", "bits_per_byte", "bits_per_token", "tokens", "bytes", "text"} per length; of a
      model that halts also "depth", the mean number of blocks.

    Raises:
      ValueError: no held-out document is long enough.
    """
    _, heldout = load_corpus(config.data)
    windows = heldout_windows(heldout, config.data.T, lengths=lengths, max_tokens=max_tokens)
    records = []
    for m in lengths:
        pieces = windows.pieces(m)
        B = max(1, batch_tokens // (m * config.data.T))
        real = np.arange(-(-len(pieces) // B) * B) < len(pieces)
        padded = np.concatenate([pieces, np.repeat(pieces[:1], len(real) - len(pieces), 0)])
        batches = zip(np.split(padded, len(real) // B), np.split(real, len(real) // B), strict=True)
        parts = [jax.device_get(_sums(model, *batch)) for batch in batches]
        sums = {name: sum(float(part[name]) for part in parts) for name in parts[0]}
        bits, tokens = sums["nll"] / math.log(2), pieces.shape[0] * m * config.data.T
        record = dict(
            multiple=m, context=m * config.data.T, bits_per_byte=bits / windows.bytes, bits_per_token=bits / tokens,
            tokens=tokens, bytes=windows.bytes, text=heldout.hash,
        )  # fmt: skip
        records.append(record | ({"depth": sums["depth"] / tokens} if "depth" in sums else {}))
    return records


def depths(model: LanguageModel, config: Config, *, lines: int = 4, T: int = 64) -> list[tuple[list[str], np.ndarray]]:
    """The tokens of some held-out windows, as text, and the mean number of blocks of each."""
    _, heldout = load_corpus(config.data)
    T = min(T, config.data.T)
    windows = heldout_windows(heldout, T, lengths=(1,), max_tokens=lines * T).tokens[:, :-1]
    found = jax.device_get(apply(model, {"tokens": windows}).depth)
    decode = lambda token: heldout.tokenizer.decode([int(token)]).encode("unicode_escape").decode()  # noqa: E731
    return [([decode(token) for token in row], depth) for row, depth in zip(windows, found, strict=True)]


def table(runs: dict[str, Records]) -> Table:
    """Bits per byte, a row per run and a column per context length."""
    result = Table(title="held-out bits per byte")
    result.add_column("run")
    first = next(iter(runs.values()))
    for record in first:
        result.add_column(f"{record['multiple']}x ({record['context']})", justify="right")
    for name, records in runs.items():
        result.add_row(name, *(f"{r['bits_per_byte']:.3f}" for r in records))
        if "depth" in records[0]:
            result.add_row("  mean depth", *(f"{r['depth']:.2f}" for r in records))
    return result


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m stickjax.evaluate")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; several are drawn in one picture")
    parser.add_argument("--step", type=int, help="evaluate the checkpoint of this step")
    parser.add_argument("--max-tokens", type=int, default=2**17, help="how many tokens to score")
    parser.add_argument("--max-pairs", type=int, default=1024, help="of a classifier, how many pairs of a bucket")
    parser.add_argument("--plot", help="path of the curves; in the first run's folder by default")
    words, rest = parser.parse_with_fields(argv)
    results = {}
    configs = {run: read_config(run) for run in words.runs}
    classes = {getattr(config.model, "classes", 0) for config in configs.values()}
    if len(classes) > 1:
        raise ValueError("classifiers and language models are not compared: evaluate them in two commands")
    for run, config in configs.items():
        loaded, folder = load(run, step=words.step, changes=parse_changes(config, rest)), Path(run)
        plots.plot_training({folder.name: read_metrics(run)}, folder / "training.png")
        if classes != {0}:
            limit = words.max_pairs
            results[folder.name] = accuracy.report(loaded.model, loaded.config, folder, limit)
            continue
        lengths = evaluate(loaded.model, loaded.config, max_tokens=words.max_tokens)
        results[folder.name] = lengths
        if isinstance(loaded.model, LanguageModel):
            plots.plot_depth(depths(loaded.model, loaded.config), folder / "depth.png")
        record = {"run": folder.name, "step": loaded.step, "lengths": lengths}
        write_file(folder / "evaluation.json", json.dumps(record, indent=2) + "\n")
    if classes != {0}:
        picture = words.plot or str(Path(words.runs[0]) / "accuracy.png")
        plots.plot_accuracy({name: accuracy.at_first_threshold(r) for name, r in results.items()}, picture)
    else:
        picture = words.plot or str(Path(words.runs[0]) / "length.png")
        plots.plot_length_curves(results, picture)
    console = Console(highlight=False)
    console.print(table(results) if classes == {0} else accuracy.table(results))
    if classes != {0} and len(results) == 1:
        console.print(accuracy.savings(*results.values()))
    print(f"curves: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
