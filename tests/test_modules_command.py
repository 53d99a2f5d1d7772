"""The command line can add, freeze and prune modules (experts), and train a model so that it uses few modules."""

import contextlib
import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import FORWARD, assert_close
from test_modules import CONFIG, same

from stickjax import train
from stickjax.config import Config, DataConfig, OptimConfig, TrainConfig
from stickjax.storage.checkpoints import named_leaves
from stickjax.storage.run_folder import load
from stickjax.surgery import TRAINABLE
from stickjax.surgery.__main__ import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a tiny model for three steps on two generated tasks; return a temporary folder and the run folder in it.

    The biases that balance its routers have moved.
    """
    folder = tmp_path_factory.mktemp("modules")
    data = DataConfig(source="logic,recall", examples=300, T=24, B=2)
    optim = OptimConfig(schedule="constant", peak_lr=0.01)
    config = Config(CONFIG, data, optim, TrainConfig(steps=3, log_every=1))
    config = config.replace({f"model.{name}.bias_rate": 0.1 for name in config.model.mixtures()})
    train.fit(config, str(folder / "base"), quiet=True)
    return SimpleNamespace(folder=folder, base=str(folder / "base"))


@pytest.fixture(scope="module")
def grown(trained, tmp_path_factory):
    """Add modules to the model of `trained`, and train them for one step.

    Return the folders `out` of the extended and `new` of the trained model, and what the first command says.
    """
    folder = tmp_path_factory.mktemp("grown")
    out, new = str(folder / "out"), str(folder / "new")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["extend", trained.base, out, "--experts", "2", "--attention-experts=1", "--train.steps=1"]) == 0
    assert not list(folder.glob("*.tmp"))
    assert train.main([f"{out}/config.json", "--run", new, "--init-from", out, "--data.source=logic"]) == 0
    return SimpleNamespace(out=out, new=new, said=said.getvalue())


def test_extend_then_train(trained, grown, tmp_path):
    assert f"--init-from {grown.out}" in grown.said
    base, extended = load(trained.base).model, load(grown.out)
    assert (extended.step, extended.config.train.steps, extended.config.optim.trainable) == (0, 1, TRAINABLE["frozen"])
    learned, old = named_leaves(load(grown.new).model), named_leaves(base)
    for name, leaf in old.items():
        # A selection bias has an entry for each new module, too.
        same(learned[name][:, : leaf.shape[1]] if name.endswith("selection_bias") else learned[name], leaf)
    moved = [n for n in learned if n not in old and (learned[n] != named_leaves(extended.model)[n]).any()]
    assert len(moved) == 6
    # A pruned model no longer has new modules, and is trainable as a whole.
    pruned = str(tmp_path / "pruned")
    assert main(["prune", grown.new, pruned, "--threshold=0.01", "--denominator=new", "--tokens=480"]) == 0
    config = load(pruned).config
    assert config.optim.trainable == "*" and config.model.experts.added == config.model.experts.pruned == 0


def test_freeze_then_train(trained, tmp_path, capsys):
    out, new = str(tmp_path / "out"), str(tmp_path / "new")
    assert main(["freeze", trained.base, out, "blocks.*", "--train.steps=1"]) == 0
    assert "are frozen" in capsys.readouterr().out
    assert train.main([f"{out}/config.json", "--run", new, "--init-from", out]) == 0
    learned, old = named_leaves(load(new).model), named_leaves(load(trained.base).model)
    assert {name for name in old if (learned[name] != old[name]).any()} == {n for n in old if "blocks" not in n}


def test_prune_and_report(trained, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "out")
    assert main(["prune", trained.base, out, "--count=3", "--kind=ffn", "--source=logic", "--tokens=480"]) == 0
    assert "keeps at most 3 ffn modules in a layer" in capsys.readouterr().out
    config = load(out).config.model
    assert (config.experts.E, config.experts.pruned, config.attention_experts.E) == (3, 3, 4)
    picture = tmp_path / "use.png"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert main(["report", out, "--tokens=480"]) == 0
        assert not list((tmp_path / "out").glob("modules.*"))
        assert "nothing is written into it" in capsys.readouterr().err
    assert main(["report", out, "--tokens=480", "--below=1", f"--plot={picture}"]) == 0
    assert picture.stat().st_size > 10_000 and not (tmp_path / "out" / "modules.png").exists()
    assert json.loads((tmp_path / "out" / "modules.json").read_text())["unused"]["logic"] == {"attention": 8, "ffn": 6}
    capsys.readouterr()
    assert main(["report", out, "--tokens=480"]) == 0
    assert "unused by recall" in capsys.readouterr().out
    assert (tmp_path / "out" / "modules.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert found["modules"] == {"attention": 8, "ffn": 6}
    assert all(0 <= bits <= 1 for kind in found["mutual_information"].values() for bits in kind)
    assert_close(np.sum(found["use"]["logic"]["ffn"], 1), [1.0, 1.0], FORWARD["float32"])


def test_concentrate(grown, tmp_path):
    """A concentrated model is trainable as a whole, but the biases that balance its routers no longer move."""
    few = str(tmp_path / "few")
    assert main(["concentrate", grown.new, few, "--weight=0.5", "--train.steps=1", "--data.source=logic"]) == 0
    config = load(few).config
    for mixture in config.model.mixtures().values():
        assert (mixture.concentration_weight, mixture.mi_weight, mixture.switch_weight) == (0.5, 0, 0)
    assert config.optim.trainable == "*,!*.selection_bias"
    before, after = (named_leaves(load(run).model) for run in (grown.new, few))
    biases = [name for name in before if name.endswith("selection_bias")]
    assert len(biases) == 2 and all(before[name].any() for name in biases)
    for name in biases:
        same(after[name], before[name])
    assert (after["blocks/ffn/router/weight"] != before["blocks/ffn/router/weight"]).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("extend BASE OUT", "experts and attention_experts are both 0"),
        ("extend BASE BASE --experts 2", "exists; choose another folder"),
        (
            "extend BASE OUT --experts 2 --model.F=13",
            "the model and its config differ in the names, shapes or types of parameters",
        ),
        (
            "extend BASE OUT --experts 2 --optim.trainabel=x",
            "unknown config key 'optim.trainabel' (did you mean 'optim.trainable'?)",
        ),
        ("extend OUT OUT2 --experts 2", "is neither a run folder"),
        ("prune BASE OUT --count 1 --tokens 48", "count=1 must be at least 2, the number of attention modules"),
        (
            "prune BASE OUT --count 5 --tokens 48",
            "count=5 must be at least 2, the number of attention modules that a token uses, and at most 4",
        ),
        ("prune BASE OUT --count 3 --source logik", "source='logik' is not one of"),
        ("report BASE --source text", "source='text' needs a path"),
        (
            "concentrate BASE OUT --model.V=300",
            "does not fit this config (the run's value -> your value: model.V: 257 -> 300",
        ),
        ("freeze BASE OUT *.routers.*", "no parameter matches '*.routers.*'"),
        ("freeze BASE OUT *", "freezes every parameter"),
    ],
)
def test_bad_words(trained, tmp_path, capsys, words, message):
    words = words.replace("OUT", str(tmp_path / "out")).replace("BASE", trained.base)
    before = sorted(trained.folder.rglob("*"))
    assert main(words.split()) == 1
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())
    assert sorted(trained.folder.rglob("*")) == before
