"""Code that the synthetic tasks share: vocabularies, access to examples by index, and the division into parts."""

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

    `symbols` is a text with the symbols, separated by spaces. Id 0 is padding. The ids from 1 are the `special` symbols
    in their order, then the other symbols in their order. The length of a vocabulary counts all ids, including 0.

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
                raise ValueError(f"{word!r} is not one of the symbols {' '.join(self.symbols[1:])}")
            ids[i] = self.ids[word]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the symbols of the ids [n] as a text, in which spaces separate the symbols. Padding is left out."""
        return " ".join(self.symbols[i] for i in ids if i)


def closing_brackets(text: str, T: int | None = None) -> Int[np.ndarray, "T"]:
    """Return how many brackets close after each word of a text, padded with zeros on the right.

    The brackets "(" and ")" of the text show a binary tree over its words. The text must have at most T words. If T is
    None, T is the number of words.

    Raises ValueError if the brackets do not show a binary tree.

    >>> closing_brackets("( a ( b c ) )", T=4)
    array([0, 0, 2, 0], dtype=int32)
    """
    closed: list[int] = []
    parts = [0]  # for each open bracket, and for the whole text: the number of its parts so far
    for word in text.split():
        if word == "(":
            parts.append(0)
            continue
        if word != ")":
            closed.append(0)
        elif len(parts) == 1 or parts.pop() != 2:
            break
        else:
            closed[-1] += 1
        parts[-1] += 1
    else:
        if parts == [1]:
            return np.array(closed + [0] * ((T or 0) - len(closed)), np.int32)
    raise ValueError(
        f"every pair of brackets must have two parts, and the first pair must enclose all words: {text!r:.80}"
    )


class Examples:
    """The examples of a task, with access by index, for `grain.MapDataset.source`.

    An example is a dictionary of arrays. Example i is `arrays(rows[i])`. The function `arrays` is called each time the
    example is used.

    Args:
      rows: a value for every example, such as its text. The function `arrays` makes the example from it.
      arrays: a function from a row to the example {name: array}.
      texts: groups of array names. The arrays of a group have a value for each token, such as its id, and are padded
        with 0 to the same length. For pairs, `texts` is (("left", "right"),). For translations, it is
        (("source", "brackets"), ("target",)).
      lengths: a function from a row to a tuple with one number for each group: the number of tokens of the longest text
        in the group. It must be given if there are `texts`.
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
        """Return a copy with other rows, `rows`, and with the same functions."""
        other = copy.copy(self)
        other.rows = rows
        return other

    def digest(self) -> str:
        """Return 16 hex digits that identify the examples and their order."""
        return hashlib.sha256("\n".join(f"{row}" for row in self.rows).encode()).hexdigest()[:16]

    def lengths(self) -> Int[np.ndarray, "examples groups"]:
        """Return the number of tokens of the longest text, for each example and each group of `texts`."""
        found = [self._lengths(row) for row in self.rows]
        return np.array(found, int).reshape(len(found), len(self.texts))


class Parts(NamedTuple):
    """The examples of a task, divided into a training part and a test part."""

    train: Sequence
    test: Sequence

    def part(self, name: str, valid_every: int = 0) -> Sequence:
        """Return the examples for training ("train"), for validation ("valid") or for tests ("test").

        The examples for validation are taken out of the training part. `divided` explains `valid_every`.
        """
        one_of("part", name, PARTS)
        return self.test if name == "test" else divided(self.train, name, valid_every)


def divided(rows: Sequence, part: str, valid_every: int, key: Callable = lambda row: row) -> Sequence:
    """Divide training examples into the parts "train" and "valid" (for validation), and return the part named `part`.

    "valid" gets at most `len(rows) // valid_every` examples. They are chosen at random, and are the same in every run.
    If `valid_every` is 0, all examples are in "train". An example that occurs several times stays in "train". Two
    examples are the same if `key(row)` is equal.

    Raises ValueError for "valid" if `valid_every` is 0.

    >>> divided("abcdefgh", "valid", 4), divided("abcdefgh", "train", 4)
    (['c', 'e'], ['a', 'b', 'd', 'f', 'g', 'h'])
    """
    if not valid_every:
        if part == "valid":
            raise ValueError(
                "valid_every=0 leaves no examples for validation; "
                "set data.valid_every=10, for example, to use one example in ten"
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
    """Return the number of symbols of the longest text in `rows`; 0 if there are no rows.

    `texts` are the names of the fields that contain a text, such as "left" and "right".
    """
    return max((words_in(getattr(row, name)) for row in rows for name in texts), default=0)


def distinct(drawn: Iterable, count: int) -> Iterator:
    """Return an iterator over the first `count` different values of `drawn`. Repeated values are left out."""
    seen: set = set()
    new = (value for value in drawn if value not in seen and not seen.add(value))
    return itertools.islice(new, count)
