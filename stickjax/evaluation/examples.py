"""Compute the accuracy of a model that reads examples: the fraction of labels or whole translations that are right.

`python -m stickjax.evaluate RUN` calls `report` for such a model, with one exception. On the part "test", a model for
which `stickjax.evaluation.pairs.scores_halting` is True is evaluated by `stickjax.evaluation.pairs.report` instead.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

from stickjax.config import Config
from stickjax.data.examples import Task, examples_of, task_of
from stickjax.data.tasks import Examples
from stickjax.evaluation import trees
from stickjax.evaluation.plots import Records
from stickjax.models.families import family_of
from stickjax.system.disk import write_file
from stickjax.system.text import json_text

Say = Callable[[str], None]


def accuracy(
    model,
    config: Config,
    *,
    part: str = "test",
    max_examples: int = 1024,
    B: int = 128,
    say: Say = lambda text: None,
) -> Records:
    """Compute the accuracy of a model for each bucket: the fraction of examples whose label or translation is right.

    A bucket is a group of examples of about the same length, such as pairs of sentences with the same number of
    operators. Each bucket has a number, such as this number of operators. The field `bucket` of
    `stickjax.data.task.Task` computes it.

    Args:
      model: the module with the parameters.
      config: the config of the model; its data section names the source of the examples.
      part: which examples: "train", "valid", "test" or another part that the source has.
      max_examples: the largest number of examples that are used from each bucket. They are drawn at random, and are the
        same in every call.
      B: the largest number of examples in one call of the model.
      say: a function that is called with a line of progress before each bucket is evaluated.

    Returns:
      A record for every bucket, with the keys "bucket" (its number; None if all examples are in one bucket), "accuracy"
      and "examples" (the number of examples). For labels, there is also "majority", the fraction of examples with the
      most frequent label. For translations, there is also "first_word", the fraction of examples whose first word is
      right. If the model induces trees and the source has true trees, there is also "f1", the unlabelled F1 of the
      induced trees against the true trees.

    Raises:
      ValueError: `max_examples` is below 1, or `part` is unknown or has no examples.
    """
    if max_examples < 1:
        raise ValueError(f"max_examples={max_examples} (--max-pairs) must be at least 1")
    task, family = task_of(config), family_of(config.model)
    predict = jax.jit(family.predict)
    records = []
    for bucket, examples in buckets_of(config, part, max_examples).items():
        say(f"{len(examples):,} {task.name}" + ("" if bucket is None else f", {task.bucket_name}: {bucket}"))
        right, first, labels, pairs = [], [], [], []
        for batch, rows in batches_of(examples, min(B, max_examples)):
            exact, word = right_answers(predict, model, batch, len(rows))
            right.append(exact)
            if word is None:
                labels.append(batch["label"][: len(rows)])
            else:
                first.append(word)
            if task.brackets:
                pairs += _tree_pairs(task, family.induced_trees(model, batch), rows)
        record = {"bucket": bucket, "accuracy": float(np.concatenate(right).mean()), "examples": len(examples)}
        if labels:
            record["majority"] = float(np.bincount(np.concatenate(labels)).max() / len(examples))
        if first:
            record["first_word"] = float(np.concatenate(first).mean())
        records.append(record | ({"f1": trees.f1(pairs)} if pairs else {}))
    return records


def right_answers(predict: Callable, model, batch: dict, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Let the model answer the first `count` examples of a batch, and compare its answers with the right ones.

    `predict(model, inputs)` returns the answers: labels [B], or translations [B,T]. Return two boolean arrays [count]:
    True where the whole answer is right, and True where the first word of a translation is right. For labels, the
    second one is None.

    >>> batch = {"tokens": np.zeros((2, 3)), "label": np.array([1, 3])}
    >>> right_answers(lambda model, inputs: np.array([1, 2]), None, batch, 2)
    (array([ True, False]), None)
    """
    inputs = {name: x for name, x in batch.items() if name not in ("label", "target")}
    answers = jax.device_get(predict(model, inputs))[:count]
    if "label" in batch:
        return answers == batch["label"][:count], None
    return _compared(answers, batch["target"][:count])


def buckets_of(config: Config, part: str, max_examples: int) -> dict[int | None, Examples]:
    """Divide the examples of a source into buckets, which are groups of examples of about the same length.

    Return {number of a bucket: at most `max_examples` of its examples, drawn at random}. The number of a bucket is the
    result of `Task.bucket` for its examples, or None if all examples are in one bucket. `config.data` names the source,
    and `part` names a part of its examples, such as "test". Raises ValueError if the part has no examples.
    """
    task = task_of(config)
    # T=None: texts of any length. For logic: all 13 buckets, also buckets with more operators than any training pair.
    options = {"buckets": range(13)} if config.data.source == "logic" and config.data.split is None else {}
    examples = task.examples(part, T=None, **options)
    if not len(examples):
        raise ValueError(f"the part {part!r} of {task.name} has no examples")
    rows: dict = {}
    for i in np.random.default_rng(0).permutation(len(examples)):
        row = examples.rows[i]
        own = rows.setdefault(task.bucket(row) if task.bucket else None, [])
        if len(own) < max_examples:
            own.append(row)
    return {bucket: examples.with_rows(rows[bucket]) for bucket in sorted(rows, key=lambda bucket: bucket or 0)}


def batches_of(examples: Examples, B: int):
    """Yield (batch, rows) for all examples, the shortest first. A batch is a dictionary of B stacked examples.

    `rows` is the list of the elements of `examples.rows` that these examples are made from. If fewer than B examples
    remain for the last batch, its first example is repeated in the batch, but its row is not repeated in `rows`. Texts
    are padded to a power of two, at least 8, so that the model is compiled only a few times.
    """
    lengths = examples.lengths()
    order = np.argsort(lengths.max(1, initial=0), kind="stable")
    for start in range(0, len(order), B):
        index = order[start : start + B]
        chosen = [examples[i] for i in [*index, *[index[0]] * (B - len(index))]]
        batch = {name: np.stack([example[name] for example in chosen]) for name in chosen[0]}
        for group, longest in zip(examples.texts, lengths[index].max(0), strict=True):
            width = max(8, 1 << int(longest - 1).bit_length())
            batch |= {name: _padded(batch[name][:, :width], width) for name in group}
        yield batch, [examples.rows[i] for i in index]


def _padded(ids: np.ndarray, width: int) -> np.ndarray:
    return np.pad(ids, ((0, 0), (0, width - ids.shape[1])))


def _compared(answers: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare B translations `answers` [B,T] with their targets `targets` [B,S]. Both are token ids, padded with 0.

    Return two boolean arrays [B]: True where all words are right, and True where the first word is right.
    """
    T = max(answers.shape[1], targets.shape[1])
    answers, targets = _padded(answers, T), _padded(targets, T)
    return (answers == targets).all(1), answers[:, 0] == targets[:, 0]


def _tree_pairs(task: Task, induced: dict[str, list] | None, rows: list) -> list[tuple]:
    """Return a list of (induced tree, true tree) for all texts of `rows`, in order; an empty list if `induced` is None.

    `induced` is {name of an array of texts: [tree of each row]}, the result of `Family.induced_trees`. If a text
    contains brackets as tokens, they are removed from both trees. `task.brackets` gives the true trees, and must not be
    None.
    """
    if induced is None:
        return []
    pairs = []
    for i, row in enumerate(rows):
        for own, text in zip(induced.values(), _texts_read(task, row), strict=True):
            words = text.split()
            true, _ = trees.from_brackets(task.brackets(text).split())
            tree = trees.restricted(own[i], lambda i, words=words: words[i] not in "()")
            pairs.append((tree, true))
    return pairs


def _texts_read(task: Task, row) -> list[str]:
    """Return the texts of a row that the model reads, in order: all texts, except the target of a translation."""
    return [value for value in row if isinstance(value, str)][: len(task.inputs)]


def table(runs: dict[str, Records], bucket_name: str) -> Table:
    """Return a table of accuracies: a column for each run, a row for each bucket (examples of about the same length).

    `runs` is {name of a run: the records of `accuracy`}. `bucket_name` is the unit of the lengths in the first column,
    such as "operators"; "" if all examples are in one bucket. The last columns, such as "first word", show more
    results, but only of the first run.
    """
    first = next(iter(runs.values()))
    extra = [name for name in ("majority", "first_word", "f1") if name in first[0]]
    heads = {"majority": "commonest label", "first_word": "first word", "f1": "F1 of trees"}
    result = Table(title="held-out accuracy")
    for name in (bucket_name or "examples", "examples", *runs, *(heads[name] for name in extra)):
        result.add_column(name, justify="right")
    for rows in zip(*runs.values(), strict=True):
        bucket = "all" if rows[0]["bucket"] is None else str(rows[0]["bucket"])
        cells = [f"{r['accuracy']:.1%}" for r in rows] + [f"{rows[0][name]:.1%}" for name in extra]
        result.add_row(bucket, str(rows[0]["examples"]), *cells)
    return result


def report(model, config: Config, folder: Path | None, part: str, max_examples: int, say: Say) -> Records:
    """Compute the accuracy of a model, and return the records of `accuracy`. Most arguments are as in `accuracy`.

    If `folder` is not None, the records are written into this folder as accuracy.json. If the model induces trees and
    the source has true trees, the picture trees.png is added: the induced and the true trees of three examples.
    """
    records = accuracy(model, config, part=part, max_examples=max_examples, say=say)
    if folder is not None:
        write_file(folder / "accuracy.json", json_text({"part": part, "buckets": records}, indent=2) + "\n")
        if drawn := example_trees(model, config, part):
            trees.plot_trees(drawn, folder / "trees.png")
    return records


def example_trees(model, config: Config, part: str, count: int = 3, longest: int = 24) -> list[tuple]:
    """Return the trees of up to `count` examples as a list of (tree, words, title), which `trees.plot_trees` draws.

    Each text of two or more words gives two entries: its true tree, and the tree that the model induces. `part` names a
    part of the examples, such as "test". The longest examples whose texts have at most `longest` tokens are chosen. The
    list is empty if the model induces no trees, or if the source has no true trees.
    """
    task, family = task_of(config), family_of(config.model)
    if task.brackets is None:
        return []
    examples = examples_of(config, part)
    lengths = examples.lengths().max(1)
    fitting = np.flatnonzero(lengths <= longest)
    chosen = fitting[np.argsort(-lengths[fitting], kind="stable")][:count]
    drawn = []
    if not len(chosen):
        return drawn
    for batch, rows in batches_of(examples.with_rows([examples.rows[i] for i in chosen]), len(chosen)):
        if (induced := family.induced_trees(model, batch)) is None:
            return []
        pairs = _tree_pairs(task, induced, rows)
        texts = [text for row in rows for text in _texts_read(task, row)]
        for (tree, true), text in zip(pairs, texts, strict=True):
            words = [word for word in text.split() if word not in "()"]
            if len(words) > 1:
                drawn += [(true, words, "true tree"), (tree, words, f"induced tree, F1 {trees.f1([(tree, true)]):.0%}")]
    return drawn
