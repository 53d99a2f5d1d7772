"""Test the generated tasks: their labels, sizes, splits, batches and texts.

The tests compute the expected labels by other algorithms than stickjax. The expected sizes are the sizes of the
published data.
"""

import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest

from stickjax.config import DataConfig
from stickjax.data.batches import batches, task_loader
from stickjax.data.corpus import load_corpus
from stickjax.data.heldout import heldout_windows
from stickjax.data.tasks import TASKS, Vocabulary, documents, listops, logic, recall

# Propositional logic


@pytest.fixture(scope="module")
def drawn():
    return logic.generate(seed=1, draws=20_000)


def parse(words: list[str]):
    """Parse a logic sentence by recursive descent; return nested tuples such as ("and", "a", ("not", "b")).

    The words of the sentence are removed from the list.
    """
    word = words.pop(0)
    if word != "(":
        assert word in "abcdef"
        return word
    if words[0] == "not":
        words.pop(0)
        tree = ("not", parse(words))
    else:
        left = parse(words)
        assert words.pop(0) == "("
        tree = (words.pop(0), left, parse(words))
        assert tree[0] in ("and", "or") and words.pop(0) == ")"
    assert words.pop(0) == ")"
    return tree


def sentence(text: str):
    tree = parse(words := text.split())
    assert not words
    return tree


def holds(tree, world: dict) -> bool:
    if isinstance(tree, str):
        return world[tree]
    parts = [holds(part, world) for part in tree[1:]]
    return {"not": lambda: not parts[0], "and": lambda: all(parts), "or": lambda: any(parts)}[tree[0]]()


def operators(tree) -> int:
    return 0 if isinstance(tree, str) else 1 + sum(map(operators, tree[1:]))


def test_relations_are_those_of_all_worlds(drawn):
    worlds = [dict(zip("abcdef", bits, strict=True)) for bits in itertools.product((False, True), repeat=6)]
    rows = [row for bucket in drawn for row in (*bucket.train[:40], *bucket.test[:20])]
    for row in rows:
        trees = sentence(row.left), sentence(row.right)
        cells = {tuple(holds(tree, world) for tree in trees) for world in worlds}
        both, left, right, neither = (True, True), (True, False), (False, True), (False, False)
        expected = {
            frozenset([both, neither]): "=",
            frozenset([both, right, neither]): "<",
            frozenset([both, left, neither]): ">",
            frozenset([left, right]): "^",
            frozenset([left, right, neither]): "|",
            frozenset([both, left, right]): "v",
            frozenset([both, left, right, neither]): "#",
        }[frozenset(cells)]  # fails for a sentence that always or never holds
        assert logic.RELATIONS[row.label] == expected, row
        assert row.bucket == min(12, max(map(operators, trees)))
        assert len(set(row.left + row.right) & set("abcdef")) <= 6
    assert {row.label for row in rows} == set(range(7)), "every relation occurs"


def test_buckets_hold_their_own_and_parts_share_nothing(drawn):
    assert len(drawn) == 13
    for number, (train, test) in enumerate(drawn):
        rows = [*train, *test]
        assert all(row.bucket == number for row in rows) and len(set(rows)) == len(rows)
        assert len(train) == int(0.85 * len(rows))
    assert (len(drawn[0].train), len(drawn[0].test)) == (30, 6), "all 6 * 6 pairs of variables are drawn"


def test_every_sentence_parses_over_at_most_four_variables(drawn):
    for row in itertools.chain(*drawn[0], *drawn[6], *drawn[12]):
        for side in (row.left, row.right):
            sentence(side)
        assert len(set(f"{row.left} {row.right}".split()) & set("abcdef")) <= 4
    lengths = [side.count(" ") + 1 for bucket in drawn[:7] for row in bucket.train for side in row[:2]]
    assert max(lengths) == 37


def test_labels_are_as_frequent_as_in_the_published_data(drawn):
    rows = [row for bucket in drawn[:7] for row in bucket.train]
    count = Counter(logic.RELATIONS[row.label] for row in rows)
    published = {"#": 0.542, ">": 0.107, "<": 0.106, "v": 0.102, "|": 0.102, "=": 0.021, "^": 0.019}
    for relation, share in published.items():
        # The tolerance is five standard errors. With few draws, small buckets have a larger share of the pairs, and `=`
        # and `^` are slightly more frequent in small buckets.
        slack = 5 * (share * (1 - share) / len(rows)) ** 0.5
        assert abs(count[relation] / len(rows) - share) < slack, relation


@pytest.mark.parametrize(
    "split, pattern",
    [
        ("A", r"\( and \( not a \) \)"),
        ("B", r"\( and \( not .* \) \)"),
        ("C", r"\( (and|or) \( not .* \) \)"),
    ],
)
def test_systematic_splits_withhold_a_pattern(drawn, split, pattern):
    train, test = (logic.examples(part, split=split, seed=1, draws=20_000).rows for part in ("train", "test"))
    assert Counter([*train, *test]) == Counter(row for bucket in drawn[:7] for row in bucket.train)
    assert train and all(not re.search(pattern, f"{row.left} # {row.right}") for row in train)
    assert test and all(re.search(pattern, row.left) or re.search(pattern, row.right) for row in test)


def test_a_pair_as_arrays(drawn):
    pairs = logic.examples("test", T=76, buckets=[11, 12], seed=1, draws=20_000)
    assert len(pairs) == len(drawn[11].test) + len(drawn[12].test) and len(logic.VOCABULARY) == 12
    row, arrays = drawn[11].test[3], pairs[3]
    for side in ("left", "right"):
        ids = arrays[side]
        assert ids.dtype == np.int32 and ids.shape == (76,) and not ids[np.count_nonzero(ids) :].any()
        assert logic.VOCABULARY.decode(ids) == getattr(row, side)
    assert (arrays["label"], arrays["bucket"]) == (row.label, 11)


# ListOps


@pytest.fixture(scope="module")
def lists():
    return listops.generate(1, 10_000)


def value(text: str) -> int:
    """Return the value of a ListOps expression such as "[MAX 2 9 ]", computed with a stack.

    The brackets "(" and ")" of `listops.binary` are skipped.
    """
    stack: list = []
    for symbol in text.split():
        if symbol in "()":
            continue
        if symbol != "]":
            stack.append(int(symbol) if symbol.isdigit() else symbol)
            continue
        values: list[int] = []
        while isinstance(stack[-1], int):
            values.insert(0, stack.pop())
        assert 2 <= len(values) <= 5
        order, n = sorted(values), len(values)
        middle = (order[(n - 1) // 2] + order[n // 2]) // 2
        stack.append({"[MIN": order[0], "[MAX": order[-1], "[MED": middle, "[SM": sum(values) % 10}[stack.pop()])
    assert len(stack) == 1
    return stack[0]


def test_lists_have_their_values_in_both_forms(lists):
    for row in lists.train[:2000]:
        assert value(row.text) == row.label
        binary = listops.binary(row.text)
        assert value(binary) == row.label
        assert " ".join(symbol for symbol in binary.split() if symbol not in "()") == row.text
        # Each pair of brackets joins two parts, so there is one pair less than there are symbols.
        assert binary.count("(") == binary.count(")") == row.text.count(" ")
    assert listops.binary("[SM [MIN 1 2 ] 3 ]") == "( ( ( [SM ( ( ( [MIN 1 ) 2 ) ] ) ) 3 ) ] )"


def test_lists_differ_and_hold_more_than_a_digit(lists):
    rows = [*lists.train, *lists.test]
    assert len(rows) == len(set(rows)) == 10_000 - 10 and abs(len(lists.test) - 1000) <= 10
    assert all("[" in row.text for row in rows)


@pytest.mark.slow
def test_lists_are_as_long_as_the_published_ones():
    # The lengths depend on the count: the rows are distinct, so a larger count has more long rows.
    rows = [row for part in listops.generate(count=100_000) for row in part]
    lengths = np.array([row.text.count(" ") + 1 for row in rows])
    assert np.median(lengths) == 16
    # The published numbers are for 10,000 test lists. The tolerance is five of their standard errors.
    assert abs(lengths.mean() - 42.8) < 5 * lengths.std() / 100
    for mean, share in (
        ((lengths <= 50).mean(), 0.797),
        ((lengths <= 100).mean(), 0.893),
        (np.mean([row.text.count("]") == 1 for row in rows]), 0.209),
    ):
        assert abs(mean - share) < 5 * (share * (1 - share) / 10_000) ** 0.5


@pytest.mark.parametrize("brackets", [False, True])
def test_a_list_as_arrays(lists, brackets):
    short = listops.examples("test", T=50, brackets=brackets, seed=1, count=10_000)
    texts = [listops.binary(row.text) if brackets else row.text for row in lists.test]
    kept = [i for i, text in enumerate(texts) if text.count(" ") < 50]
    assert len(short) == len(kept) < len(texts)
    for example, i in zip(itertools.islice(short, 500), kept[:500], strict=True):
        assert listops.VOCABULARY.decode(example["tokens"]) == texts[i] and example["label"] == lists.test[i].label
        assert example["tokens"].shape == (50,) and example["tokens"].dtype == example["label"].dtype == np.int32


# Recall


def test_what_is_asked_for_is_the_latest_value():
    examples = recall.examples("train", T=64, keys=4, count=200)
    assert len(examples) == 200 and len(recall.VOCABULARY) == 52 + 10 + 2
    again = queries = 0
    for example in examples:
        assert {name: (a.shape, str(a.dtype)) for name, a in example.items()} == {
            "tokens": ((64,), "int32"), "targets": ((64,), "int32"),
            "segment_ids": ((64,), "int32"), "loss_mask": ((64,), "bool"),
        }  # fmt: skip
        words = [recall.VOCABULARY.symbols[i] for i in example["tokens"]]
        latest: dict[str, str] = {}
        expected = np.zeros(64, int)
        for i in range(0, 64, 2):
            if words[i] == "?":
                expected[i + 1] = recall.VOCABULARY.ids[latest[words[i + 1]]]
            else:
                again += words[i] in latest
                latest[words[i]] = words[i + 1]
                assert words[i].isalpha() and words[i + 1].isdigit()
        assert np.array_equal(example["targets"], expected)
        assert np.array_equal(example["loss_mask"], expected > 0) and not example["segment_ids"].any()
        assert 1 <= len(latest) <= 4
        queries += example["loss_mask"].sum()
    assert again > 200 * 5, "keys are assigned again"
    n = 200 * 31
    assert abs(queries - n / 2) < 5 * (n / 4) ** 0.5, "half of all statements except the first are queries"


# All of them

SMALL = {
    "logic": dict(draws=2000),
    "listops": dict(count=300),
    "scan": dict(split="add_jump"),
    "recall": dict(count=50, keys=5),
    "questions": dict(count=300),
}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_examples(name):
    make, options = TASKS[name].examples, SMALL[name] | (dict(split="simple") if name == "scan" else {})
    here, other = (list(itertools.islice(make(seed=seed, **options), 20)) for seed in (3, 4))
    there, test = (list(itertools.islice(make(part, seed=3, **options), 200)) for part in ("train", "test"))
    assert len(here) == 20 and all(map(equal, here, there))
    assert not all(map(equal, here, other))
    assert not any(equal(a, b) for a in here for b in test)


@pytest.mark.parametrize("name", TASKS)
def test_a_loader_of_a_task_resumes_bit_for_bit(name):
    config = DataConfig(T=40, B=8, seed=5)
    loader = task_loader(name, config, **SMALL[name])
    assert all(a.shape[0] == 8 for a in next(loader).values())
    state = json.dumps(loader.get_state())
    rest = [next(loader) for _ in range(3)]
    resumed = task_loader(name, config, **SMALL[name])
    resumed.set_state(json.loads(state))
    assert all(equal(a, next(resumed)) for a in rest)
    half = task_loader(name, config, process_index=1, process_count=2, **SMALL[name])
    half.set_state(json.loads(state))
    assert all(equal({k: v[4:] for k, v in a.items()}, next(half)) for a in rest)
    assert not equal(rest[0], next(task_loader(name, config, "test", **SMALL[name])))


def test_batches_are_dicts_of_stacked_arrays():
    batch = next(task_loader("logic", DataConfig(T=40, B=6), draws=2000))
    assert {name: (a.shape, str(a.dtype)) for name, a in batch.items()} == {
        "left": ((6, 40), "int32"), "right": ((6, 40), "int32"), "label": ((6,), "int32"), "bucket": ((6,), "int32")
    }  # fmt: skip


# Text


@pytest.mark.parametrize("name", TASKS)
def test_text_is_blocks_of_different_lines(name):
    blocks = list(documents(name, 500))
    lines = "".join(blocks).splitlines()
    assert lines == list(TASKS[name].text(0, 500)) and len(set(lines)) == 500
    assert all(block.endswith("\n") for block in blocks)
    for block in blocks[:-1]:
        assert len(block) >= 4096 > len(block) - len(block.splitlines()[-1]) - 1
    assert lines != list(TASKS[name].text(1, 500))


def test_text_is_true():
    for line in logic.text(0, 200):
        left, relation, right = re.fullmatch(r"(.*) ([<>=^|#v]) (.*)", line).groups()
        assert sentence(left) and sentence(right) and relation in logic.RELATIONS
    for line in listops.text(0, 200):
        text, _, result = line.partition(" = ")
        assert text[0] == "[" and value(text) == int(result)
    for line in recall.text(0, 200):
        latest: dict[str, str] = {}
        words = iter(line.split())
        for key in words:
            asked, key = key == "?", next(words) if key == "?" else key
            result = next(words)
            assert not asked or latest[key] == result
            latest[key] = result


def test_a_generated_source_is_a_corpus():
    train, heldout = load_corpus(DataConfig(source="recall", examples=400, heldout_every=5))
    again, _ = load_corpus(DataConfig(source="recall", examples=400, heldout_every=5, seed=9))
    more, _ = load_corpus(DataConfig(source="recall", examples=440, heldout_every=5))
    assert train.hash == again.hash != more.hash and train.source == "recall"
    blocks = [corpus.tokenizer.decode(corpus.tokens[:4000]).splitlines()[:9] for corpus in (train, heldout)]
    lines = list(recall.text(0, 400))
    assert blocks[1] == lines[:9] and set(blocks[0]) < set(lines) - set(lines[:9])
    assert heldout_windows(heldout, 512).lengths[-1] == 8, "a document is as long as 8 contexts of 512 bytes"


def test_a_mixture_has_equal_shares(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": c * 50_000}) + "\n" for c in "XYZ"))
    config = DataConfig(source="text,listops,scan", path=str(tmp_path / "x.jsonl"), examples=400, heldout_every=3)
    parts = load_corpus(config)
    alone = [load_corpus(DataConfig(source=s, examples=400, heldout_every=3)) for s in ("listops", "scan")]
    alone.insert(0, load_corpus(DataConfig(source="text", path=config.path, heldout_every=3)))
    for mixed, single in zip(parts, zip(*alone, strict=True), strict=True):
        size = min(len(corpus.tokens) for corpus in single)
        assert len(mixed.tokens) == 3 * size and mixed.tokens.dtype == np.uint16
        for share, corpus in zip(np.split(mixed.tokens, 3), single, strict=True):
            assert np.array_equal(share[:-1], corpus.tokens[: size - 1]) and share[-1] == 256
        assert mixed.documents == (mixed.tokens == 256).sum() == len(mixed.tokens) - mixed.bytes
        assert mixed.source == f"{config.path},listops,scan"
    assert parts[0].hash != parts[1].hash
    assert parts[0].hash == load_corpus(config)[0].hash


# Errors


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: logic.examples(T=20, draws=2000),
            r"T=20 must be at least \d\d, the number of tokens of the longest sentence",
        ),
        (lambda: logic.examples("trian", draws=10), "part='trian' is not one of .*did you mean 'train'"),
        (lambda: logic.examples(split="D", draws=10), "split='D' is not one of 'A', 'B', 'C'"),
        (lambda: listops.examples("dev", count=10), "part='dev' is not one of 'train', 'valid', 'test'"),
        (lambda: recall.examples("dev"), "part='dev' is not one of 'train', 'test'"),
        (lambda: recall.examples(T=7), "T=7 must be even and positive"),
        (lambda: recall.examples(keys=53), r"keys=53 must be in 1\.\.52"),
        (lambda: Vocabulary("a b").encode("a b a", 2), "T=2 must be at least 3, the number of symbols of the text"),
        (lambda: Vocabulary("a b").encode("a c", 2), "'c' is not one of the symbols a b"),
        (lambda: task_loader("logik", DataConfig()), "task='logik' is not one of .*did you mean 'logic'"),
        (lambda: task_loader("listops", DataConfig(T=2), count=300), "no example can be used: the data is empty"),
        (lambda: batches(range(8), B=3, seed=0, process_count=2), "B=3 sequences must be a multiple of"),
    ],
)
def test_bad_input_is_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
