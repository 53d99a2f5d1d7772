"""The common code of all tasks: vocabularies, examples by their index, and the training and test parts."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from stickjax.config.fields import one_of


class Vocabulary:
    """A vocabulary of symbols, which a text separates by spaces. Id 0 is padding, which has no text.

    >>> words = Vocabulary("a b")
    >>> words.encode("b a b", T=4), words.decode([2, 1, 2, 0]), len(words)
    (array([2, 1, 2, 0], dtype=int32), 'b a b', 3)
    """

    def __init__(self, symbols: str):
        self.symbols = ("<pad>", *symbols.split())
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, text: str, T: int) -> Int[np.ndarray, "T"]:
        """Return the ids of the symbols of a text, padded on the right to T.

        Raises ValueError if there are more than T symbols, or if one is unknown.
        """
        words = text.split()
        if len(words) > T:
            raise ValueError(f"T={T} is shorter than an example of {len(words)} symbols")
        ids = np.zeros(T, np.int32)
        for i, word in enumerate(words):
            if word not in self.ids:
                raise ValueError(f"symbol {word!r} is not one of {' '.join(self.symbols[1:])}")
            ids[i] = self.ids[word]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the symbols of ids, without padding, with spaces between them."""
        return " ".join(self.symbols[i] for i in ids if i)


class Examples:
    """Random access to examples as dicts of arrays, for `grain.MapDataset.source`. Each is made when it is read."""

    def __init__(self, rows: Sequence, arrays: Callable[..., dict[str, np.ndarray]]):
        self.rows, self.arrays = rows, arrays

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.arrays(self.rows[index])


class Parts(NamedTuple):
    """The training examples and the test examples."""

    train: Sequence
    test: Sequence

    def part(self, name: str) -> Sequence:
        one_of("part", name, self._fields)
        return getattr(self, name)


def distinct(drawn: Iterable, count: int) -> Iterator:
    """Yield the first `count` different values of an endless iterator."""
    seen: set = set()
    new = (value for value in drawn if value not in seen and not seen.add(value))
    return itertools.islice(new, count)
