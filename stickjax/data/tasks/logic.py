"""Propositional logic: classify how two sentences are related (Bowman, Manning and Potts, 2015, arXiv 1506.04834).

A sentence is one of the variables a to f, `( not X )` or `( L ( op R ) )`, where X, L and R are sentences and op is
`and` or `or`. For example, the sentence `a` implies the sentence `( a ( or b ) )`: their relation is `<`.

A world is an assignment of true or false to the six variables, so there are 2^6 = 64 worlds. The truth table of a
sentence is a 64-bit integer: bit w is 1 if the sentence is true in world w. The relation of two sentences is computed
from their truth tables by a few bit operations.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from stickjax.config.data import SPLITS as ALL_SPLITS
from stickjax.config.fields import one_of
from stickjax.data.tasks.encoding import PARTS, Examples, Parts, Vocabulary, distinct, longest_of, words_in

VOCABULARY = Vocabulary("( ) a b c d e f or and not")
SPLITS = ALL_SPLITS["logic"]
RELATIONS = ("<", ">", "=", "^", "|", "#", "v")  # the label of a pair is the index of its relation here
BUCKETS = 13  # the bucket of a pair is the larger number of operators of its two sentences, but at most 12

_WORLDS = 2**64 - 1  # the truth table of a sentence that is true in every world
# (name, truth table, number of operators) of each variable. Variable i is true in world w if bit i of w is 1.
_VARIABLES = [(name, sum(1 << w for w in range(64) if w >> i & 1), 0) for i, name in enumerate("abcdef")]
# {(is there a world in which both are true, only the left, only the right, neither): relation}
_RELATIONS = {
    (True, False, False, True): "=",
    (True, False, True, True): "<",
    (True, True, False, True): ">",
    (False, True, True, False): "^",
    (False, True, True, True): "|",
    (True, True, True, False): "v",
}


class Example(NamedTuple):
    left: str
    right: str
    label: int
    bucket: int


def relation(left: int, right: int) -> str:
    """Return the relation of two sentences: the first of the signs below whose condition holds.

    `left` and `right` are the truth tables of the sentences: integers with one bit for each of the 64 worlds. Each
    sentence must be true in at least one world, and false in at least one world.

    `=`: the truth tables are equal.
    `<`: the left sentence implies the right one.
    `>`: the right sentence implies the left one.
    `^`: in every world exactly one sentence is true.
    `|`: in every world at most one sentence is true.
    `v`: in every world at least one sentence is true.
    `#`: none of these conditions holds.

    >>> relation(0b0011, 0b0111), relation(0b0011, 0b0100)
    ('<', '|')
    """
    cells = (left & right, left & ~right, right & ~left, _WORLDS & ~(left | right))
    return _RELATIONS.get(tuple(map(bool, cells)), "#")


def _sentence(uniform: Callable[[], float], variables: Sequence[tuple], n: int) -> tuple[str, int, int]:
    """Draw a random sentence, and return (its text, its truth table, its number of operators).

    `uniform` returns random numbers in [0, 1). `variables` has a tuple (name, truth table, 0) for each variable.
    `n` limits the length of the sentence. If n < 2, the sentence is a variable or its negation. In a sentence with
    `and` or `or`, the two parts are drawn by this function with n // 2 in place of n.
    """
    choice = int(9 * uniform())
    if choice > 3 or n < 2:
        text, table, operators = variables[int(len(variables) * uniform())]
    else:
        left, left_table, left_operators = _sentence(uniform, variables, n // 2)
        right, right_table, right_operators = _sentence(uniform, variables, n // 2)
        operators = left_operators + right_operators + 1
        if choice % 2:
            text, table = f"( {left} ( or {right} ) )", left_table | right_table
        else:
            text, table = f"( {left} ( and {right} ) )", left_table & right_table
    if uniform() < 1 / 3:
        return f"( not {text} )", _WORLDS ^ table, operators + 1
    return text, table, operators


def _draws(seed: int) -> Iterator[Example]:
    """Yield endlessly many random pairs of sentences. A pair uses at most four of the six variables.

    A pair is left out if the left or the right sentence is true in every world, or in no world.
    """
    uniform = Random(seed).random
    labels = {relation: label for label, relation in enumerate(RELATIONS)}
    subsets = tuple(itertools.combinations(_VARIABLES, 4))
    while True:
        variables = subsets[int(len(subsets) * uniform())]
        left, left_table, left_operators = _sentence(uniform, variables, 12)
        right, right_table, right_operators = _sentence(uniform, variables, 12)
        if 0 < left_table < _WORLDS and 0 < right_table < _WORLDS:
            bucket = min(BUCKETS - 1, max(left_operators, right_operators))
            yield Example(left, right, labels[relation(left_table, right_table)], bucket)


@functools.lru_cache(maxsize=1)
def generate(seed: int = 0, draws: int = 500_000) -> tuple[Parts, ...]:
    """Draw pairs of sentences, remove duplicates, and divide the pairs into buckets. Return the `Parts` of each bucket.

    The index of the bucket of a pair is the larger number of operators of its two sentences, but at most 12. In each
    bucket, the first 85 % of the pairs are for training, and the others are for tests. With the default arguments,
    sentences in the buckets 0 to 6 have at most 37 tokens, and sentences in bucket 12 have at most 79.

    `draws` is the number of pairs to draw, before duplicates are removed, and `seed` decides the random pairs.

    >>> [len(bucket.train) for bucket in generate(draws=1000)][:3]
    [30, 116, 63]
    """
    buckets: list[dict] = [{} for _ in range(BUCKETS)]
    for example in itertools.islice(_draws(seed), draws):
        buckets[example.bucket][example] = None

    def cut(examples: tuple) -> Parts:
        size = len(examples) * 85 // 100
        return Parts(examples[:size], examples[size:])

    return tuple(cut(tuple(bucket)) for bucket in buckets)


def matches(example: Example, split: str) -> bool:
    """Return whether at least one sentence of a pair has a pattern that `split` keeps out of training.

    The pairs with the pattern test whether a model generalises. The splits and their patterns are:

    `A`: the pattern `( and ( not a ) )`.
    `B`: the pattern `( and ( not X ) )` for any sentence X.
    `C`: the pattern of split B, or the same pattern with `or` in place of `and`.

    >>> [matches(Example("( b ( or ( not a ) ) )", "c", 5, 2), split) for split in SPLITS]
    [False, False, True]
    """
    one_of("split", split, SPLITS)
    patterns = dict(A=["( and ( not a ) )"], B=["( and ( not "], C=["( and ( not ", "( or ( not "])[split]
    return any(pattern in side for pattern in patterns for side in (example.left, example.right))


def examples(
    part: str = "train",
    *,
    T: int | None = 40,
    split: str | None = None,
    buckets: Sequence[int] = range(7),
    seed: int = 0,
    draws: int = 500_000,
    valid_every: int = 0,
) -> Examples:
    """Return the examples of a part, which are labelled pairs of sentences. An example has these int32 arrays:

    `left`, `right` [T]: the ids of the two sentences, padded with 0.
    `label` []: the index of their relation in RELATIONS.
    `bucket` []: the index of the bucket of the pair (see `generate`).

    Args:
      part: "train", "valid" or "test".
      T: the number of ids of a sentence, including padding; None: the number of tokens of the longest sentence.
      split: None, "A", "B" or "C". None: the parts of `generate`. With A, B or C, all parts are made from the training
        pairs of `generate`: pairs with the pattern of the split are the part "test", and all other pairs are for the
        parts "train" and "valid". `matches` explains the patterns.
      buckets: the buckets whose pairs are returned.
      seed: the seed of the random sentences.
      draws: the number of pairs to draw, for all buckets and all parts.
      valid_every: the part "valid" gets one in `valid_every` training pairs of each bucket, and the part "train" gets
        the others. 0: the part "train" gets all of them, and the part "valid" cannot be used.

    Raises ValueError if a sentence has more than T tokens, for an unknown part or split, or for the part "valid" if
    `valid_every` is 0.

    >>> pairs = examples("test", T=80, buckets=[12], draws=1000)
    >>> {name: array.shape for name, array in pairs[0].items()}
    {'left': (80,), 'right': (80,), 'label': (), 'bucket': ()}
    """
    one_of("part", part, PARTS)
    generated = [generate(seed, draws)[b] for b in buckets]
    if split is None:
        rows = [row for bucket in generated for row in bucket.part(part, valid_every)]
    else:
        parts = [bucket.train if part == "test" else bucket.part(part, valid_every) for bucket in generated]
        rows = [row for bucket in parts for row in bucket if matches(row, split) == (part == "test")]
    longest = longest_of(rows, "left", "right")
    T = longest if T is None else T
    if longest > T:
        raise ValueError(f"T={T} must be at least {longest}, the number of tokens of the longest sentence")

    def arrays(row: Example) -> dict[str, np.ndarray]:
        left, right = VOCABULARY.encode(row.left, T), VOCABULARY.encode(row.right, T)
        return dict(left=left, right=right, label=np.int32(row.label), bucket=np.int32(row.bucket))

    lengths = lambda row: (max(words_in(row.left), words_in(row.right)),)  # noqa: E731
    return Examples(rows, arrays, (("left", "right"),), lengths)


def text(seed: int, count: int) -> Iterator[str]:
    """Return an iterator over `count` different random lines of text for a language model.

    A line has the left sentence, the sign of the relation, and the right sentence. `seed` decides the sentences.

    >>> list(text(0, 2))
    ['( not c ) ^ c', 'd # b']
    """
    return (f"{row.left} {RELATIONS[row.label]} {row.right}" for row in distinct(_draws(seed), count))
