"""ListOps: compute the value of nested lists of digits (Nangia and Bowman, 2018, arXiv 1804.06028; data set "d20s").

An expression is a digit, or a list `[op X1 .. Xn ]` of 2 to 5 expressions X1 .. Xn. The operator op is MIN, MAX, MED
(the median, rounded down) or SM (the sum modulo 10). For example, `[MAX 2 [SM 5 6 ] ]` has the value 2.
"""

import functools
import statistics
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

import numpy as np

from stickjax.data.tasks.encoding import Examples, Parts, Vocabulary, distinct, longest_of, words_in

OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
_OPERATORS = tuple(OPERATORS.items())
VOCABULARY = Vocabulary("0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ] ( )")


class Example(NamedTuple):
    text: str
    label: int


def _expression(uniform: Callable[[], float], depth: int = 1) -> tuple[str, int]:
    """Draw a random expression, and return (its text, its value). The value is a digit.

    The expression is a list with probability 1/4, and otherwise a digit. `depth` is 1 plus the number of lists around
    the expression; at depth 20 the expression is always a digit. `uniform` returns random numbers in [0, 1).
    """
    if uniform() > 0.25 or depth >= 20:
        digit = int(10 * uniform())
        return str(digit), digit
    size, (name, operator) = 2 + int(4 * uniform()), _OPERATORS[int(4 * uniform())]
    texts, values = zip(*(_expression(uniform, depth + 1) for _ in range(size)), strict=True)
    return f"{name} {' '.join(texts)} ]", operator(values)


def _draws(seed: int) -> Iterator[Example]:
    uniform = Random(seed).random
    while True:
        yield Example(*_expression(uniform))


@functools.lru_cache(maxsize=1)
def generate(seed: int = 0, count: int = 100_000) -> Parts:
    """Generate `count` different expressions, and divide them at random: nine tenths for training, the rest for tests.

    Expressions that are a single digit are removed from both parts.

    >>> generate(count=1000).train[0]
    Example(text='[MIN 6 3 4 ]', label=3)
    """
    rows = list(distinct(_draws(seed), count))
    Random(seed).shuffle(rows)
    size = len(rows) * 9 // 10
    return Parts(*(tuple(row for row in part if len(row.text) > 1) for part in (rows[:size], rows[size:])))


def binary(text: str) -> str:
    """Return an expression with additional brackets "(" and ")", which make it a binary tree.

    A list consists of parts: its operator, digits and inner lists, and the last part `]`. The brackets group the first
    two parts, then this group with the next part, and so on.

    >>> binary("[SM 6 5 ]")
    '( ( ( [SM 6 ) 5 ) ] )'
    """
    stack: list[str] = []
    opened: list[int] = []
    for symbol in text.split():
        if symbol in OPERATORS:
            opened.append(len(stack))
        stack.append(symbol)
        if symbol == "]":
            start = opened.pop()
            stack[start:] = [functools.reduce("( {} {} )".format, stack[start:])]
    return stack[0]


def examples(
    part: str = "train",
    *,
    T: int | None = 50,
    brackets: bool = False,
    seed: int = 0,
    count: int = 100_000,
    valid_every: int = 0,
) -> Examples:
    """Return the examples of a part. An example has two int32 arrays with the names `tokens` and `label`.

    `tokens` [T] has the ids of the symbols of an expression, and `label` [] is the value of the expression. The
    function `generate` divides the expressions into training and test examples.

    Args:
      part: "train", "valid" or "test".
      T: the number of ids. Expressions of more than T symbols are left out, and shorter ones are padded with 0. None: T
        is the number of symbols of the longest expression, so that no expression is left out.
      brackets: whether to add brackets to the expressions, as the function `binary` does. They count as symbols.
      seed: the seed of the random expressions.
      count: the number of expressions to generate, for all parts together.
      valid_every: the part "valid" gets one in `valid_every` training expressions, and the part "train" gets the
        others. 0: the part "train" gets all of them, and the part "valid" cannot be used.

    Raises ValueError for an unknown part, or for the part "valid" if `valid_every` is 0.

    >>> expressions = examples("test", T=100, count=1000)
    >>> {name: array.shape for name, array in expressions[0].items()}
    {'tokens': (100,), 'label': ()}
    """
    form = binary if brackets else str
    rows = [row._replace(text=form(row.text)) for row in generate(seed, count).part(part, valid_every)]
    T = longest_of(rows, "text") if T is None else T
    rows = [row for row in rows if words_in(row.text) <= T]
    arrays = lambda row: dict(tokens=VOCABULARY.encode(row.text, T), label=np.int32(row.label))  # noqa: E731
    return Examples(rows, arrays, (("tokens",),), lambda row: (words_in(row.text),))


def text(seed: int, count: int) -> Iterator[str]:
    """Return an iterator over `count` different random lines of text for a language model.

    A line has a list, then `=`, then the value of the list. `seed` decides the lists.

    >>> list(text(0, 2))
    ['[SM [SM [MIN 8 0 5 1 ] 7 8 ] 9 5 ] = 9', '[MED 0 8 8 9 ] = 8']
    """
    lists = (row for row in _draws(seed) if len(row.text) > 1)
    return (f"{row.text} = {row.label}" for row in distinct(lists, count))
