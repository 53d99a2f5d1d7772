"""Names of the version before still work, and say the new one."""

import dataclasses
import importlib
import subprocess
import sys

import pytest

from stickjax.config import Config, OptimConfig
from stickjax.config.command_line import parse_changes
from stickjax.system.renamed import NEW_NAMES


@pytest.mark.parametrize("old", NEW_NAMES)
def test_an_old_module_is_the_new_one(old):
    new = importlib.import_module(NEW_NAMES[old])
    spec = new.__spec__
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"{old} is now {NEW_NAMES[old]}; the old name goes in the next version"):
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
    """In Python and on the command line with a line that says the new one; in the config of an old run without."""
    with pytest.warns(FutureWarning, match="learn is now trainable; the old name goes in the next version"):
        config = OptimConfig(learn="*,!embed")
    assert config.trainable == "*,!embed"
    with pytest.warns(FutureWarning, match="learn is now trainable"):
        assert dataclasses.replace(config, learn="*").trainable == "*"
    with pytest.warns(FutureWarning, match="learn is now trainable"):
        assert config.learn == "*,!embed"
    assert parse_changes(Config(), ["--model.round_rows=8"]) == {"model.token_rounding": 8}
    assert caplog.messages == ["model.round_rows is now model.token_rounding; the old name goes in the next version"]
    assert Config().replace({"optim.learn": "!embed"}).optim.trainable == "!embed"
    caplog.clear()
    assert Config.from_dict({"optim": {"learn": "!embed"}}).optim.trainable == "!embed" and not caplog.messages
    with pytest.raises(TypeError, match="lern"):
        OptimConfig(lern="*")
