"""Training data for models that read examples: pairs of sentences, single sentences, or translations.

A batch of pairs has `left` [B,T], `right` [B,T] and `label` [B]. A batch of sentences has `tokens` [B,T] and `label`
[B]. A batch of translations has `source` [B,S], `brackets` [B,S] and `target` [B,T]. All arrays are int32. Texts are
padded on the right with id 0. `brackets` shows the tree of the source: how many brackets close after each word.
"""

from functools import partial

import grain
import numpy as np

from stickjax.config import Config, DataConfig
from stickjax.data.batches import TrainingData, batches
from stickjax.data.labelled import labelled_task
from stickjax.data.task import Task
from stickjax.data.tasks import Examples, listops, logic, questions, scan
from stickjax.data.tasks.encoding import words_in


def _up_to(length: int, bounds: tuple[int, ...]) -> int:
    """Return the smallest bound that is at least `length`. If all `bounds` are smaller, return the largest bound."""
    return next((bound for bound in bounds if length <= bound), bounds[-1])


def _logic(d: DataConfig) -> Task:
    examples = partial(logic.examples, draws=d.examples, split=d.split, valid_every=d.valid_every)
    ids = {"V": len(logic.VOCABULARY), "classes": len(logic.RELATIONS)}
    return Task(
        "pairs of logic", ids, examples, logic.VOCABULARY.encode,
        dict.fromkeys(["left", "right"], logic.VOCABULARY.decode), logic.RELATIONS, bucket=lambda row: row.bucket,
        bucket_name="operators", brackets=str,  # the texts contain their brackets
    )  # fmt: skip


def _listops(d: DataConfig) -> Task:
    examples = partial(listops.examples, count=d.examples, valid_every=d.valid_every)
    ids = {"V": len(listops.VOCABULARY), "classes": 10}
    return Task(
        "sentences of listops", ids, examples, listops.VOCABULARY.encode, {"tokens": listops.VOCABULARY.decode},
        tuple("0123456789"),
        bucket=lambda row: _up_to(words_in(row.text), (10, 20, 30, 40, 50, 100, 200, 400, 1000)),
        bucket_name="tokens, up to", brackets=listops.binary,
    )  # fmt: skip


def _scan(d: DataConfig) -> Task:
    def examples(part: str, T: int | None = None, **options) -> Examples:
        # T limits only the actions: commands are much shorter, with at most 9 words.
        return scan.examples(part, T=None, S=T, split=d.split or "simple", valid_every=d.valid_every, **options)

    ids = {"V": len(scan.COMMANDS), "V_target": len(scan.ACTIONS)}
    return Task(
        "translations of scan", ids, examples, scan.COMMANDS.encode,
        {"source": scan.COMMANDS.decode, "target": scan.ACTIONS.decode},
        bucket=lambda row: _up_to(words_in(row.actions), (8, 16, 22, 24, 28, 32, 40, 48)), bucket_name="actions, up to",
        brackets=scan.brackets,
    )  # fmt: skip


def _questions(d: DataConfig) -> Task:
    if d.valid_every:
        raise ValueError(
            f"valid_every={d.valid_every} is not used by source='questions', which always generates 1000 examples for "
            "validation; set data.valid_every=0"
        )

    def examples(part: str, T: int | None = None, **options) -> Examples:
        return questions.examples(part, T=T, S=T, count=d.examples, **options)

    words = questions.VOCABULARY
    return Task(
        "translations of questions", {"V": len(words), "V_target": len(words)}, examples, words.encode,
        {"source": words.decode, "target": words.decode}, brackets=questions.brackets,
    )  # fmt: skip


# {what a model reads (`config.model.reads`): {`data.source`: a function from a DataConfig to its task}}
TASKS_OF = {
    "pairs": {"logic": _logic, "labelled": partial(labelled_task, names=("left", "right"))},
    "sentences": {"listops": _listops, "labelled": partial(labelled_task, names=("tokens",))},
    "translation": {"scan": _scan, "questions": _questions},
}


def task_of(config: Config) -> Task:
    """Return the Task for a config: the examples of `config.data.source`, in the form that `config.model` reads.

    A model reads pairs of sentences, single sentences or translations. Raises ValueError if the source does not have
    examples of the form that the model reads.

    >>> from stickjax.config import SutConfig
    >>> task_of(Config(SutConfig(classes=7), DataConfig(source="logic"))).ids
    {'V': 12, 'classes': 7}
    """
    reads, d = config.model.reads, config.data
    if reads not in TASKS_OF:
        raise ValueError(
            f"this model of family={config.model.family!r} reads {reads}, not examples; use a model that reads pairs, "
            "sentences or translations"
        )
    tasks = TASKS_OF[reads]
    if d.source not in tasks:
        known = " or ".join(map(repr, tasks))
        raise ValueError(
            f"this model of family={config.model.family!r} reads {reads}: data.source must be {known}, not {d.source!r}"
        )
    return tasks[d.source](d)


def examples_of(config: Config, part: str, **options) -> Examples:
    """Return examples of `config.data.source` for training or evaluation, in the form that `config.model` reads.

    `part` says which examples: "train", "valid" (for validation) or "test". The source "questions" also has the part
    "gen", which tests generalisation. Texts for "train" and "valid" have at most `config.data.T` tokens; other texts
    may have any length. For the source "scan", T limits the actions, but not the commands. `options` are arguments for
    the function `examples` of the source. If `options` has T, it is the limit instead, for every part.

    Raises ValueError if the source does not have examples of the form that the model reads. The function `examples` of
    the source may also raise ValueError.
    """
    options = {"T": config.data.T if part in ("train", "valid") else None} | options
    return task_of(config).examples(part, **options)


def example_data(config: Config) -> TrainingData:
    """Load the training examples of `config.data.source`, in the form that `config.model` reads.

    Raises ValueError if the source does not have examples of this form, or has fewer than B of them.
    """
    d, task = config.data, task_of(config)
    examples = task.examples("train", T=d.T)
    if len(examples) < d.B:
        raise ValueError(f"B={d.B} is more than the number of training examples: {len(examples)} {task.name}")
    source, digest = LengthBucketedBatches(examples, d.B, d.seed, config.model.padded_to), examples.digest()
    summary, heldout_hash = f"{len(examples):,} {task.name}, {digest}", None
    if task.heldout is not None:  # read the held-out rows now, so that an error in them comes before training
        heldout = task.examples("test")
        heldout_hash, labels = heldout.digest(), ", ".join(task.labels)
        summary += f"; {len(task.labels)} labels: {labels:.80}; {len(heldout):,} rows are held out"
        if d.valid_every:
            task.examples("valid", T=d.T)

    def loader(index: int, count: int) -> grain.DatasetIterator:
        rows = slice(index * d.B // count, (index + 1) * d.B // count)
        own = lambda batch: {name: array[0][rows] for name, array in batch.items()}  # noqa: E731
        return batches(source, 1, d.seed, transform=own, first=_ShortFirst(source, d.curriculum, d.seed))

    return TrainingData(
        loader, task.ids, digest, task.name, summary, task.tokenizer, task.heldout, heldout_hash, task.files
    )


class LengthBucketedBatches:
    """Random access to batches of B examples, where the examples of a batch have about the same length.

    The length of an example is the number of tokens of its longest text. The batches are sorted by length, shortest
    first. The texts of a batch are padded to a common length: a multiple of `padded_to`, but at most the length of the
    arrays in `examples`. The sources and the targets of translations are padded separately. Batches of random examples
    would need about twice the work, because they would have more padding. `seed` decides which examples of the same
    length are in one batch. The longest examples are left out if they do not fill a batch.
    """

    def __init__(self, examples: Examples, B: int, seed: int, padded_to: int = 8):
        lengths = examples.lengths()
        longest = lengths.max(1, initial=0)
        order = np.random.default_rng(seed).permutation(len(longest))
        order = order[np.argsort(longest[order], kind="stable")]
        self.examples, self.batches = examples, order[: len(order) // B * B].reshape(-1, B)
        self.widths = -(-lengths[self.batches].max(1, initial=0) // padded_to) * padded_to

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        examples = [self.examples[i] for i in self.batches[index]]
        batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        for group, width in zip(self.examples.texts, self.widths[index], strict=True):
            batch |= {name: batch[name][:, :width] for name in group}
        return batch


class _ShortFirst:
    """A curriculum: a sequence of `steps` batches, which begins with batches of short examples.

    The batches of `source` are sorted by length, shortest first. Batch i of the sequence is drawn at random from the
    first max(1/10, (i + 1) / steps) * len(source) batches of `source`. `seed` decides the random numbers.
    """

    def __init__(self, source: LengthBucketedBatches, steps: int, seed: int):
        self.source, self.steps, self.seed = source, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        known = max(1, int(len(self.source) * max(0.1, (index + 1) / self.steps)))
        return self.source[int(np.random.default_rng([self.seed, index]).integers(known))]
