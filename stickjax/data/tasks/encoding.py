"""Code that all synthetic tasks use: vocabularies, random access to examples, and the division into train and test."""

import copy
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from stickjax.config.fields import one_of

PARTS = ("train", "valid", "test")
SPECIAL = ("<unknown>", "<start>", "<end>")  # ids 1, 2 and 3 of the vocabularies of translations


class Vocabulary:
    """A vocabulary of symbols. It converts a text, in which spaces separate the symbols, to ids and back.

    `symbols` is a text with all symbols, separated by spaces. The first symbol has id 1. Id 0 is padding. If there are
    `special` symbols, they come before the others, so the first of them has id 1.

    >>> words = Vocabulary("a b")
    >>> words.encode("b a b", T=4), words.decode([2, 1, 2, 0]), len(words)
    (array([2, 1, 2, 0], dtype=int32), 'b a b', 3)
    >>> Vocabulary("a b", SPECIAL).ids["a"]
    4
    """

    def __init__(self, symbols: str, special: Sequence[str] = ()):
        self.symbols = ("<pad>", *special, *symbols.split())
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, text: str, T: int | None = None) -> Int[np.ndarray, "T"]:
        """Return the ids [T] of the symbols in a text, padded with zeros on the right.

        If T is None, it is the number of symbols of the text.

        Raises ValueError if the text has more than T symbols, or an unknown symbol.
        """
        words = text.split()
        T = len(words) if T is None else T
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

    Example i is `arrays(rows[i])`: the function `arrays` is called each time the example is used.

    Args:
      rows: a value for every example, such as its text, from which `arrays` makes the example.
      arrays: a function from a row to the arrays of the example.
      texts: groups of names of arrays. The arrays of a group have token ids, and are padded with 0 to one length. The
        groups are (("left", "right"),) for pairs and (("source",), ("target",)) for translations.
      lengths: a function from a row to a tuple with one number for each group: the number of tokens of the longest text
        in the group. It is needed if there are `texts`.
    """

    def __init__(
        self,
        rows: Sequence,
        arrays: Callable[..., dict[str, np.ndarray]],
        texts: tuple[tuple[str, ...], ...] = (),
        lengths: Callable[..., tuple[int, ...]] = lambda row: (),
    ):
        self.rows, self.arrays, self.texts, self._lengths = rows, arrays, texts, lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.arrays(self.rows[index])

    def with_rows(self, rows: Sequence) -> "Examples":
        """Return a copy of these examples in which `rows` replaces the rows."""
        other = copy.copy(self)
        other.rows = rows
        return other

    def digest(self) -> str:
        """Return 16 hex digits that identify the examples and their order."""
        return hashlib.sha256("\n".join(f"{row}" for row in self.rows).encode()).hexdigest()[:16]

    def lengths(self) -> Int[np.ndarray, "examples groups"]:
        """Return for each example, and each group of `texts`, the number of tokens of the longest text in the group."""
        found = [self._lengths(row) for row in self.rows]
        return np.array(found, int).reshape(len(found), len(self.texts))


class Parts(NamedTuple):
    """The examples of a task, divided into a training part and a test part."""

    train: Sequence
    test: Sequence

    def part(self, name: str, valid_every: int = 0) -> Sequence:
        """Return the examples for training ("train"), for validation ("valid") or for tests ("test").

        The examples for validation are taken out of the training part: `divided` explains `valid_every`.
        """
        one_of("part", name, PARTS)
        return self.test if name == "test" else divided(self.train, name, valid_every)


def divided(rows: Sequence, part: str, valid_every: int, key: Callable = lambda row: row) -> Sequence:
    """Divide training examples into "train" and "valid" (for validation), and return the one that `part` names.

    "valid" has `len(rows) // valid_every` examples, which are chosen at random, the same in every run. If `valid_every`
    is 0, all examples are in "train". An example that occurs several times stays in "train"; two examples are the same
    if `key(row)` is equal.

    Raises ValueError for "valid" if `valid_every` is 0.

    >>> divided("abcdefgh", "valid", 4), divided("abcdefgh", "train", 4)
    (['c', 'e'], ['a', 'b', 'd', 'f', 'g', 'h'])
    """
    if not valid_every:
        if part == "valid":
            raise ValueError(
                "valid_every=0 leaves no examples for validation; data.valid_every=10 leaves one in ten for validation"
            )
        return rows
    keys = [key(row) for row in rows]
    count = Counter(keys)
    once = [i for i in np.random.default_rng(0).permutation(len(rows)) if count[keys[i]] == 1]
    chosen = set(once[: len(rows) // valid_every])
    return [row for i, row in enumerate(rows) if (i in chosen) == (part == "valid")]


def words_in(text: str) -> int:
    """Return the number of symbols in a text in which single spaces separate the symbols."""
    return text.count(" ") + 1


def longest_of(rows: Iterable, *texts: str) -> int:
    """Return the number of symbols of the longest text in rows; 0 if there are no rows.

    `texts` are the names of the fields of a row that have a text.
    """
    return max((words_in(getattr(row, name)) for row in rows for name in texts), default=0)


def distinct(drawn: Iterable, count: int) -> Iterator:
    """Return an iterator over the first `count` different values of `drawn`: a value that came before is left out."""
    seen: set = set()
    new = (value for value in drawn if value not in seen and not seen.add(value))
    return itertools.islice(new, count)
