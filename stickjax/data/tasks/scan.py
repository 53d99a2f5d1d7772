"""SCAN: translate commands in English to sequences of actions (Lake and Baroni, 2018, arXiv 1711.00350).

For example, the actions of the command `jump left and run` are `I_TURN_LEFT I_JUMP I_RUN`. There are 20,910 commands.

A command is a phrase V, `V twice` or `V thrice`, or two of these joined by `and` or `after`. A phrase is `u`, `u left`,
`u opposite left` or `u around left`, or the same with `right`. Here u is one of the verbs walk, look, run and jump; in
front of a direction it may also be the verb turn.
"""

import functools
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from stickjax.config.fields import one_of
from stickjax.data.tasks.encoding import Examples, Parts, Vocabulary

PRIMITIVES = ("walk", "look", "run", "jump")
COMMANDS = Vocabulary("walk look run jump turn left right opposite around twice thrice and after")
ACTIONS = Vocabulary("I_TURN_LEFT I_TURN_RIGHT I_WALK I_LOOK I_RUN I_JUMP")
SPLITS = ("simple", "length", "add_jump", "add_turn_left")


class Example(NamedTuple):
    command: str
    actions: str


def _phrases() -> Iterator[tuple[str, list[str]]]:
    """Yield (phrase, list of its actions) for every phrase, such as "turn left". Commands are made from phrases."""
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
    """Return all 20,910 commands, each as an Example with its actions.

    >>> len(pairs()), pairs()[0]
    (20910, Example(command='walk', actions='I_WALK'))
    """
    times = {"": 1, " twice": 2, " thrice": 3}
    single = [(v + word, actions * n) for v, actions in _phrases() for word, n in times.items()]
    both = [(f"{a} and {b}", first + second) for a, first in single for b, second in single]
    reverse = [(f"{a} after {b}", second + first) for a, first in single for b, second in single]
    return tuple(Example(command, " ".join(actions)) for command, actions in single + both + reverse)


def generate(split: str = "simple", seed: int = 0) -> Parts:
    """Divide all commands into a training part and a test part. `split` is one of SPLITS:

    `simple`: four fifths of the commands, chosen at random with `seed`, are for training, the rest for tests.
    `length`: commands of at most 22 actions are for training, longer ones for tests.
    `add_jump`: the commands without the word jump and 1467 copies of the command `jump` are for training, all other
      commands for tests.
    `add_turn_left`: the same as `add_jump` for the words turn left, with 2189 copies of the command `turn left`.

    Raises ValueError for an unknown split.

    >>> [tuple(map(len, generate(split))) for split in SPLITS]
    [(16728, 4182), (16990, 3920), (14670, 7706), (21890, 1208)]
    """
    one_of("split", split, SPLITS)
    if split == "simple":
        rows = Random(seed).sample(pairs(), len(pairs()))
        size = len(rows) * 4 // 5
        return Parts(rows[:size], rows[size:])
    if split == "length":
        short = {row: row.actions.count(" ") < 22 for row in pairs()}
        return Parts([row for row in pairs() if short[row]], [row for row in pairs() if not short[row]])
    word, times = {"add_jump": ("jump", 1467), "add_turn_left": ("turn left", 2189)}[split]
    alone = [row for row in pairs() if row.command == word]
    without = [row for row in pairs() if word not in row.command]
    return Parts(without + alone * times, [row for row in pairs() if word in row.command and row not in alone])


def examples(part: str = "train", *, split: str = "simple", T: int = 9, S: int = 48, seed: int = 0) -> Examples:
    """Return examples for training or for tests. An example has the int32 arrays `command` [T] and `actions` [S].

    `command` has the ids of the words of a command in the vocabulary COMMANDS. `actions` has the ids of its actions in
    the vocabulary ACTIONS. Both are padded with 0. `part` is "train" or "test", and the function `generate` explains
    `split` and `seed`.

    Raises ValueError if a command has more than T words or more than S actions, or for an unknown part or split.

    >>> {name: array.shape for name, array in examples("test", split="length")[0].items()}
    {'command': (9,), 'actions': (48,)}
    """
    rows = generate(split, seed).part(part)
    for letter, size, name in (("T", T, "command"), ("S", S, "actions")):
        if (longest := max(getattr(row, name).count(" ") + 1 for row in rows)) > size:
            raise ValueError(f"{letter}={size} is too small: the longest entry of {name!r} has {longest} words")

    def arrays(row: Example):
        return dict(command=COMMANDS.encode(row.command, T), actions=ACTIONS.encode(row.actions, S))

    return Examples(rows, arrays)


def text(seed: int, count: int) -> Iterator[str]:
    """Return an iterator over `count` different lines of text for a language model, at most one for every command.

    A line has a command and its actions. `seed` decides the random order of the lines.

    >>> next(text(39, 1))
    'IN: jump left and run OUT: I_TURN_LEFT I_JUMP I_RUN'
    """
    rows = Random(seed).sample(pairs(), min(count, len(pairs())))
    return (f"IN: {row.command} OUT: {row.actions}" for row in rows)
