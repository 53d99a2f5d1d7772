"""Train configs/nli_hypothesis_only.py on generated pairs, and evaluate the model.

In most pairs, one word of the hypothesis, the planted word, gives the label away.
"""

import json
from random import Random

import pytest

from stickjax.config.command_line import load_config
from stickjax.evaluate import main as evaluate
from stickjax.evaluation.bias import words_by_label
from stickjax.storage.run_config import read_config
from stickjax.training.loop import fit

NEUTRAL = ["a", "man", "woman", "dog", "runs", "sits", "walks", "in", "the", "on", "street", "park", "house", "with"]
PLANTED = {"no": "nobody", "yes": "outdoors"}


def row(random: Random) -> dict:
    """Return a random labelled pair. In three of four pairs, the hypothesis has the word planted for its label."""
    label = random.choice(list(PLANTED))
    words = random.choices(NEUTRAL, k=4)
    if random.random() < 0.75:
        words.insert(random.randrange(5), PLANTED[label])
    return {"sentence1": " ".join(random.choices(NEUTRAL, k=4)), "sentence2": " ".join(words), "gold_label": label}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nli")
    for name, count, seed in (("train", 2000, 0), ("test", 200, 1)):
        random = Random(seed)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(random)) + "\n" for _ in range(count)))
    config = load_config("configs/nli_hypothesis_only.py").replace(
        {
            "model.D": 16, "model.H": 8, "model.N": 3, "data.T": 8, "data.B": 32, "train.steps": 60,
            "optim.warmup_tokens": 0, "optim.peak_lr": 0.02, "data.path": str(folder / "train.jsonl"),
            "data.heldout_path": str(folder / "test.jsonl"),
        }
    )  # fmt: skip
    fit(config, str(folder / "run"), quiet=True)
    return folder / "run"


def test_the_hypothesis_alone_gives_the_label_away(run, capsys):
    hard = run.parent / "hard.jsonl"
    assert evaluate([str(run), "--filtered", str(hard)]) == 0
    (record,) = json.loads((run / "accuracy.json").read_text())["buckets"]
    assert record["majority"] < 0.6 and record["accuracy"] > 0.75
    rows = [json.loads(line) for line in hard.read_text().splitlines()]
    assert len(rows) == round((1 - record["accuracy"]) * 200)
    # Rows with a planted word are easy, so nearly all rows that the model gets wrong have none.
    planted = sum(PLANTED[r["gold_label"]] in r["sentence2"].split() for r in rows)
    assert planted <= len(rows) / 4
    text = capsys.readouterr().out
    assert "nobody" in text and "outdoors" in text and f"{len(rows)} of 200 held-out rows" in text


def test_the_planted_words_are_first(run):
    found = words_by_label(read_config(run))
    assert {label: words[0].word for label, words in found.items()} == PLANTED


def test_a_file_that_cannot_be_written(run, capsys):
    hard = run.parent / "exists.jsonl"
    hard.write_text("")
    for path, message in ((hard, "exists already"), (run.parent / "hard.tsv", "must end in '.jsonl'")):
        assert evaluate([str(run), "--filtered", str(path)]) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert hard.read_text() == "" and not (run.parent / "hard.tsv").exists()
