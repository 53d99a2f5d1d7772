"""Training data for a classifier: batches of pairs of sentences, each pair with a label."""

import hashlib

import grain
import numpy as np

from stickjax.config import Config
from stickjax.data.batches import TrainingData, batches
from stickjax.data.tasks import Examples, logic


def pair_data(config: Config) -> TrainingData:
    """Generate the pairs of sentences that `config.data.source` names, and return them as data to train a classifier.

    Raises ValueError if this source has no pairs, or if `model.classes` is not the number of its labels.
    """
    d = config.data
    pairs = pair_examples(config, "train")
    source = LengthBucketedBatches(pairs, d.B, d.seed)
    digest = hashlib.sha256("\n".join(f"{row}" for row in pairs.rows).encode()).hexdigest()[:16]

    def loader(index: int, count: int) -> grain.DatasetIterator:
        rows = slice(index * d.B // count, (index + 1) * d.B // count)
        own = lambda batch: {name: array[0][rows] for name, array in batch.items()}  # noqa: E731
        return batches(source, 1, d.seed, transform=own, first=_ShortFirst(source, d.curriculum, d.seed))

    name = f"pairs of {d.source}"
    return TrainingData(loader, len(logic.VOCABULARY), digest, name, f"{len(pairs):,} {name}, {digest}")


class LengthBucketedBatches:
    """Random access to batches of B pairs of sentences, where the pairs of a batch have about the same length.

    The length of a pair is the number of tokens of its longer sentence. The batches are sorted by length, shortest
    first. The sentences of a batch are padded to a multiple of 8 tokens. Batches of random pairs would need about twice
    the work, because all sentences of a batch are padded to the longest one. `seed` decides which pairs of the same
    length are in one batch. The longest pairs are left out if they do not fill a batch.
    """

    def __init__(self, pairs: Examples, B: int, seed: int):
        longest = np.array([max(side.count(" ") + 1 for side in row[:2]) for row in pairs.rows])
        order = np.random.default_rng(seed).permutation(len(longest))
        order = order[np.argsort(longest[order], kind="stable")]
        self.pairs, self.batches = pairs, order[: len(order) // B * B].reshape(-1, B)
        self.T = -(-longest[self.batches].max(1, initial=0) // 8) * 8

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pairs = [self.pairs[i] for i in self.batches[index]]
        batch = {name: np.stack([pair[name] for pair in pairs]) for name in pairs[0]}
        return batch | {side: batch[side][:, : self.T[index]] for side in ("left", "right")}


class _ShortFirst:
    """A curriculum: a sequence of `steps` batches, which begins with batches of short sentences.

    Batch i is drawn at random from the first part of `source`, whose batches are sorted by length, shortest first. This
    part is the share max(1/10, (i + 1) / steps) of all batches. `seed` decides the random numbers.
    """

    def __init__(self, source: LengthBucketedBatches, steps: int, seed: int):
        self.source, self.steps, self.seed = source, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        known = max(1, int(len(self.source) * max(0.1, (index + 1) / self.steps)))
        return self.source[int(np.random.default_rng([self.seed, index]).integers(known))]


def pair_examples(config: Config, part: str, **options) -> Examples:
    """Return labelled pairs of sentences to train or test the classifier of a config; `part` is "train" or "test".

    `config.data.examples` pairs are drawn, duplicates are removed, and the other pairs are divided into the two parts.
    `options` are arguments for `stickjax.data.tasks.logic.examples`, and replace the values from the config.

    Raises ValueError if `config.data.source` has no pairs, or if `model.classes` is not the number of its labels.
    """
    if config.data.source != "logic":
        raise ValueError(
            f"classes={config.model.classes} needs pairs of sentences: use source='logic', not {config.data.source!r}"
        )
    if config.model.classes != (relations := len(logic.RELATIONS)):
        raise ValueError(
            f"classes={config.model.classes} must be {relations}, the number of relations of source='logic'"
        )
    options = dict(T=config.data.T, draws=config.data.examples) | options
    return logic.examples(part, **options)
