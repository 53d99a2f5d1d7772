"""Copy an English statement, or turn it into a question (McCoy, Frank and Linzen, 2020, arXiv 2001.03632).

A source is a statement, followed by the word `decl` or `quest`. With `decl`, the target is the same as the source. With
`quest`, the target is the question: the main auxiliary (do, does, don't or doesn't) moves to the front, and `.` becomes
`?`. In training, no question has a subject with a relative clause. So two rules fit the training data: "move the main
auxiliary", and "move the first auxiliary". The two rules give different results for the questions of the split "gen".
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from stickjax.config.fields import one_of
from stickjax.data.tasks.encoding import SPECIAL, Examples, Vocabulary, closing_brackets, distinct, longest_of, words_in

DETERMINERS = ("the", "some", "my", "your", "our", "her")
SINGULAR = (
    "newt", "orangutan", "peacock", "quail", "raven", "salamander", "tyrannosaurus", "unicorn", "vulture", "walrus",
    "xylophone", "yak", "zebra",
)  # fmt: skip
PLURAL = tuple(f"{noun}es" if noun.endswith("us") else f"{noun}s" for noun in SINGULAR)
INTRANSITIVE = ("giggle", "smile", "sleep", "swim", "wait", "move", "change", "read", "eat")
TRANSITIVE = ("entertain", "amuse", "high_five", "applaud", "confuse", "admire", "accept", "remember", "comfort")
AUXILIARIES = (("does", "doesn't"), ("do", "don't"))  # for singular subjects, and for plural subjects
PREPOSITIONS = ("around", "near", "with", "upon", "by", "behind", "above", "below")
RELATIVE = ("who", "that")
# Ids 0 to 3 are as in `stickjax.data.tasks.scan`. Sources and targets have the same vocabulary.
VOCABULARY = Vocabulary(
    " ".join(
        [*DETERMINERS, *SINGULAR, *PLURAL, *INTRANSITIVE, *TRANSITIVE, *AUXILIARIES[0], *AUXILIARIES[1]]
        + [*PREPOSITIONS, *RELATIVE, ".", "?", "decl", "quest"]
    ),
    SPECIAL,
)

# The subject of a sentence is a noun, a noun with a preposition, or a noun with a relative clause. The object is one of
# these three kinds too, or there is no object ("none"). A kind is drawn with the frequency that it has in these tuples.
# In the published grammar, the three kinds of subject are equally frequent, and half of the sentences have no object.
# The published training and test sentences have other frequencies. SUBJECTS and OBJECTS have the frequencies in the
# 10,000 published test sentences. GEN_OBJECTS has the frequencies of the grammar, as the published split "gen" does.
SUBJECTS = ("noun",) * 9 + ("preposition",) * 4 + ("clause",) * 5
OBJECTS = ("none", "noun", "preposition") * 3 + ("clause",) * 4
GEN_OBJECTS = ("none", "none", "none", "noun", "preposition")

Pick = Callable[[Sequence], object]  # draws one of several things, all equally likely


class Example(NamedTuple):
    source: str
    target: str


class QuestionParts(NamedTuple):
    """The splits of the generated data set: for training, for validation, for tests, and `gen`.

    The examples of `gen` show whether a model generalises to questions whose subject has a relative clause.
    """

    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    test: tuple[Example, ...]
    gen: tuple[Example, ...]


def _noun(pick: Pick, number: int | None = None) -> list:
    """Draw a determiner and a noun, and return the two words as a list.

    `number` is 0 for a singular noun and 1 for a plural noun; None: singular or plural at random.
    """
    number = pick((0, 1)) if number is None else number
    return [pick(DETERMINERS), pick((SINGULAR, PLURAL)[number])]


def _clause(pick: Pick, number: int) -> list:
    """Draw a relative clause for a noun, and return the list of its words.

    `number` is 0 for a singular noun and 1 for a plural noun.

    For a singular noun, the clause is like `who does sleep` with probability 1/3, like `who does admire the newt` with
    probability 1/3, and like `who the newt does admire` or `who the newts do admire` with probability 1/6 each.
    """
    relative, form = pick(RELATIVE), pick((0, 0, 1, 1, 2, 3))
    if form == 0:
        return [relative, pick(AUXILIARIES[number]), pick(INTRANSITIVE)]
    if form == 1:
        return [relative, pick(AUXILIARIES[number]), pick(TRANSITIVE), *_noun(pick)]
    other = form - 2
    return [relative, *_noun(pick, other), pick(AUXILIARIES[other]), pick(TRANSITIVE)]


def _phrase(pick: Pick, kind: str, number: int) -> list:
    """Draw a subject or an object, and return the list of its words.

    `number` is 0 for a singular noun and 1 for a plural noun. `kind` is "noun" (a determiner and a noun), "preposition"
    (also a preposition and a second noun) or "clause" (also a relative clause).
    """
    words = _noun(pick, number)
    if kind == "preposition":
        return [*words, pick(PREPOSITIONS), *_noun(pick)]
    return [*words, *_clause(pick, number)] if kind == "clause" else words


class _Sentence(NamedTuple):
    subject: list
    auxiliary: str
    rest: list
    has_clause: bool  # whether the subject has a relative clause


def _sentence(pick: Pick, subjects: Sequence[str], objects: Sequence[str]) -> _Sentence:
    """Draw a sentence. The kind of its subject is drawn from `subjects`, and the kind of its object from `objects`.

    The kinds are "noun", "preposition" and "clause" (see `_phrase`), and for objects also "none".
    """
    number, kind, other = pick((0, 1)), pick(subjects), pick(objects)
    subject, auxiliary = _phrase(pick, kind, number), pick(AUXILIARIES[number])
    rest = [pick(INTRANSITIVE)] if other == "none" else [pick(TRANSITIVE), *_phrase(pick, other, pick((0, 1)))]
    return _Sentence(subject, auxiliary, rest, kind == "clause")


def _example(sentence: _Sentence, is_question: bool) -> Example:
    subject, auxiliary, rest, _ = sentence
    source = " ".join([*subject, auxiliary, *rest, ".", "quest" if is_question else "decl"])
    return Example(source, " ".join([auxiliary, *subject, *rest, "?", "quest"]) if is_question else source)


def _picker(seed: int) -> Pick:
    uniform = Random(seed).random
    return lambda options: options[int(len(options) * uniform())]


def _draws(pick: Pick) -> Iterator[Example]:
    """Yield endlessly many random examples: statements and questions.

    Statements and questions are drawn equally often. Then a question is left out if its subject has a relative clause.
    """
    while True:
        sentence, is_question = _sentence(pick, SUBJECTS, OBJECTS), pick((False, True))
        if not (is_question and sentence.has_clause):
            yield _example(sentence, is_question)


def _gen_draws(pick: Pick) -> Iterator[Example]:
    """Yield endlessly many random questions. Each subject has a relative clause, and no object has a relative clause.

    A question is made from a statement. The first auxiliary of the statement is in the relative clause, and
    differs from the main auxiliary, as `do` differs from `does`.
    """
    while True:
        sentence = _sentence(pick, ("clause",), GEN_OBJECTS)
        first = next(word for word in sentence.subject if word in AUXILIARIES[0] + AUXILIARIES[1])
        if first != sentence.auxiliary:
            yield _example(sentence, True)


def brackets(source: str) -> str:
    """Return a source with brackets "(" and ")" that show its binary tree.

    A sentence is a subject and a predicate. An auxiliary is joined with its verb phrase, a verb with its object, and a
    preposition or a relative pronoun with the words that belong to it. Each of the last two words is joined with all
    words before it.

    Raises ValueError if the source is not a statement of the grammar, followed by `decl` or `quest`.

    >>> brackets("our newt who does sleep does admire the yak . quest")
    '( ( ( ( ( our newt ) ( who ( does sleep ) ) ) ( does ( admire ( the yak ) ) ) ) . ) quest )'
    """
    words = source.split()[::-1]

    def take(*allowed: Sequence) -> str:
        if not words or not any(words[-1] in group for group in allowed):
            found = f"the word {words[-1]!r} is not expected" if words else "it ends too early"
            raise ValueError(f"{source!r:.200} is not a statement of the grammar: {found}")
        return words.pop()

    comes = lambda group: words[-1:] and words[-1] in group  # noqa: E731

    def noun() -> str:
        return f"( {take(DETERMINERS)} {take(SINGULAR, PLURAL)} )"

    def predicate(thing: Callable[[], str]) -> str:
        auxiliary, transitive = take(*AUXILIARIES), comes(TRANSITIVE)
        verb = take(INTRANSITIVE, TRANSITIVE)
        return f"( {auxiliary} ( {verb} {thing()} ) )" if transitive else f"( {auxiliary} {verb} )"

    def clause() -> str:
        if comes(DETERMINERS):
            return f"( {noun()} ( {take(*AUXILIARIES)} {take(TRANSITIVE)} ) )"
        return predicate(noun)

    def phrase() -> str:
        head = noun()
        if comes(PREPOSITIONS):
            return f"( {head} ( {take(PREPOSITIONS)} {noun()} ) )"
        return f"( {head} ( {take(RELATIVE)} {clause()} ) )" if comes(RELATIVE) else head

    sentence = f"( {phrase()} {predicate(phrase)} )"
    tree = f"( ( {sentence} {take(('.',))} ) {take(('decl', 'quest'))} )"
    if words:
        take()  # no word may follow, so this raises the error
    return tree


@functools.lru_cache(maxsize=1)
def generate(seed: int = 0, count: int = 100_000) -> QuestionParts:
    """Generate `count` training examples, 1000 examples for validation, 10,000 for tests and 10,000 for "gen".

    No two examples are the same, in one split or in different splits. About 60 % of the examples for training,
    validation and tests are statements, and 40 % are questions. The split "gen" has only questions. A source has 6 to
    18 words. `seed` decides the random examples.

    >>> parts = generate()
    >>> [len(part) for part in parts]
    [100000, 1000, 10000, 10000]
    >>> parts.gen[0].source
    "our walrus who doesn't swim does wait . quest"
    >>> parts.gen[0].target
    "does our walrus who doesn't swim wait ? quest"
    >>> sum(row.source.endswith("quest") for row in parts.test) / 10_000
    0.4018
    """
    pick = _picker(seed)
    rows = tuple(distinct(_draws(pick), count + 11_000))
    gen = tuple(distinct(_gen_draws(pick), 10_000))
    return QuestionParts(rows[:count], rows[count : count + 1000], rows[count + 1000 :], gen)


def examples(
    part: str = "train", *, T: int | None = 18, S: int | None = None, seed: int = 0, count: int = 100_000
) -> Examples:
    """Return the examples of one split. An example has the int32 arrays `source` [T], `brackets` [T] and `target` [S].

    `part` is the name of the split: "train", "valid", "test" or "gen". `source` and `target` have the ids of the words
    in VOCABULARY, and `brackets` has the number of brackets that close after each word of the source (see the function
    `brackets`). All three are padded with 0. If T is None, T is the number of words of the longest source. If S is
    None, S is the number of words of the longest target. `count` is the number of training examples, and `seed` decides
    the examples.

    Raises ValueError if a source has more than T words, if a target has more than S words, or for an unknown part.

    >>> {name: array.shape for name, array in examples("gen", T=16, count=100)[0].items()}
    {'source': (16,), 'brackets': (16,), 'target': (16,)}
    """
    one_of("part", part, QuestionParts._fields)
    rows, sizes = getattr(generate(seed, count), part), []
    for letter, size, name in (("T", T, "source"), ("S", S, "target")):
        longest = longest_of(rows, name)
        if size is not None and longest > size:
            raise ValueError(f"{letter}={size} is too small: the longest {name} has {longest} words")
        sizes.append(longest if size is None else size)

    def arrays(row: Example):
        return dict(
            source=VOCABULARY.encode(row.source, sizes[0]),
            brackets=closing_brackets(brackets(row.source), sizes[0]),
            target=VOCABULARY.encode(row.target, sizes[1]),
        )

    lengths = lambda row: (words_in(row.source), words_in(row.target))  # noqa: E731
    return Examples(rows, arrays, (("source", "brackets"), ("target",)), lengths)


def text(seed: int, count: int) -> Iterator[str]:
    """Return an iterator over `count` different lines of text for a language model.

    A line has the source and the target of one example. `seed` decides the examples.

    >>> next(text(22, 1))
    'IN: her peacocks do move . decl OUT: her peacocks do move . decl'
    """
    return (f"IN: {row.source} OUT: {row.target}" for row in distinct(_draws(_picker(seed)), count))
