"""Labelled rows of a file: formats, parts, labels, tokenizers, runs that keep their labels and words, and bad input."""

import csv
import json
import shutil

import numpy as np
import pytest
from conftest import assert_same_state

from stickjax import Config, DataConfig, ExpertsConfig, SutConfig, load
from stickjax.__main__ import main
from stickjax.data.examples import examples_of, task_of
from stickjax.data.pairs import pair_examples
from stickjax.data.readers import training_data
from stickjax.data.tables import read_records
from stickjax.data.tokenizer import WordTokenizer, load_tokenizer, words_of
from stickjax.models.vocabulary_size import with_vocabulary
from stickjax.storage.run_config import read_config
from stickjax.storage.run_folder import save
from stickjax.training.loop import fit

SIZES = dict(D=8, L=2, K=1, H=4, F=8, experts=ExpertsConfig(3, 2), attention_experts=ExpertsConfig(3, 2))
LABELS = ("contradiction", "entailment", "neutral")


def rows(count: int = 60) -> list[dict]:
    """Return rows whose texts have at most 8 words, so that all batches have one width: each width is compiled."""
    words = ["A", "man", "sleeps", "outside", "the", "old", "house", ";", "nobody", "talks", "."]
    return [
        {
            "sentence1": " ".join(words[i % 7 : i % 7 + 2 + i % 5]), "sentence2": " ".join(words[: 1 + i % 8]),
            "label": LABELS[i % 3], "id": i,
        }
        for i in range(count)
    ]  # fmt: skip


def write(path, found: list[dict]) -> str:
    """Write the rows `found` as lines of JSON (.jsonl, .ndjson), CSV (.csv) or else TSV. Return the path."""
    with open(path, "w", newline="") as file:
        if path.suffix in (".jsonl", ".ndjson"):
            file.writelines(json.dumps(row) + "\n" for row in found)
        elif path.suffix == ".csv":
            table = csv.DictWriter(file, list(found[0]))
            table.writeheader()
            table.writerows(found)
        else:
            lines = [list(found[0]), *([str(x) for x in row.values()] for row in found)]
            file.write("\r\n".join("\t".join(line) for line in lines))
    return str(path)


def config(path, model: SutConfig | None = None, **options) -> Config:
    options = dict(right_field="sentence2", tokenizer="words", T=16, B=4) | options
    return Config(
        model or SutConfig(**SIZES, classes=3), DataConfig(source="labelled", path=str(path), **options)
    ).replace({"train.steps": 2, "train.checkpoint_every": 1, "train.log_every": 1})


# Files


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.tsv", "x.csv", "x.TSV"])
def test_all_formats_give_the_same_rows(tmp_path, name):
    found = rows()
    found[3]["sentence1"] = 'He said "no", twice'
    path = write(tmp_path / name, found)
    records = read_records(path, config(path).data)
    assert [(*r.texts, r.label) for r in records] == [(r["sentence1"], r["sentence2"], r["label"]) for r in found]
    first = 1 if "json" in name else 2
    assert [r.line for r in records] == list(range(first, first + 60))


def test_a_csv_may_have_lines_in_its_values(tmp_path):
    found = rows(3)
    found[1]["sentence1"] = "two\nlines, one text"
    records = read_records(path := write(tmp_path / "x.csv", found), config(path).data)
    assert records[1].texts[0] == "two\nlines, one text" and [r.line for r in records] == [2, 4, 5]


def test_rows_without_a_gold_label_are_left_out_and_counted(tmp_path, caplog):
    found = rows()
    for i in (3, 7, 50):
        found[i] |= {"label": "-", "sentence1": ""}
    path = write(tmp_path / "x.jsonl", found)
    records = read_records(path, config(path, unlabelled="-").data)
    assert len(records) == 57 and "left out 3 rows with the label '-'" in caplog.text
    assert training_data(config(path, unlabelled="-")).ids["classes"] == 3


def test_numbers_are_labels_and_are_sorted_as_numbers(tmp_path):
    found = [row | {"label": i % 11} for i, row in enumerate(rows())]
    path = write(tmp_path / "x.jsonl", found)
    task = task_of(config(path))
    assert task.labels == tuple(map(str, range(11))) and task.ids["classes"] == 11


# Parts and ids


def test_parts_are_disjoint_and_nothing_is_lost(tmp_path):
    path = write(tmp_path / "x.jsonl", [row | {"sentence1": f"row {row['id']}"} for row in rows()])
    c = config(path, heldout_every=6, valid_every=5)
    parts = {part: examples_of(c, part) for part in ("train", "valid", "test")}
    assert {part: len(found) for part, found in parts.items()} == {"train": 40, "valid": 10, "test": 10}
    lines = sorted(row.line for found in parts.values() for row in found.rows)
    assert lines == list(range(1, 61)) and [row.line for row in parts["test"].rows] == list(range(1, 61, 6))
    other = write(tmp_path / "other.jsonl", rows(7))
    assert len(examples_of(config(path, heldout_path=other), "test")) == 7
    assert len(examples_of(config(path, heldout_path=other), "train")) == 60


@pytest.mark.parametrize("tokenizer", ["words", "byte", "bpe"])
def test_ids_are_those_of_the_tokenizer_plus_one(tmp_path, tokenizer, bpe):
    path = write(tmp_path / "x.jsonl", found := rows())
    c = config(path, tokenizer=bpe if tokenizer == "bpe" else tokenizer, T=64)
    task, examples = task_of(c), examples_of(c, "train")
    assert task.ids == {"V": task.tokenizer.vocab_size + 1, "classes": 3} and task.labels == LABELS
    for row, example in zip(examples.rows, examples, strict=True):
        source = found[row.line - 1]
        for name, field in (("left", "sentence1"), ("right", "sentence2")):
            ids = example[name]
            n = np.count_nonzero(ids)
            assert ids.dtype == np.int32 and ids.shape == (64,) and not ids[n:].any()
            assert (ids[:n] - 1).tolist() == task.tokenizer.encode(source[field]).tolist()
            text = " ".join(words_of(source[field])) if tokenizer == "words" else source[field]
            assert task.decode[name](ids) == text
        assert LABELS[example["label"]] == source["label"]


def test_rare_words_and_words_of_the_held_out_rows_are_unknown(tmp_path):
    found = rows()
    found[0]["sentence1"], found[1]["sentence1"] = "zebra", "once Old"  # row 0 is held out
    path = write(tmp_path / "x.jsonl", found)
    task = task_of(config(path, min_count=2))
    assert {"zebra", "once"}.isdisjoint(task.tokenizer.words) and "old" in task.tokenizer.words
    assert task.decode["left"](examples_of(config(path, min_count=2), "test")[0]["left"]) == "<unknown>"
    assert "once" in task_of(config(path)).tokenizer.words


def test_a_tokenizer_of_words_is_its_file(tmp_path):
    tokenizer = WordTokenizer.made_of(["b b a, a", "É c"])
    assert tokenizer.words == ("a", "b", ",", "c", "é")
    tokenizer.save(tmp_path)
    again = load_tokenizer(str(tmp_path / "words.json"))
    assert (again.name, again.words, again.vocab_size) == (tokenizer.name, tokenizer.words, 7)
    assert again.document("A z").tolist() == [2, 1, 0]
    for content, message in (
        ("{", "is not a valid words.json: "),
        ("[]", "it has no list of words"),
        ('{"format": "stickjax-words", "words": ["a", "a"]}', "the word 'a' occurs more than once"),
    ):
        (tmp_path / "words.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match="none/words.json' cannot be read"):
        load_tokenizer("none/words.json")


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    path = write(folder / "x.jsonl", rows())
    fit(config(path).replace({"train.steps": 1}), str(folder / "run"), quiet=True)
    fit(config(path), str(folder / "run"), quiet=True)  # resumes
    return folder / "run"


def test_a_resumed_run_is_the_same(run, tmp_path):
    straight = fit(config(run.parent / "x.jsonl"), str(tmp_path / "straight"), quiet=True)
    assert straight.state.params.embed.shape == (load(run).tokenizer.vocab_size + 1, 8)
    assert_same_state(load(run).model, load(tmp_path / "straight").model)


def test_a_run_keeps_its_words_and_labels(run, tmp_path):
    """A run folder has copies of the vocabulary and the labels. A moved run uses them, even if its data is missing."""
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    assert json.loads((moved / "labels.json").read_text()) == list(LABELS)
    other = write(tmp_path / "other.jsonl", [row | {"label": "neutral", "sentence1": "New words"} for row in rows(5)])
    loaded = load(moved, changes={"data.path": "missing.jsonl", "data.heldout_path": other})
    assert loaded.config.data.tokenizer == str(moved / "words.json")
    test = examples_of(loaded.config, "test")
    assert [example["label"] for example in test] == [2] * 5
    assert task_of(loaded.config).ids == {"V": loaded.config.model.V, "classes": 3}
    assert np.isfinite(loaded.model({name: test[0][name][None] for name in ("left", "right")}).logits).all()
    save(tmp_path / "saved", loaded.model, loaded.config)
    assert read_config(tmp_path / "saved").data.labels == str(tmp_path / "saved" / "labels.json")
    assert load(tmp_path / "saved").tokenizer.name == loaded.tokenizer.name


def test_a_run_refuses_other_rows_and_other_words(run, tmp_path):
    found = rows()
    found[5]["sentence1"] = "A man ."
    with pytest.raises(ValueError, match="the text has changed: the hash of pairs of .*changed.jsonl is now"):
        fit(config(write(tmp_path / "changed.jsonl", found)).replace({"train.steps": 6}), str(run), quiet=True)
    found = rows()
    found[0]["sentence1"] = "A man ."
    with pytest.raises(ValueError, match="the held-out text has changed"):
        fit(config(write(tmp_path / "changed.jsonl", found)).replace({"train.steps": 6}), str(run), quiet=True)
    for field, file, content in (
        ("data.tokenizer", "words.json", '{"format": "stickjax-words", "words": ["a"]}'),
        ("data.labels", "labels.json", '["neutral", "entailment", "contradiction"]'),
    ):
        (tmp_path / file).write_text(content)
        with pytest.raises(ValueError, match=f"{field}=.* differs from .*run/{file}"):
            fit(config(run.parent / "x.jsonl").replace({field: str(tmp_path / file)}), str(run), quiet=True)
    with pytest.raises(ValueError, match="V=14 is smaller than the 258 ids of pairs of"):
        fit(config(run.parent / "x.jsonl", tokenizer="byte", T=64), str(run), quiet=True)


def test_the_command_trains_on_a_table(tmp_path, capsys):
    path = write(tmp_path / "x.tsv", [row | {"gold_label": row["label"]} for row in rows()])
    c = config(path).replace({"data.label_field": "gold_label", "train.steps": 1})
    (tmp_path / "config.json").write_text(c.to_json())
    assert main(["train", str(tmp_path / "config.json"), "--run", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "54 pairs of " in out and "3 labels: contradiction, entailment, neutral; 6 rows are held out" in out


# Bad input


def changed(index: int, **values):
    return lambda found: found[index].update(values)


def without(index: int, field: str):
    return lambda found: found[index].pop(field)


@pytest.mark.parametrize(
    "spoil, options, message",
    [
        (changed(4, sentence1=" "), {}, r"x.jsonl:5: the field 'sentence1' is empty"),
        (changed(4, sentence2=""), {}, r"x.jsonl:5: the field 'sentence2' is empty"),
        (changed(4, sentence2=None), {}, r"x.jsonl:5: the field 'sentence2' must be text, not None"),
        (changed(4, label=""), {}, r"x.jsonl:5: the row has no label: the field 'label' is empty"),
        (changed(4, label=None), {}, r"x.jsonl:5: the row has no label"),
        (changed(4, label=0.5), {}, r"x.jsonl:5: the field 'label' must be text or a whole number, not 0.5"),
        (
            without(4, "label"),
            {},
            r"x.jsonl:5: no field 'label', which data.label_field names; the fields are 'sentence1',",
        ),
        (
            without(4, "sentence2"),
            {},
            r"x.jsonl:5: no field 'sentence2', which data.right_field names .did you mean 'sentence1'",
        ),
        (changed(4, sentence1="a " * 17), {}, r"x.jsonl:5: a text of 17 tokens is longer than T=16; the longest .* 17"),
        (changed(0, label="other"), {}, r"x.jsonl:1: the label 'other' is not one of 'contr.* of the train"),
        (changed(4, sentence1="half \ud800"), {}, r"x.jsonl:5: the field 'sentence1' has half a surrogate pair"),
        (lambda found: found.clear(), {}, r"x.jsonl' has no labelled rows"),
        (
            lambda found: found.__delitem__(slice(1, None)),
            {},
            r"x.jsonl' has 1 row, but a training part and a held-out",
        ),
        (
            lambda found: None,
            dict(left_field="premise"),
            r"x.jsonl:1: no field 'premise', which data.left_field names; the fields",
        ),
        (lambda found: None, dict(right_field=None), r"reads pairs: data.right_field must be the name of the field"),
        (lambda found: [row.update(label="a") for row in found], {}, r"all training rows have the same label 'a'"),
        (
            lambda found: [row.update(label=row["id"] % 2) for row in found],
            {},
            r"classes=3 must be 2, the number of labels of .*: '0', '1'; data.unlabelled=LABEL leaves out",
        ),
        (lambda found: None, dict(tokenizer="none.json"), r"tokenizer='none.json' is neither 'byte' nor a readable"),
        (lambda found: None, dict(labels="none.json"), r"data.labels='none.json' cannot be read"),
        (lambda found: None, dict(heldout_path="none.tsv"), r"data.heldout_path='none.tsv' does not exist"),
        (lambda found: None, dict(B=64), r"B=64 is more than the number of training examples: 54 pairs of"),
    ],
)
def test_bad_rows_are_one_line_and_write_nothing(tmp_path, spoil, options, message):
    found = rows()
    spoil(found)
    c = config(write(tmp_path / "x.jsonl", found), **options)
    with pytest.raises(ValueError, match=message) as error:
        fit(c, str(tmp_path / "run"), quiet=True)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


HEADER = "sentence1\tsentence2\tlabel\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.tsv", HEADER + "a\tb\tyes\na\tb\n", r"x.tsv:3: the row has 2 columns, but the first line has 3"),
        ("x.tsv", HEADER + "a\tb\tyes\tc\n", r"x.tsv:2: the row has 4 columns, but the first line has 3"),
        ("x.tsv", "", r"x.tsv' has no labelled rows"),
        ("x.tsv", HEADER, r"x.tsv' has no labelled rows"),
        ("x.tsv", "sentence1\tsentence1\tlabel\n", r"x.tsv:1: 2 columns have the name 'sentence1'"),
        (
            "x.tsv",
            "premise\tsentence2\tlabel\n",
            r"x.tsv:1: no field 'sentence1', which data.left_field names .did you mean 'sent",
        ),
        ("x.tsv", HEADER + "a\t\tyes\n", r"x.tsv:2: the field 'sentence2' is empty"),
        ("x.tsv", HEADER + "a\tb\t\n", r"x.tsv:2: the row has no label"),
        ("x.tsv", (HEADER + "a\tb\tyes\n").encode() + b"\xff\tb\tyes\n", r"x.tsv:3: this line is not UTF-8 text"),
        ("x.csv", 'sentence1,sentence2,label\na,"b,yes\n', r"x.csv:2: not a row of a table: unexpected end of data"),
        ("x.jsonl", "{", r"x.jsonl:1: this line is not JSON"),
        ("x.jsonl", "[1]", r"x.jsonl:1: this line must be a JSON object, not a list"),
        ("x.txt", "a", r"x.txt': labelled rows are read from files that end with .jsonl, .ndjson, .tsv, .csv"),
        ("x.tsv", "a".encode("utf-16"), r"x.tsv' is UTF-16 or UTF-32, not UTF-8 text: convert it"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        training_data(config(tmp_path / name))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is a folder"):
        training_data(config(tmp_path))


@pytest.mark.parametrize("content", ["{", '"a"', '["a"]', '["a", 1]', '["a", "a"]'])
def test_a_list_of_labels_that_is_none(tmp_path, content):
    path = write(tmp_path / "x.jsonl", rows())
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ValueError, match="data.labels='.*labels.json'") as error:
        training_data(config(path, labels=str(tmp_path / "labels.json")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(source="labelled"), "source='labelled' needs a path"),
        (dict(source="labelled,logic", path="x"), "labelled rows cannot be mixed with other sources"),
        (dict(right_field="b"), "right_field='b' needs source='labelled', not 'stdlib'"),
        (dict(unlabelled="-"), "unlabelled='-' needs source='labelled'"),
        (dict(tokenizer="words"), "tokenizer='words' needs source='labelled', not 'stdlib'"),
        (dict(source="labelled", path="x", tokenizer="words", eot="a"), "'words' has its own end-of-text token"),
    ],
)
def test_fields_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_pairs_by_operators_are_pairs_of_logic(run):
    with pytest.raises(ValueError, match="buckets of pairs need data.source='logic', not 'labelled'"):
        pair_examples(read_config(run), "test", buckets=[1])
    assert len(pair_examples(read_config(run), "test")) == 6


def test_models_that_read_something_else(tmp_path):
    path = write(tmp_path / "x.jsonl", rows())
    with pytest.raises(ValueError, match="source='labelled' needs a classifier; this model reads a text: use a config"):
        training_data(config(path, SutConfig(**SIZES)))
    assert with_vocabulary(config(path)).model.V == task_of(config(path)).ids["V"]
