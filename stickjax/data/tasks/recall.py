"""Multi-query repeated associative recall: a model must answer which value was last assigned to a key.

The task is from Tan et al. (2024, arXiv 2410.17980). A sequence has two kinds of statements in random order. `a 3`
assigns the value 3 to the key a. `? a` asks for the value of the key a. If a key gets several values, the latest value
counts. In the simpler task of Arora et al. (2023, arXiv 2312.04927), each key gets only one value.
"""

import string
from collections.abc import Iterator
from random import Random

import numpy as np

from stickjax.config.fields import one_of
from stickjax.data.tasks.encoding import Examples, Parts, Vocabulary, distinct

KEYS, VALUES, QUERY = string.ascii_letters, string.digits, "?"
VOCABULARY = Vocabulary(" ".join([*KEYS, *VALUES, QUERY]))


def _statements(random: Random, count: int, keys: int) -> Iterator[tuple[str, str, bool]]:
    """Yield `count` random statements as (key, latest value of the key, True if the statement is a question).

    First, `keys` different keys are chosen at random. The first statement assigns a value to one of them. Each later
    statement is a question with probability 1/2, and otherwise assigns a random value to a random key. A question asks
    for a key that has a value.
    """
    latest: dict[str, str] = {}
    names = random.sample(KEYS, keys)
    for _ in range(count):
        asked = bool(latest) and random.random() < 0.5
        key = random.choice(list(latest) if asked else names)
        if not asked:
            latest[key] = random.choice(VALUES)
        yield key, latest[key], asked


def examples(part: str = "train", *, T: int = 128, keys: int = 16, seed: int = 0, count: int = 100_000) -> Examples:
    """Return random sequences of T / 2 statements, to train or test a language model. A sequence has these arrays [T]:

    `tokens`: int32, the ids of the symbols. A statement is two symbols.
    `targets`: int32. Where the token is the key of a question, the id of the latest value of this key; elsewhere 0.
    `segment_ids`: int32, zeros.
    `loss_mask`: bool, True where the token is the key of a question.

    Args:
      part: "train" or "test", which have different sequences.
      T: the number of tokens of a sequence.
      keys: the number of different keys in a sequence.
      seed: the seed of the random statements.
      count: the number of sequences. A sequence depends on its index and the other arguments, but not on `count`.

    Raises ValueError if T is not a positive even number, if `keys` is not in 1..52, or for an unknown part.

    >>> example = examples(T=12, keys=2)[0]
    >>> VOCABULARY.decode(example["tokens"])
    'h 5 ? h K 2 ? K K 2 K 9'
    >>> VOCABULARY.decode(example["targets"][example["loss_mask"]])
    '5 2'
    """
    one_of("part", part, Parts._fields)
    if T < 2 or T % 2:
        raise ValueError(f"T={T} must be even and positive: a statement is two tokens")
    if not 1 <= keys <= len(KEYS):
        raise ValueError(f"keys={keys} must be in 1..{len(KEYS)}")

    def arrays(index: int) -> dict[str, np.ndarray]:
        statements = list(_statements(Random(f"{seed} {part} {index}"), T // 2, keys))
        tokens = " ".join(f"{QUERY} {key}" if asked else f"{key} {value}" for key, value, asked in statements)
        targets = np.zeros(T, np.int32)
        targets[1::2] = [VOCABULARY.ids[value] if asked else 0 for _, value, asked in statements]
        return dict(
            tokens=VOCABULARY.encode(tokens, T),
            targets=targets,
            segment_ids=np.zeros(T, np.int32),
            loss_mask=targets > 0,
        )

    return Examples(range(count), arrays)


def text(seed: int, count: int) -> Iterator[str]:
    """Return an iterator over `count` different random lines of text for a language model.

    A line has 32 statements about at most 8 keys. After each question comes the value. `seed` decides the statements.

    >>> next(text(0, 1))[:40]
    'q 7 ? q 7 q 2 q 8 A 4 ? q 8 G 7 G 6 ? G '
    """

    def lines() -> Iterator[str]:
        random = Random(seed)
        while True:
            statements = _statements(random, 32, 8)
            yield " ".join(f"{QUERY} {key} {value}" if asked else f"{key} {value}" for key, value, asked in statements)

    return distinct(lines(), count)
