"""Code that all synthetic tasks use: vocabularies, random access to examples, and training and test parts."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from stickjax.config.fields import one_of


class Vocabulary:
    """A vocabulary of symbols. It converts a text, in which spaces separate the symbols, to ids and back.

    `symbols` is a text with all symbols, separated by spaces. The first symbol has id 1. Id 0 is padding.

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
        """Return the ids [T] of the symbols in a text, padded with zeros on the right.

        Raises ValueError if the text has more than T symbols, or an unknown symbol.
        """
        words = text.split()
        if len(words) > T:
            raise ValueError(f"T={T} must be at least {len(words)}, the number of symbols of the text")
        ids = np.zeros(T, np.int32)
        for i, word in enumerate(words):
            if word not in self.ids:
                raise ValueError(f"symbol {word!r} is not one of {' '.join(self.symbols[1:])}")
            ids[i] = self.ids[word]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the symbols of the ids [n] as a text, in which spaces separate the symbols. Padding is left out."""
        return " ".join(self.symbols[i] for i in ids if i)


class Examples:
    """Random access to the examples of a task, for `grain.MapDataset.source`. An example is a dictionary {name: array}.

    `rows` has a short description of every example, such as its text. Example i is `arrays(rows[i])`: the function
    `arrays` is called each time the example is used.
    """

    def __init__(self, rows: Sequence, arrays: Callable[..., dict[str, np.ndarray]]):
        self.rows, self.arrays = rows, arrays

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.arrays(self.rows[index])


class Parts(NamedTuple):
    """The examples of a task, divided into a training part and a test part."""

    train: Sequence
    test: Sequence

    def part(self, name: str) -> Sequence:
        one_of("part", name, self._fields)
        return getattr(self, name)


def distinct(drawn: Iterable, count: int) -> Iterator:
    """Return an iterator over the first `count` different values of `drawn`: a value that came before is left out."""
    seen: set = set()
    new = (value for value in drawn if value not in seen and not seen.add(value))
    return itertools.islice(new, count)
