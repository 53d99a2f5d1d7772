"""SCAN: translate commands in English to actions (Lake and Baroni, 2018, arXiv 1711.00350); all 20,910 commands.

A command is V, `V twice` or `V thrice`, or two of these joined by `and` or `after`. V is a phrase: `u`, `u left`,
`u opposite left` or `u around left`, or the same with `right`. u is a verb: walk, look, run or jump; before a direction
it may also be turn.
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

    simple: four fifths of the commands, chosen at random with `seed`, are for training, the rest for tests. length:
    commands of up to 22 actions are for training, longer ones for tests. add_jump: the training part has all commands
    without `jump`, and 1467 times the command `jump`; the test part has all other commands with `jump`. add_turn_left:
    the same with `turn left`, which is 2189 times in the training part.

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
    """Return the examples of a part, "train" or "test": the ids `command` [T] and `actions` [S], both int32.

    The ids of a command are from the vocabulary COMMANDS, and the ids of its actions from ACTIONS. `split` and `seed`
    are explained in `generate`. Raises ValueError if a command has more than T words or its actions more than S, or for
    an unknown part or split.

    >>> {name: array.shape for name, array in examples("test", split="length")[0].items()}
    {'command': (9,), 'actions': (48,)}
    """
    rows = generate(split, seed).part(part)
    for letter, size, name in (("T", T, "command"), ("S", S, "actions")):
        if (longest := max(getattr(row, name).count(" ") + 1 for row in rows)) > size:
            raise ValueError(f"{letter}={size} is shorter than the longest {name} of {longest} words")

    def arrays(row: Example):
        return dict(command=COMMANDS.encode(row.command, T), actions=ACTIONS.encode(row.actions, S))

    return Examples(rows, arrays)


def text(seed: int, count: int) -> Iterator[str]:
    """Return an iterator over `count` different lines in random order, at most all 20,910.

    A line is a command and its actions.

    >>> next(text(39, 1))
    'IN: jump left and run OUT: I_TURN_LEFT I_JUMP I_RUN'
    """
    rows = Random(seed).sample(pairs(), min(count, len(pairs())))
    return (f"IN: {row.command} OUT: {row.actions}" for row in rows)
