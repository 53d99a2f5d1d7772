"""Names of the version before still work, and say the new one."""

import importlib
import subprocess
import sys

import pytest

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
