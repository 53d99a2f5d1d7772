"""Training data for a classifier: batches of pairs of sentences, each pair with a label."""

import hashlib

import grain
import numpy as np

from stickjax.config import Config
from stickjax.data.batches import TrainingData, batches
from stickjax.data.tasks import Examples, logic


def pair_data(config: Config) -> TrainingData:
    """Load the pairs of sentences of `config.data.source` as training data.

    Raises ValueError if the source has no pairs, or other labels than the model.
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
    """Random access to batches of B pairs with about the same length. The batches are sorted, shortest pairs first.

    The length of a pair is the length of its longer sentence, in tokens. The sentences of a batch are padded to a
    multiple of 8. In a batch of random pairs, all sentences would be padded to the longest one, and training would take
    twice the work. `seed` decides which pairs of the same length are in one batch.
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
    """A curriculum of `steps` steps over the batches of `source`, which are sorted by length.

    Step i draws a random batch from the shortest ones: from the first max(1/10, (i + 1) / steps) of all batches.
    """

    def __init__(self, source: LengthBucketedBatches, steps: int, seed: int):
        self.source, self.steps, self.seed = source, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        known = max(1, int(len(self.source) * max(0.1, (index + 1) / self.steps)))
        return self.source[int(np.random.default_rng([self.seed, index]).integers(known))]


def pair_examples(config: Config, part: str, **options) -> Examples:
    """Return the pairs of sentences for the classifier of a config; `part` is "train" or "test".

    `config.data.examples` pairs are drawn and divided into the two parts. `options` are passed to
    `stickjax.data.tasks.logic.examples`. Raises ValueError if the source has no pairs, or other labels than the model.
    """
    if config.data.source != "logic":
        raise ValueError(f"classes={config.model.classes} needs pairs: source='logic', not {config.data.source!r}")
    if config.model.classes != (relations := len(logic.RELATIONS)):
        raise ValueError(
            f"classes={config.model.classes} must be {relations}, the number of relations of source='logic'"
        )
    options = dict(T=config.data.T, draws=config.data.examples) | options
    return logic.examples(part, **options)
