"""Propositional logic: find the relation of two sentences (Bowman, Manning and Potts, 2015, arXiv 1506.04834).

A sentence is a variable a .. f, `( not X )` or `( L ( op R ) )`, where X, L and R are sentences and op is `and` or
`or`. A world assigns a truth value to each of the six variables. The truth table of a sentence is a number with one bit
for each of the 64 worlds: whether the sentence holds in the world. So a few bit operations compute the relation of two
sentences.
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
RELATIONS = ("<", ">", "=", "^", "|", "#", "v")  # a label is an index
BUCKETS = 13  # by the larger number of operators of the two sentences: 0 .. 11, and 12 for all above

_WORLDS = 2**64 - 1
# The truth tables of the variables: bit w of variable i is bit i of the world w.
_VARIABLES = [(name, sum(1 << w for w in range(64) if w >> i & 1), 0) for i, name in enumerate("abcdef")]
# {(is there a world where both hold, only the left, only the right, neither): relation}
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
    """Return the relation of two sentences, given by their truth tables of 64 bits.

    `=`: the truth tables are equal. `<`: left implies right. `>`: right implies left. `^`: in every world exactly one
    sentence holds. `|`: in no world both sentences hold. `v`: in every world at least one sentence holds. `#`: none of
    these.

    >>> relation(0b0011, 0b0111), relation(0b0011, 0b0100)
    ('<', '|')
    """
    cells = (left & right, left & ~right, right & ~left, _WORLDS & ~(left | right))
    return _RELATIONS.get(tuple(map(bool, cells)), "#")


def _sentence(uniform: Callable[[], float], variables: Sequence[tuple], n: int) -> tuple[str, int, int]:
    """Draw a random sentence, and return its text, its truth table and its number of operators.

    `uniform` returns random numbers in [0, 1). `variables` are entries of _VARIABLES. `n` limits the size: the two
    parts of a sentence are drawn with n // 2, and a sentence with n < 2 is a variable or its negation.
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
    """Yield random pairs of sentences without end. Both sentences of a pair use the same four of the six variables.

    Pairs with a sentence that holds in every world or in no world are left out.
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
    """Draw pairs of sentences, remove duplicates, and return them in BUCKETS buckets by their number of operators.

    The first 85 % of each bucket are for training, the rest for tests. Sentences in the training parts of buckets 0..6
    have at most 37 tokens. Sentences in bucket 12 have at most about twice as many.

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
    """Return whether a sentence of the pair has the pattern that `split` removes from the training part.

    Pattern of split A: `( and ( not a ) )`. Pattern of split B: `( and ( not X ) )` for any sentence X. Split C has the
    pattern of B, and the same pattern with `or` in place of `and`.

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
    """Return the pairs of a part, "train", "valid" or "test": `left` [T], `right` [T], `label` and `bucket`, int32.

    `left` and `right` are the ids of the sentences, and `label` is the index of their relation in RELATIONS. `draws`
    pairs are drawn with `seed` (see `generate`); only pairs in `buckets` are returned. T None: the longest sentence.

    With split A, B or C, all parts come from the training parts of the buckets. The part "test" has the pairs that
    match the pattern of the split (see `matches`), and the other parts have all other pairs. The part "valid" has one
    in `valid_every` pairs of each bucket, which the part "train" does not have.

    Raises ValueError if a sentence has more than T tokens, or for an unknown part or split.

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
        raise ValueError(f"T={T} is shorter than the longest sentence of {longest} tokens")

    def arrays(row: Example) -> dict[str, np.ndarray]:
        left, right = VOCABULARY.encode(row.left, T), VOCABULARY.encode(row.right, T)
        return dict(left=left, right=right, label=np.int32(row.label), bucket=np.int32(row.bucket))

    lengths = lambda row: (max(words_in(row.left), words_in(row.right)),)  # noqa: E731
    return Examples(rows, arrays, (("left", "right"),), lengths)


def text(seed: int, count: int) -> Iterator[str]:
    """Return an iterator over `count` different lines. A line is a left sentence, a relation and a right sentence.

    >>> list(text(0, 2))
    ['( not c ) ^ c', 'd # b']
    """
    return (f"{row.left} {RELATIONS[row.label]} {row.right}" for row in distinct(_draws(seed), count))
