"""SCAN: translate commands in English to sequences of actions (Lake and Baroni, 2018, arXiv 1711.00350).

For example, the actions of the command `jump left and run` are `I_TURN_LEFT I_JUMP I_RUN`. There are 20,910 commands.

A command is a phrase V, `V twice` or `V thrice`, or two of these joined by `and` or `after`. A phrase is `u`, `u left`,
`u opposite left` or `u around left`, or the same with `right`. Here u is one of the verbs "walk", "look", "run" and
"jump"; in front of a direction, u may also be the verb "turn".
"""

import functools
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from stickjax.config.data import SPLITS as ALL_SPLITS
from stickjax.config.fields import one_of
from stickjax.data.tasks.encoding import SPECIAL, Examples, Parts, Vocabulary, closing_brackets, longest_of, words_in

PRIMITIVES = ("walk", "look", "run", "jump")
# The ids of both vocabularies: 0 padding, 1 unknown, 2 start, 3 end, and words from 4. The examples have only words and
# padding. A model that needs a start symbol or an end symbol adds it itself.
COMMANDS = Vocabulary("walk look run jump turn left right opposite around twice thrice and after", SPECIAL)
ACTIONS = Vocabulary("I_TURN_LEFT I_TURN_RIGHT I_WALK I_LOOK I_RUN I_JUMP", SPECIAL)
SPLITS = ALL_SPLITS["scan"]


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
    """Return all 20,910 commands. Each is an Example, which has the command and its actions.

    >>> len(pairs()), pairs()[0]
    (20910, Example(command='walk', actions='I_WALK'))
    """
    times = {"": 1, " twice": 2, " thrice": 3}
    single = [(v + word, actions * n) for v, actions in _phrases() for word, n in times.items()]
    both = [(f"{a} and {b}", first + second) for a, first in single for b, second in single]
    reverse = [(f"{a} after {b}", second + first) for a, first in single for b, second in single]
    return tuple(Example(command, " ".join(actions)) for command, actions in single + both + reverse)


def brackets(command: str) -> str:
    """Return a command with brackets "(" and ")" that show its binary tree.

    A conjunction (`and` or `after`) is joined with the phrase after it, and the result with the phrase before it. In a
    phrase, `twice` or `thrice` is joined with all words before it, and every other word with all words after it.

    Raises ValueError if a phrase has no word.

    >>> brackets("jump around left twice and walk")
    '( ( ( jump ( around left ) ) twice ) ( and walk ) )'
    """
    words = command.split()
    join = lambda words: brackets(" ".join(words))  # noqa: E731
    for i, word in enumerate(words):
        if word in ("and", "after"):
            return f"( {join(words[:i])} ( {word} {join(words[i + 1 :])} ) )"
    if not words:
        raise ValueError("the command is empty, or a word such as `and` or `twice` has no phrase beside it")
    *phrase, last = words
    if last in ("twice", "thrice"):
        return f"( {join(phrase)} {last} )"
    return functools.reduce(lambda after, word: f"( {word} {after} )", reversed(phrase), last)


def generate(split: str = "simple", seed: int = 0) -> Parts:
    """Divide the commands into a training part and a test part. `split` is one of SPLITS:

    `simple`: four fifths of the commands are for training, and the others are for tests. `seed` decides which ones.
    `length`: commands of at most 22 actions are for training, and longer commands are for tests.
    `length_tuning`: commands of at most 18 actions are for training, and commands of 19 to 22 actions are for tests.
      All of them are training commands of `length`. So hyperparameters for `length` can be chosen on this split.
    `add_jump`: commands without "jump" are for training, together with 1467 copies of the command "jump". All other
      commands are for tests.
    `add_turn_left`: commands without "turn left" are for training, together with 2189 copies of the command
      "turn left". All other commands are for tests.
    `around_right` (Loula, Baroni and Lake, 2018, arXiv 1807.07545): commands without "around right" are for training,
      and commands with "around right" are for tests. Commands with "turn around right" are left out.

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
    """Return the examples of a part. An example has the int32 arrays `source` [T], `brackets` [T] and `target` [S].

    `source` has the ids of the words of a command in the vocabulary COMMANDS, and `brackets` [T] has the number of
    brackets that close after each word (see the function `brackets`). `target` has the ids of its actions in the
    vocabulary ACTIONS. All three are padded with 0. If T is None, T is the number of words of the longest command. If S
    is None, S is the largest number of actions of a command.

    `part` is "train", "valid" or "test", and the function `generate` explains `split` and `seed`. The part "valid" gets
    one in `valid_every` training examples, and the part "train" gets the others. If `valid_every` is 0, the part
    "train" gets all training examples, and the part "valid" cannot be used.

    Raises ValueError if a command has more than T words or more than S actions, for an unknown part or split, or for
    the part "valid" if `valid_every` is 0.

    >>> {name: array.shape for name, array in examples("test", split="length")[0].items()}
    {'source': (9,), 'brackets': (9,), 'target': (48,)}
    """
    rows = generate(split, seed).part(part, valid_every)
    sizes = []
    for letter, size, name, what in (("T", T, "command", "command"), ("S", S, "actions", "list of actions")):
        longest = longest_of(rows, name)
        if size is not None and longest > size:
            hint = "; in a config, data.T sets S" if letter == "S" else ""
            raise ValueError(f"{letter}={size} is too small: the longest {what} has {longest} words{hint}")
        sizes.append(longest if size is None else size)

    def arrays(row: Example):
        return dict(
            source=COMMANDS.encode(row.command, sizes[0]),
            brackets=closing_brackets(brackets(row.command), sizes[0]),
            target=ACTIONS.encode(row.actions, sizes[1]),
        )

    lengths = lambda row: (words_in(row.command), words_in(row.actions))  # noqa: E731
    return Examples(rows, arrays, (("source", "brackets"), ("target",)), lengths)


def text(seed: int, count: int) -> Iterator[str]:
    """Return an iterator over `count` different lines of text for a language model, at most one for every command.

    A line has a command and its actions. `seed` decides the random order of the lines.

    >>> next(text(39, 1))
    'IN: jump left and run OUT: I_TURN_LEFT I_JUMP I_RUN'
    """
    rows = Random(seed).sample(pairs(), min(count, len(pairs())))
    return (f"IN: {row.command} OUT: {row.actions}" for row in rows)
