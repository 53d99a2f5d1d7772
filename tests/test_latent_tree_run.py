"""Test the configs of the latent-tree model: training and evaluation on SCAN, and the sizes of `tree_questions`."""

import pytest

from stickjax.config.command_line import load_config
from stickjax.data.examples import examples_of, task_of
from stickjax.data.tasks import scan
from stickjax.evaluate import main
from stickjax.training.loop import fit
from stickjax.training.metrics import read_metrics

SMALL = {
    "model.depth": 2, "model.H": 4, "model.N": 1, "data.T": 4, "data.B": 4, "train.steps": 2,
    "train.log_every": 1, "optim.warmup_tokens": 0,
}  # fmt: skip


# The GRU has no inputs or results that the two other encoders lack, so its run is left to `make test-exhaustive`.
EXHAUSTIVE = {"test_a_run_on_scan": lambda encoder: encoder == "gru"}


@pytest.fixture
def short_commands(short_scan, monkeypatch):
    """Also leave only the test commands that have at most 8 words: evaluation compiles each width of the sources."""
    short = scan.generate

    def generate(split="simple", seed=0):
        parts = short(split, seed)
        return parts._replace(test=[row for row in parts.test if len(row.command.split()) <= 8])

    monkeypatch.setattr(scan, "generate", generate)


@pytest.mark.slow
@pytest.mark.usefixtures("short_commands")
@pytest.mark.parametrize("encoder", ["ordered_memory", "tree", "gru"])
def test_a_run_on_scan(encoder, tmp_path, capsys):
    """`evaluate` scores the test examples by their number of actions.

    Every test example has more actions than any training example.
    """
    run = str(tmp_path / "run")
    fit(load_config("tree_scan").replace(SMALL | {"model.encoder": encoder}), run, quiet=True)
    assert all(row["loss"] < row["sentence_nll"] for row in read_metrics(run))
    capsys.readouterr()
    assert main([run, "--max-pairs", "2"]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("actions, up to", "first word", "24", "32")), printed
    assert ("F1 of trees" in printed) == (encoder == "ordered_memory")


def test_the_parts_of_questions():
    """The vocabularies of sources and targets have the same size.

    In every part, the longest source and the longest target fit in `data.T` and in the tree.
    """
    config = load_config("tree_questions").replace({"data.examples": 100})
    assert task_of(config).ids["V"] == task_of(config).ids["V_target"]
    for part in ("train", "valid", "test", "gen"):
        assert examples_of(config, part).lengths().max() <= config.data.T <= 2**config.model.depth
