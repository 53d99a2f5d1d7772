"""Words that give away a label are found, and the rows whose words do not give away the label are selected."""

import json
import math
from random import Random

import pytest

from stickjax import DataConfig
from stickjax.data.labelled import LabelledRows
from stickjax.data.nli_bias import filtered_rows, lines_of, majority_share, word_associations
from stickjax.data.tables import read_records
from stickjax.data.tokenizer import words_of

COMMON = ("a", "man", "woman", "dog", "runs", "sits", "walks", "in", "the", "on", "street", "park", "house", "with")
PLANTED = {"contradiction": ["nobody", "cat"], "entailment": ["outdoors", "least"], "neutral": ["sad", "tall"]}


def biased(count: int, seed: int = 0) -> list[dict]:
    """Return rows in which about half of the hypotheses have a planted word.

    Every label has its own planted words. With probability 0.9, the word is one of the planted words of the label of
    the row, otherwise of a random label. The premises say nothing about the label. Every fortieth hypothesis also has a
    rare word. It occurs in no other row, so only with one label.
    """
    random = Random(seed)
    found = []
    for i in range(count):
        label = random.choice(list(PLANTED))
        words = random.choices(COMMON, k=random.randint(4, 9))
        if random.random() < 0.5:
            source = label if random.random() < 0.9 else random.choice(list(PLANTED))
            words.insert(random.randrange(len(words)), random.choice(PLANTED[source]))
        if i % 40 == 0:
            words.append(f"rare{i}")
        premise = " ".join(random.choices(COMMON, k=8))
        found.append({"premise": premise, "hypothesis": " ".join(words), "gold": label, "id": i})
    return found


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in biased(3000)))
    return DataConfig(
        source="labelled", path=str(path), left_field="premise", right_field="hypothesis", label_field="gold"
    )


def test_the_planted_words_are_found(data):
    rows = LabelledRows(data, ("left", "right")).records("train")
    found = word_associations((row.texts[1], row.label) for row in rows)
    assert set(found) == set(PLANTED)
    for label, words in PLANTED.items():
        first = found[label]
        assert {one.word for one in first[:2]} == set(words)
        assert first[1].pmi > 1 > 0.4 > first[2].pmi, "the values of all other words must be far below"
    premises = word_associations((row.texts[0], row.label) for row in rows)
    assert max(one.pmi for words in premises.values() for one in words) < 0.4


def test_the_formula_and_its_bounds():
    rows = [("a b", "x")] * 6 + [("a a", "y")] * 2 + [("c", "y")] * 4
    found = {one.word: one for one in word_associations(rows, min_count=1, smoothing=3)["x"]}
    assert found.keys() == {"a", "b"}, "c must be left out, because its value for x is negative"
    assert (found["a"].together, found["a"].rows) == (6, 8), "a word that occurs twice in a text must count once"
    assert found["a"].pmi == pytest.approx(math.log2((6 + 3 / 2) / (8 + 3) / (1 / 2)))
    assert found["b"].pmi == pytest.approx(math.log2((6 + 3 / 2) / (6 + 3) / (1 / 2)))
    bare = {one.word: one.pmi for one in word_associations(rows, min_count=1, smoothing=0)["x"]}
    assert bare["b"] == 1 and bare["a"] == pytest.approx(math.log2(6 / 8 * 2))
    assert [one.word for one in word_associations(rows, min_count=7)["x"]] == ["a"]
    rare = word_associations([("rare", "x"), *[("a", "x"), ("b", "y")] * 50], min_count=1)["x"]
    assert [one.word for one in rare] == ["a", "rare"], "smoothing must rank a word that was seen once last"


def test_the_filtered_rows_are_those_that_the_words_do_not_give_away(data, tmp_path):
    """`filtered_rows` keeps the rows for which a model that reads only the hypothesis chooses a wrong label.

    Here the model is a rule: for each label, it adds up the pointwise mutual information of the words.
    """
    rows = LabelledRows(data, ("left", "right"))
    train, test = rows.records("train"), rows.records("test")
    found = word_associations((row.texts[1], row.label) for row in train)
    values = {(one.word, label): one.pmi for label, words in found.items() for one in words}

    def choose(text: str) -> str:
        return max(PLANTED, key=lambda label: sum(values.get((word, label), 0) for word in set(words_of(text))))

    chosen = [choose(row.texts[1]) for row in test]
    right = sum(row.label == label for row, label in zip(test, chosen, strict=True))
    assert right / len(test) > majority_share([row.label for row in test]) + 0.15
    kept = filtered_rows(test, chosen)
    assert len(kept) == len(test) - right and all(choose(row.texts[1]) != row.label for row in kept)
    # `lines_of` writes these rows, with all their fields, for a new file.
    (tmp_path / "kept.jsonl").write_bytes(lines_of(data.path, (row.line for row in kept)))
    again = read_records(str(tmp_path / "kept.jsonl"), data)
    assert [row[:2] for row in again] == [row[:2] for row in kept]
    assert "id" in json.loads((tmp_path / "kept.jsonl").read_text().splitlines()[0])


def test_a_table_keeps_its_first_line(tmp_path):
    file = tmp_path / "x.tsv"
    file.write_bytes(b"text\tlabel\r\na\tx\r\nb\ty\r\nc\tx")
    assert lines_of(file, [4, 2]) == b"text\tlabel\na\tx\nc\tx\n"
    file = tmp_path / "x.csv"
    file.write_text('text,label\n"a\nb",x\n')
    with pytest.raises(ValueError, match="a value has several lines"):
        lines_of(file, [3])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: word_associations([("a", "x")], min_count=0), "min_count=0 must be at least 1"),
        (lambda: word_associations([("a", "x")], smoothing=-1), "smoothing=-1 must be at least 0"),
        (lambda: word_associations([]), "there are no rows"),
        (lambda: filtered_rows([], ["x"]), "there are 0 rows, but 1 chosen labels"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
