"""Evaluate a classifier of sentence pairs: its accuracy, and how much computation it saves by halting tokens.

The sentences are formulas of propositional logic, and the accuracy is computed for each number of logical operators.
`python -m stickjax.evaluate RUN` calls `report` for a Universal Transformer on the task logic (see `scores_halting`).
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from stickjax.config import Config
from stickjax.data.pairs import pair_examples
from stickjax.data.tasks import Examples, logic
from stickjax.evaluation import plots
from stickjax.evaluation.plots import Records
from stickjax.models.universal import PairClassifier, apply
from stickjax.system.disk import write_file
from stickjax.system.text import json_text

THRESHOLDS = (0.999, 0.8, 0.6, 0.5, 0.3)


@jax.jit
def _read(model: PairClassifier, pairs: dict[str, jax.Array], threshold) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the model on B pairs of sentences: apply its block until all tokens have halted, but at most L times.

    `threshold` is the halting threshold. `pairs` has the token ids `left` and `right` [B,T]. Return (the predicted
    labels [B], the depth of every token of both sentences [2,B,T], the number of (token, choice) pairs that experts
    computed). The depth of a token is the expected number of blocks that are applied to it, given its halting
    probabilities. A (token, choice) pair is a token with one of its chosen experts, in one block.
    """
    output = apply(model, pairs, threshold=threshold)
    return output.logits.argmax(-1), output.depth, sum(rows.sum() for rows in output.rows.values())


def accuracy(
    model: PairClassifier,
    config: Config,
    *,
    buckets: Iterable[int] = range(logic.BUCKETS),
    thresholds: Iterable[float] | None = None,
    max_pairs: int = 1024,
    B: int = 128,
    say: Callable[[str], None] = lambda text: None,
) -> Records:
    """Compute the fraction of held-out pairs that the model labels correctly, for each bucket and halting threshold.

    The index of the bucket of a pair is the larger number of logical operators of its two sentences, but at most 12.

    Args:
      model: the module with the parameters.
      config: its data section says how the pairs are generated.
      buckets: the indices of the buckets to evaluate.
      thresholds: the halting thresholds to try; None: only the threshold of the config.
      max_pairs: the largest number of pairs per bucket. All thresholds use the same pairs.
      B: the largest number of pairs in one call of the model.
      say: a function that is called with a line of progress before each bucket is evaluated.

    Raises:
      ValueError: `max_pairs` is below 1, or a bucket has no pairs.

    Returns:
      A record for every bucket and threshold, with the keys "bucket", "threshold", "accuracy", "majority" (the fraction
      of pairs with the most frequent label), "depth" (the mean depth of a token, in blocks), "rows" (the mean number of
      experts that computed a token, summed over the blocks), "seconds" (for all pairs of sentences, without compiling)
      and "pairs" (the number of pairs of sentences).
    """
    if max_pairs < 1:
        raise ValueError(f"max_pairs={max_pairs} must be at least 1")
    B = min(B, max_pairs)
    thresholds = [config.model.halting_threshold] if thresholds is None else list(thresholds)
    records = []
    for bucket in buckets:
        pairs = batches_of(config, bucket, max_pairs, B)
        labels = np.concatenate([batch["label"][pair_mask] for batch, pair_mask in pairs])
        say(f"pairs with {bucket} operators: {len(labels):,} at {len(thresholds)} halting thresholds")
        majority = np.bincount(labels).max() / len(labels)
        jax.block_until_ready(_read(model, pairs[0][0], thresholds[0]))  # compiles, so that compilation is not timed
        for threshold in thresholds:
            started = time.perf_counter()
            right, depth, rows, tokens = 0, 0.0, 0, 0
            for batch, pair_mask in pairs:
                chosen, depths, ran = jax.device_get(_read(model, batch, threshold))
                token_mask = np.stack([batch["left"], batch["right"]]) != 0
                right += (chosen == batch["label"])[pair_mask].sum()
                depth, rows, tokens = depth + depths[token_mask].sum(), rows + int(ran), tokens + token_mask.sum()
            seconds = time.perf_counter() - started
            records.append(
                dict(
                    bucket=bucket, threshold=threshold, accuracy=float(right / len(labels)), majority=float(majority),
                    depth=float(depth / tokens), rows=float(rows / tokens), seconds=seconds, pairs=len(labels),
                )
            )  # fmt: skip
    return records


def scores_halting(config: Config) -> bool:
    """Return True if `report` can evaluate a model with this config.

    The model must halt tokens, `config.data.source` must be "logic", and `config.data.split` must be None.
    """
    return hasattr(config.model, "halting_threshold") and config.data.source == "logic" and config.data.split is None


def batches_of(config: Config, bucket: int, max_pairs: int, B: int) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Return the held-out pairs of sentences of one bucket as a list of (batch, pair mask).

    A batch is {"left": token ids [B,T], "right": token ids [B,T], "label": [B]}. Token id 0 is padding. The pair mask
    [B] is False for the entries that only fill up the last batch. T is a multiple of 40. `bucket` is a number of
    logical operators, as in `accuracy`. At most `max_pairs` pairs are drawn at random.

    Raises ValueError if the bucket has no pairs.
    """
    drawn = pair_examples(config, "test", T=10_000, buckets=[bucket])
    order = np.random.default_rng(0).permutation(len(drawn))[:max_pairs]
    rows = [drawn.rows[i] for i in order]
    if not rows:
        raise ValueError(
            f"data.examples={config.data.examples} gives no held-out pair with {bucket} operators; "
            "try a larger data.examples"
        )
    # The model is compiled for every T. T is rounded up to a multiple of 40, so that there are few values.
    T = -(-max(side.count(" ") + 1 for row in drawn.rows for side in row[:2]) // 40) * 40
    pairs = Examples(rows, pair_examples(config, "test", T=T, buckets=[bucket]).arrays)
    batches = []
    for start in range(0, len(rows), B):
        index = np.arange(start, start + B)
        chosen = [pairs[i if i < len(rows) else 0] for i in index]
        batch = {name: np.stack([pair[name] for pair in chosen]) for name in ("left", "right", "label")}
        pair_mask = index < len(rows)
        for side in ("left", "right"):
            batch[side][~pair_mask] = 0
        batches.append((batch, pair_mask))
    return batches


def table(runs: dict[str, Records]) -> Table:
    """Return a table of the accuracy and the mean depth of every run, with a row per number of operators.

    `runs` is {name of a run: the records of `accuracy`}. If the records of a run have several halting thresholds, only
    the results at the first threshold are shown. The depth is the number of blocks per token.
    """
    result = Table(title="held-out accuracy")
    for name in ("operators", "pairs", "commonest label", *runs, *(f"depth of {name}" for name in runs)):
        result.add_column(name, justify="right")
    for rows in zip(*map(at_first_threshold, runs.values()), strict=True):
        first = rows[0]
        operators = f"{first['bucket']}{'+' if first['bucket'] == logic.BUCKETS - 1 else ''}"
        right = [f"{r['accuracy']:.1%}" for r in rows] + [f"{r['depth']:.2f}" for r in rows]
        result.add_row(operators, str(first["pairs"]), f"{first['majority']:.1%}", *right)
    return result


def savings(records: Records) -> Table:
    """Return a table of accuracy and computation, with a row per halting threshold in the records of `accuracy`.

    Three columns are means over all pairs of sentences: the accuracy; the depth, which is the number of blocks per
    token; and the number of experts that computed a token, summed over the blocks. The last column is the time, in
    percent of the time at the first threshold.
    """
    result = Table(title="what a lower halting threshold saves")
    for name in ("threshold", "accuracy", "depth", "expert rows per token", "time"):
        result.add_column(name, justify="right")
    whole = sum(r["seconds"] for r in at_first_threshold(records))
    for threshold, part in plots.group(records, "threshold").items():
        pairs = sum(r["pairs"] for r in part)
        right, depth, rows = (sum(r[name] * r["pairs"] for r in part) / pairs for name in ("accuracy", "depth", "rows"))
        share = sum(r["seconds"] for r in part) / whole
        result.add_row(f"{threshold:g}", f"{right:.1%}", f"{depth:.2f}", f"{rows:.2f}", f"{share:.0%}")
    return result


def at_first_threshold(records: Records) -> Records:
    return [r for r in records if r["threshold"] == records[0]["threshold"]]


def report(
    model: PairClassifier, config: Config, folder: Path | None, max_pairs: int, say: Callable[[str], None]
) -> Records:
    """Compute the accuracy of a classifier at the halting thresholds THRESHOLDS. Return the records of `accuracy`.

    If `folder` is not None, the records are written into this folder as accuracy.json. The pictures halting.png and
    depth.png are added. `max_pairs` and `say` are arguments of `accuracy`.
    """
    records = accuracy(model, config, thresholds=THRESHOLDS, max_pairs=max_pairs, say=say)
    if folder is None:
        return records
    write_file(folder / "accuracy.json", json_text(records, indent=2) + "\n")
    plots.plot_halting(records, folder / "halting.png")
    sentences = [side for bucket in (2, 6, 10) for side in depths(model, config, bucket)]
    plots.plot_depth(sentences, folder / "depth.png")
    return records


def depths(model: PairClassifier, config: Config, bucket: int) -> list[tuple[list[str], np.ndarray]]:
    """Return a list of (tokens as text, depth of each token) for the two sentences of one held-out pair.

    The pair is in the bucket `bucket` (see `accuracy`). The depth of a token is the expected number of blocks that are
    applied to it, given its halting probabilities and the halting threshold of the config.
    """
    ((batch, _),) = batches_of(config, bucket, 1, 1)
    _, found, _ = jax.device_get(_read(model, batch, jnp.float32(config.model.halting_threshold)))
    sides = [np.asarray(batch[side][0]) for side in ("left", "right")]
    return [
        (logic.VOCABULARY.decode(side).split(), depth[0][side != 0]) for side, depth in zip(sides, found, strict=True)
    ]
