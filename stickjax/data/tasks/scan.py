"""SCAN: translate commands in English to actions (Lake and Baroni, 2018, arXiv 1711.00350); all 20,910 commands.

A command is V, `V twice` or `V thrice`, or two of these joined by `and` or `after`. V is a phrase: `u`, `u left`,
`u opposite left` or `u around left`, or the same with `right`. u is a verb: walk, look, run or jump; before a direction
it may also be turn.
"""

import functools
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from stickjax.config.data import SPLITS as ALL_SPLITS
from stickjax.config.fields import one_of
from stickjax.data.tasks.encoding import SPECIAL, Examples, Parts, Vocabulary, longest_of, words_in

PRIMITIVES = ("walk", "look", "run", "jump")
# The ids of both vocabularies: 0 padding, 1 unknown, 2 start, 3 end, and words from 4. The examples have only words and
# padding. A model that begins or ends its texts with a symbol adds it.
COMMANDS = Vocabulary("walk look run jump turn left right opposite around twice thrice and after", SPECIAL)
ACTIONS = Vocabulary("I_TURN_LEFT I_TURN_RIGHT I_WALK I_LOOK I_RUN I_JUMP", SPECIAL)
SPLITS = ALL_SPLITS["scan"]


class Example(NamedTuple):
    command: str
    actions: str


def _phrases() -> Iterator[tuple[str, list[str]]]:
    """Yield all phrases V (see the top of this file), each with the list of its actions."""
    for u in (*PRIMITIVES, "turn"):
        act = [] if u == "turn" else [f"I_{u.upper()}"]
        if act:
            yield u, act
        for side in ("left", "right"):
            turn = [f"I_TURN_{side.upper()}"]
            yield f"{u} {side}", turn + act
            yield f"{u} opposite {side}", turn + turn + act
            yield f"{u} around {side}", (turn + act) * 4


@functools.cache
def pairs() -> tuple[Example, ...]:
    """Return all commands, each with its actions.

    >>> len(pairs()), pairs()[0]
    (20910, Example(command='walk', actions='I_WALK'))
    """
    times = {"": 1, " twice": 2, " thrice": 3}
    single = [(v + word, actions * n) for v, actions in _phrases() for word, n in times.items()]
    both = [(f"{a} and {b}", first + second) for a, first in single for b, second in single]
    reverse = [(f"{a} after {b}", second + first) for a, first in single for b, second in single]
    return tuple(Example(command, " ".join(actions)) for command, actions in single + both + reverse)


def generate(split: str = "simple", seed: int = 0) -> Parts:
    """Return the training part and the test part of a split, which is one of SPLITS.

    simple: four fifths of the commands, chosen at random with `seed`, are for training, the rest for tests.

    length: commands of up to 22 actions are for training, longer ones for tests.

    length_tuning: only commands of the training part of `length`. Up to 18 actions are for training, 19 to 22 for
    tests. A model for `length` can be tuned on this split without the test part of `length`.

    add_jump: the training part has all commands without `jump`, and 1467 times the command `jump`; the test part has
    all other commands with `jump`.

    add_turn_left: the same with `turn left`, which is 2189 times in the training part.

    around_right (Loula, Baroni and Lake, 2018, arXiv 1807.07545): the training part has all commands without
    `around right`. The test part has the commands with `around right`, except those with `turn around right`, which
    are in no part.

    Raises ValueError for an unknown split.

    >>> [tuple(map(len, generate(split))) for split in SPLITS]
    [(16728, 4182), (16990, 3920), (15438, 1552), (14670, 7706), (21890, 1208), (15225, 4476)]
    """
    one_of("split", split, SPLITS)
    if split == "simple":
        rows = Random(seed).sample(pairs(), len(pairs()))
        size = len(rows) * 4 // 5
        return Parts(rows[:size], rows[size:])
    if split in ("length", "length_tuning"):
        short, longest = (22, 48) if split == "length" else (18, 22)
        sizes = [(row, words_in(row.actions)) for row in pairs()]
        test = [row for row, size in sizes if short < size <= longest]
        return Parts([row for row, size in sizes if size <= short], test)
    if split == "around_right":
        test = [row for row in pairs() if "around right" in row.command and "turn around right" not in row.command]
        return Parts([row for row in pairs() if "around right" not in row.command], test)
    word, times = {"add_jump": ("jump", 1467), "add_turn_left": ("turn left", 2189)}[split]
    alone = [row for row in pairs() if row.command == word]
    without = [row for row in pairs() if word not in row.command]
    return Parts(without + alone * times, [row for row in pairs() if word in row.command and row not in alone])


def examples(
    part: str = "train",
    *,
    split: str = "simple",
    T: int | None = 9,
    S: int | None = 48,
    seed: int = 0,
    valid_every: int = 0,
) -> Examples:
    """Return the examples of a part, "train", "valid" or "test": the ids `source` [T] and `target` [S], both int32.

    `source` is a command in the vocabulary COMMANDS, and `target` its actions in the vocabulary ACTIONS. T or S None:
    the longest text. `split` and `seed` are explained in `generate`. The part "valid" has one in `valid_every` training
    examples, which the part "train" does not have.

    Raises ValueError if a command has more than T words or its actions more than S, or for an unknown part or split.

    >>> {name: array.shape for name, array in examples("test", split="length")[0].items()}
    {'source': (9,), 'target': (48,)}
    """
    rows = generate(split, seed).part(part, valid_every)
    sizes = []
    for letter, size, name in (("T", T, "command"), ("S", S, "actions")):
        longest = longest_of(rows, name)
        if size is not None and longest > size:
            raise ValueError(f"{letter}={size} is shorter than the longest {name} of {longest} words")
        sizes.append(longest if size is None else size)

    def arrays(row: Example):
        return dict(source=COMMANDS.encode(row.command, sizes[0]), target=ACTIONS.encode(row.actions, sizes[1]))

    lengths = lambda row: (words_in(row.command), words_in(row.actions))  # noqa: E731
    return Examples(rows, arrays, (("source",), ("target",)), lengths)


def text(seed: int, count: int) -> Iterator[str]:
    """Return an iterator over `count` different lines in random order, at most all 20,910.

    A line is a command and its actions.

    >>> next(text(39, 1))
    'IN: jump left and run OUT: I_TURN_LEFT I_JUMP I_RUN'
    """
    rows = Random(seed).sample(pairs(), min(count, len(pairs())))
    return (f"IN: {row.command} OUT: {row.actions}" for row in rows)
