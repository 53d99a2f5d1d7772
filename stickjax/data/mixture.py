"""Mix the examples of several sources in the proportions of their weights."""

import math
import sys
from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np


class Mixture(grain.transforms.DatasetSelectionMap):
    """An endless sequence of examples from several sources. The share of a source is proportional to its weight.

    Let w_1, ..., w_S be the weights. Among the first n examples of the mixture, the number c_i of examples of source i
    is computed one source after the other, from r_1 = n and W_i = w_i + ... + w_S:

        r_{i+1} = floor(r_i * (W_i - w_i) / W_i),    c_i = r_i - r_{i+1}.

    So c_i differs from n * w_i / W_1 by less than i, for every n. The numbers c_i depend only on n. So the number n
    alone describes a position in the mixture. `grain.MapDataset.mix` uses the same formula, but rounds the weights.

    Every source is read in epochs. An epoch uses every example of the source once, in a new order.

    >>> mixture = Mixture([range(3), range(100)], weights=[2, 1])
    >>> mixture.counts(10), mixture.epochs(10)
    ([7, 3], [2.3333333333333335, 0.03])
    >>> examples = mixture.dataset(seed=0)
    >>> sorted(examples[i] for i in range(4) if mixture[i][0] == 0)
    [0, 1, 2]
    """

    def __init__(self, sources: Sequence[Sequence], weights: Sequence[float]):
        self.sources = sources
        exact = [Fraction(weight) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * scale) for weight in exact]

    def counts(self, n: int) -> list[int]:
        """Return the number of examples of each source among the first n examples of the mixture."""
        found, left, total = [], n, sum(self._weights)
        for weight in self._weights:
            rest = left * (total - weight) // total
            found.append(left - rest)
            left, total = rest, total - weight
        return found

    def epochs(self, n: int) -> list[float]:
        """Return how often each source has been read after n examples of the mixture: 1.5 is one and a half times."""
        return [count / len(source) for count, source in zip(self.counts(n), self.sources, strict=True)]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return (index of the source of example `index`, number of earlier examples from the same source)."""
        before, after = self.counts(index), self.counts(index + 1)
        source = next(i for i in range(len(before)) if before[i] != after[i])
        return source, before[source]

    def dataset(self, seed: int) -> grain.MapDataset:
        """Return the examples of the mixture. `seed` decides the order of the examples of each source."""
        seeds = np.random.SeedSequence(seed).generate_state(len(self.sources))
        epochs = [
            grain.MapDataset.source(source).shuffle(seed=int(seed)).repeat()
            for source, seed in zip(self.sources, seeds, strict=True)
        ]
        return grain.MapDataset.select_from_datasets(epochs, self)
