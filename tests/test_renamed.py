"""The names of the previous version still work, and a message says the new name."""

import dataclasses
import importlib
import subprocess
import sys
import warnings

import pytest

from stickjax.config import Config, ExpertsConfig, ModelConfig, OptimConfig, SutConfig
from stickjax.config.command_line import parse
from stickjax.system.renamed import NEW_NAMES


@pytest.mark.parametrize("old", NEW_NAMES)
def test_an_old_module_is_the_new_one(old):
    new = importlib.import_module(NEW_NAMES[old])
    spec = new.__spec__
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"{old} is now {NEW_NAMES[old]}; the next version removes the old name"):
        assert importlib.import_module(old) is new
    assert new.__spec__ is spec and new.__name__ == NEW_NAMES[old]


def test_an_old_command_runs():
    done = subprocess.run([sys.executable, "-m", "stickjax.modules", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stickjax.modules is now stickjax.surgery" in done.stderr and "prune" in done.stdout


def test_other_names_are_not_found():
    with pytest.raises(ModuleNotFoundError, match="stickjax.nothing"):
        importlib.import_module("stickjax.nothing")


def test_former_names_of_fields_are_accepted(tmp_path, caplog):
    """An old name of a config field works in Python and on the command line, with a message that says the new name.

    In the stored config of an old run it works without a message.
    """
    with pytest.warns(FutureWarning, match="learn is now trainable; the next version removes the old name"):
        config = OptimConfig(learn="*,!embed")
    assert config.trainable == "*,!embed"
    with pytest.warns(FutureWarning, match="learn is now trainable"):
        assert dataclasses.replace(config, learn="*").trainable == "*"
    with pytest.warns(FutureWarning, match="learn is now trainable"):
        assert config.learn == "*,!embed"
    words = ["--model.E=4", "--model.k=2", "--model.round_rows=8"]
    assert parse(Config(), words).model.experts == ExpertsConfig(E=4, k=2, token_rounding=8)
    assert caplog.messages[0] == "model.E is now model.experts.E; the next version removes the old name"
    assert len(caplog.messages) == 3 and caplog.messages[2].startswith(
        "model.round_rows is now model.experts.token_rounding and model.attention_experts.token_rounding;"
    )
    assert Config().replace({"optim.learn": "!embed"}).optim.trainable == "!embed"
    caplog.clear()
    assert Config.from_dict({"optim": {"learn": "!embed"}}).optim.trainable == "!embed" and not caplog.messages
    with pytest.raises(TypeError, match="lern"):
        OptimConfig(lern="*")


BEFORE = [
    (
        dict(N=4, K=2, E=8, k=2, attention_experts=4, router="softmax_topk", z_weight=0.1, new_experts=2, pruned="no"),
        ModelConfig(
            N=4, K=2, experts=ExpertsConfig(8, 2, "softmax_topk", z_weight=0.1, added=2),
            attention_experts=ExpertsConfig(4, order="softmax_topk", z_weight=0.1),
        ),
    ),
    (
        dict(
            N=4, K=2, E=0, k=0, attention_experts=4, bias_rate=0.01, gone_attention_experts=1, pruned="old_denominator"
        ),
        ModelConfig(
            N=4, K=2, attention_experts=ExpertsConfig(4, bias_rate=0.01, pruned=1, pruning="old_denominator")
        ),
    ),
    (dict(E=0, k=0, attention_experts=0, router_hidden=256, pruned="no"), ModelConfig()),
    (
        dict(family="sut", E=6, k=3, attention_experts=5, attention_k=2, sample_topk=1, mi_weight=0.01),
        SutConfig(
            experts=ExpertsConfig(6, 3, mi_weight=0.01),
            attention_experts=ExpertsConfig(5, 2, mi_weight=0.01, sample_topk=1),
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("stored, expected", BEFORE, ids=["both", "heads", "dense", "sut"])
def test_a_stored_model_of_the_version_before_is_read(stored, expected, caplog):
    """A model config that the previous version has stored is read as the equivalent new config, without a message.

    Old fields that applied to all experts, such as bias_rate, are now fields of each mixture of experts.
    """
    assert Config.from_dict({"model": stored}).model == expected and not caplog.messages
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert type(expected)(**stored) == expected
    assert "E is now experts.E; the next version removes the old name" in [str(warning.message) for warning in found]
    assert Config.from_dict(Config(expected).to_dict()).model == expected
