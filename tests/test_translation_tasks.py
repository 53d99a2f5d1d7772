"""Test the two generated translation tasks: targets, sizes, splits, brackets and texts.

The tests compute the expected targets by other algorithms than stickjax. The expected sizes are the sizes of the
published data.
"""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from stickjax.data.tasks import questions, scan
from stickjax.data.tasks.encoding import closing_brackets


def actions(command: str) -> list[str]:
    """Return the actions of a SCAN command.

    The command is split at the conjunction, then at the repetition, then at the direction.
    """
    for word, order in ((" and ", 1), (" after ", -1)):
        if word in command:
            return sum((actions(part) for part in command.split(word)[::order]), [])
    for word, times in ((" twice", 2), (" thrice", 3)):
        if command.endswith(word):
            return actions(command.removesuffix(word)) * times
    verb, *manner, side = command.split() if " " in command else (command, "")
    act = [] if verb == "turn" else [f"I_{verb.upper()}"]
    turn = [f"I_TURN_{side.upper()}"] if side else []
    if manner == ["around"]:
        return (turn + act) * 4
    return turn * (2 if manner == ["opposite"] else 1) + act


def test_commands_mean_their_actions():
    pairs = scan.pairs()
    assert len(pairs) == len({row.command for row in pairs}) == 20910
    assert all(row.actions.split() == actions(row.command) for row in pairs)
    assert (len(scan.COMMANDS), len(scan.ACTIONS)) == (17, 10)
    known = {"jump": "I_JUMP", "turn opposite left": "I_TURN_LEFT I_TURN_LEFT", "run after look": "I_LOOK I_RUN"}
    assert known.items() <= dict(pairs).items()


def test_scan_splits_are_exact():
    simple = scan.generate("simple", seed=1)
    assert sorted(simple.train + simple.test) == sorted(scan.pairs()) and len(simple.test) == 4182
    assert simple != scan.generate("simple", seed=2)

    train, test = ({row.actions.count(" ") + 1 for row in part} for part in scan.generate("length"))
    assert max(train) == 22 and test == {24, 25, 26, 27, 28, 30, 32, 33, 36, 40, 48}

    train, test = ({row.actions.count(" ") + 1 for row in part} for part in scan.generate("length_tuning"))
    assert max(train) == 18 and test == {20, 21, 22} | {19} & test

    train, test = scan.generate("around_right")
    assert (len(train), len(test)) == (15_225, 4_476), "the sizes of the published split"
    assert not any("around right" in row.command for row in train)
    assert all("around right" in row.command and "turn around right" not in row.command for row in test)

    for split, alone, times, unique in (("add_jump", "jump", 1467, 13204), ("add_turn_left", "turn left", 2189, 19702)):
        parts = scan.generate(split)
        count = Counter(row.command for row in parts.train)
        assert count.pop(alone) == times and set(count.values()) == {1} and len(count) == unique - 1
        assert not any(alone in command for command in count) and all(alone in row.command for row in parts.test)
        assert len(parts.test) == 20910 - unique


def test_a_command_as_arrays():
    test = scan.examples("test", split="length")
    assert len(test) == 3920
    for i in (0, 3919):
        assert test[i]["source"].shape == (9,) and test[i]["target"].shape == (48,)
        command, done = scan.COMMANDS.decode(test[i]["source"]), scan.ACTIONS.decode(test[i]["target"])
        assert done.split() == actions(command) and len(done.split()) > 22
    assert max(np.count_nonzero(example["target"]) for example in test) == 48
    assert all(example["source"].max() < 17 and example["source"][0] >= 4 for example in itertools.islice(test, 99))


# Questions


def main_auxiliary(words: list[str]) -> int:
    """Return the position of the main auxiliary, which is the first word after the subject.

    The subject has a determiner and a noun, and perhaps a prepositional phrase or a relative clause after the noun.
    """
    end = 2
    if words[end] in questions.PREPOSITIONS:
        end += 3
    elif words[end] in questions.RELATIVE:
        after = words[end + 1] in ["do", "don't", "does", "doesn't"]
        end += 3 if after and words[end + 2] in questions.INTRANSITIVE else 5
    assert words[end] in ["do", "don't", "does", "doesn't"], words
    return end


def test_questions_move_the_main_auxiliary():
    parts = questions.generate(seed=1, count=2000)
    for row in itertools.chain(*parts):
        *words, dot, kind = row.source.split()
        assert dot == "." and 6 <= len(words) + 2 <= 18
        main = main_auxiliary(words)
        noun = words[main - 1] if main == 2 else words[1]
        assert (noun in questions.PLURAL) == (words[main] in ("do", "don't"))
        if kind == "quest":
            moved = [words[main], *words[:main], *words[main + 1 :], "?", "quest"]
            assert row.target.split() == moved
        else:
            assert kind == "decl" and row.target == row.source


def test_questions_have_the_parts_of_the_published_data():
    parts = questions.generate()
    assert tuple(map(len, parts)) == (100_000, 1000, 10_000, 10_000)
    assert len({row for part in parts for row in part}) == 121_000
    for row in itertools.chain(*parts[:3]):
        words = row.source.split()
        assert words[-1] == "decl" or words[2] not in questions.RELATIVE, "withheld from these parts"
    for row in parts.gen:
        words = row.source.split()
        main = main_auxiliary(words)
        first = next(i for i, word in enumerate(words) if word in questions.AUXILIARIES[0] + questions.AUXILIARIES[1])
        assert words[-1] == "quest" and words[2] in questions.RELATIVE and words[first] != words[main]
        assert not set(words[main:]) & set(questions.RELATIVE), "the object has no relative clause"
    # Shares in the published test part. The tolerance is five standard errors of the difference of the two shares.
    rows = [row.source.split() for row in parts.test]
    for kind, share, intransitive in (("quest", 0.4034, 0.0862), ("decl", 0.5966, 0.1299)):
        of_kind = [words for words in rows if words[-1] == kind]
        slack = 5 * (2 * share * (1 - share) / 10_000) ** 0.5
        assert abs(len(of_kind) / 10_000 - share) < slack
        without = sum(words[main_auxiliary(words) + 1] in questions.INTRANSITIVE for words in of_kind) / len(of_kind)
        assert abs(without - intransitive) < 5 * (2 * intransitive * (1 - intransitive) / len(of_kind)) ** 0.5
    assert len(questions.VOCABULARY) == 72


def test_brackets_of_sources():
    """Every source has a binary tree over its words. The trees follow the grammars."""
    plain = lambda text: " ".join(word for word in text.split() if word not in "()")  # noqa: E731
    rows = [(row.command, scan.brackets) for row in scan.pairs()]
    rows += [(row.source, questions.brackets) for part in questions.generate(count=2000) for row in part[::5]]
    for source, brackets in rows:
        text = brackets(source)
        assert plain(text) == source and closing_brackets(text).sum() == len(source.split()) - 1
    for source, text in {
        "turn opposite left after look twice": "( ( turn ( opposite left ) ) ( after ( look twice ) ) )",
        "jump": "jump",
    }.items():
        assert scan.brackets(source) == text
    for source, text in {
        "my newt by the yak does sleep . decl": "( ( ( ( ( my newt ) ( by ( the yak ) ) ) ( does sleep ) ) . ) decl )",
        "some yaks that the newt does accept do eat . quest":
            "( ( ( ( ( some yaks ) ( that ( ( the newt ) ( does accept ) ) ) ) ( do eat ) ) . ) quest )",
    }.items():  # fmt: skip
        assert questions.brackets(source) == text
    examples = questions.examples("gen", T=18, count=10)
    expected = closing_brackets(questions.brackets(examples.rows[3].source), 18)
    np.testing.assert_array_equal(examples[3]["brackets"], expected)


# Text


def test_text_is_true():
    for line in scan.text(0, 200):
        command, done = re.fullmatch("IN: (.*) OUT: (.*)", line).groups()
        assert actions(command) == done.split()
    assert sum(1 for _ in scan.text(0, 30_000)) == 20910
    for line in questions.text(0, 200):
        source, target = re.fullmatch("IN: (.*) OUT: (.*)", line).groups()
        assert sorted(source.replace(".", "?").split()) == sorted(target.replace(".", "?").split())


# Errors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: scan.generate("add_jmp"), "split='add_jmp' is not one of .*did you mean 'add_jump'"),
        (lambda: scan.examples("dev"), "part='dev' is not one of 'train', 'valid', 'test'"),
        (lambda: scan.examples(T=8), "T=8 is too small: the longest command has 9 words"),
        (lambda: scan.examples("test", split="length", S=47), "S=47 is too small: the longest list of actions has 48"),
        (lambda: questions.examples("dev"), "part='dev' is not one of 'train', 'valid', 'test', 'gen'"),
        (lambda: questions.examples(T=9, count=10), "T=9 is too small: the longest source has"),
        (lambda: scan.examples("valid"), "valid_every=0 leaves no examples for validation"),
        (lambda: scan.brackets("jump and twice"), "has no phrase beside it"),
        (lambda: scan.brackets(""), "the command is empty, or a word"),
        (lambda: questions.brackets("my newt does"), "'my newt does' is not a statement .*: it ends too early"),
        (lambda: questions.brackets("my newt newt"), "not a statement of the grammar: the word 'newt' is not expected"),
        (lambda: questions.brackets("my yak does eat . decl ."), "of the grammar: the word '.' is not expected"),
        (lambda: closing_brackets("( a b c )"), r"every pair of brackets must have two parts, .*: '\( a b c \)'"),
        (lambda: closing_brackets("( a b"), "every pair of brackets must have two parts"),
        (lambda: closing_brackets("a b )"), "every pair of brackets must have two parts"),
        (lambda: closing_brackets("a ( b c )"), "the first pair must enclose all words"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
