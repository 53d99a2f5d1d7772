"""Test the evaluation of models on examples: accuracy by bucket, correct first words, induced trees, bad input."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import trained
from stickjax import Config, DataConfig
from stickjax.config import OrderedMemoryConfig
from stickjax.data.examples import examples_of
from stickjax.data.tasks import listops
from stickjax.data.tasks.encoding import Parts
from stickjax.evaluate import main as evaluate
from stickjax.evaluation import examples as evaluation
from stickjax.evaluation.trees import bracketed, f1, from_brackets, restricted
from stickjax.models.families import family_of
from stickjax.training.loop import fit

LISTOPS = Config(
    OrderedMemoryConfig(V=18, D=6, H=5, N=2, sentences=1, hidden=False, classes=10),
    DataConfig(source="listops", examples=400, T=20, B=4, valid_every=5),
)


@pytest.fixture
def short(monkeypatch):
    """Leave only the lists of listops that have at most 16 symbols, because each width of a batch is compiled."""
    whole = listops.generate

    def generate(seed=0, count=100_000):
        return Parts(*([row for row in rows if len(row.text.split()) <= 16] for rows in whole(seed, count)))

    monkeypatch.setattr(listops, "generate", generate)


@pytest.mark.usefixtures("short")
def test_accuracy_is_that_of_a_direct_count():
    """The accuracy is that of one batch with all examples, which has another padding than the batches of `accuracy`."""
    family = family_of(LISTOPS.model)
    model = jax.jit(functools.partial(family.init, LISTOPS.model))(jax.random.key(0))
    records = evaluation.accuracy(model, LISTOPS, part="valid", max_examples=1000, B=4)
    rows = examples_of(LISTOPS, "valid", T=None)
    tokens, labels = (np.stack([rows[i][name] for i in range(len(rows))]) for name in ("tokens", "label"))
    answers = jax.jit(family.apply)(model, {"tokens": np.pad(tokens, ((0, 0), (0, 7)))}).logits.argmax(-1)
    expected = np.mean(answers == labels)
    assert 0 < expected < 1
    total = sum(r["examples"] for r in records)
    assert total == len(rows) and records[0]["bucket"] == 10
    np.testing.assert_allclose(sum(r["accuracy"] * r["examples"] for r in records) / total, expected)
    assert all(0 <= r["f1"] <= 1 and r["majority"] >= 0.1 for r in records)


def test_batches_have_all_examples_once_and_are_padded():
    rows = examples_of(LISTOPS, "test", T=None)
    seen = []
    for batch, own in evaluation.batches_of(rows, 7):
        assert len(batch["tokens"]) == 7 and batch["tokens"].shape[1] in (8, 16, 32, 64, 128, 256, 512, 1024)
        assert (batch["tokens"][len(own) :] == batch["tokens"][0]).all()
        seen += own
    assert sorted(seen) == sorted(rows.rows)


class Copies:
    """A stand-in for a family of translations: the translation is the source itself.

    If a source has more than 8 words, word 8 of the translation is missing: its id is 0.
    """

    @staticmethod
    def predict(model, batch):
        del model
        source = batch["source"]
        return jnp.where((source != 0).sum(1, keepdims=True) > 8, source.at[:, 7].set(0), source)

    @staticmethod
    def induced_trees(model, batch):
        del model, batch


def test_translations_are_compared_exactly_and_by_their_first_word(monkeypatch):
    monkeypatch.setattr(evaluation, "family_of", lambda config: Copies)
    monkeypatch.setattr(type(LISTOPS.model), "reads", "translation")
    config = Config(LISTOPS.model, DataConfig(source="questions", examples=300, T=18, B=4))
    (record,) = evaluation.accuracy(None, config, part="valid", max_examples=200)
    rows = [row for row in examples_of(config, "valid", T=None).rows]
    assert record["examples"] == 200 and "majority" not in record and "f1" not in record
    statements = [row.source == row.target for row in rows]
    short = [row.source == row.target and len(row.source.split()) <= 8 for row in rows]
    assert abs(record["first_word"] - np.mean(statements)) < 0.15  # a question begins with its auxiliary
    assert abs(record["accuracy"] - np.mean(short)) < 0.15 and record["accuracy"] < record["first_word"]


def test_trees():
    tree, words = from_brackets(["(", "(", "not", "a", ")", "(", "and", "b", ")", ")"])
    assert bracketed(tree, words) == "((not a) (and b))" and words == ["not", "a", "and", "b"]
    assert restricted(0, lambda i: False) is None
    assert f1([(0, 0)]) == 1 and f1([(tree, tree)]) == 1
    for text in ("( a", "a ) b", "( )"):
        with pytest.raises(ValueError, match="bracket"):
            from_brackets(text.split())


@pytest.mark.usefixtures("short")
def test_the_command_writes_numbers_and_pictures(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    fit(LISTOPS.replace({"train.steps": 1, "data.curriculum": 9, "optim.warmup_tokens": 0}), str(run), quiet=True)
    assert evaluate([str(run), "--max-pairs", "3", "--part", "valid"]) == 0
    stored = json.loads((run / "accuracy.json").read_text())
    assert stored["part"] == "valid" and all(r["examples"] <= 3 for r in stored["buckets"])
    assert (run / "accuracy.png").stat().st_size > 1000 and (run / "trees.png").stat().st_size > 1000
    assert "F1 of trees" in capsys.readouterr().out
    monkeypatch.setattr(trained, "RESULTS", tmp_path / "results")
    assert trained.main([str(run), "--max-examples", "3", "--part", "valid,test", "--json"]) == 0
    recorded = json.loads((tmp_path / "results" / "run.json").read_text())
    rows = [row["extra"] for row in recorded["rows"]]
    valid = [{"part": "valid"} | record for record in stored["buckets"]]
    assert rows[: len(valid)] == valid and {row["part"] for row in rows[len(valid) :]} == {"test"}
    assert recorded["curve"]["step"] == [1] and recorded["config"]["data"]["source"] == "listops"
    assert evaluate([str(run), "--part", "gen"]) == 1
    assert "part='gen' is not one of" in capsys.readouterr().err
    assert evaluate([str(run), "--max-pairs", "0"]) == 1
    assert "must be at least 1" in capsys.readouterr().err


def test_without_a_validation_part_the_message_says_how_to_have_one():
    config = dataclasses.replace(LISTOPS, data=dataclasses.replace(LISTOPS.data, valid_every=0))
    with pytest.raises(ValueError, match="valid_every=0 leaves no examples for validation"):
        evaluation.accuracy(None, config, part="valid")
