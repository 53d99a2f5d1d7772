"""A run folder that version 0.1 has written can still be loaded and trained further.

Since then, modules have been renamed.
"""

import shutil
from pathlib import Path

import pytest

from stickjax.storage.run_config import read_config
from stickjax.storage.run_folder import load
from stickjax.train import fit
from stickjax.training.metrics import read_metrics

# tests/old_run contains two steps of the recall task with B=2 and T=32. Version 0.1 computed the loss at step 4.
LOSSES = {2: 5.510635375976562, 4: 5.4903411865234375}


@pytest.fixture
def old_run(tmp_path) -> str:
    return shutil.copytree(Path(__file__).parent / "old_run", tmp_path / "run")


def test_it_loads(old_run):
    loaded = load(old_run)
    assert loaded.step == 2 and loaded.config == read_config(old_run)


def test_it_trains_on(old_run):
    """Training continues from the old checkpoint: parameters, optimizer state and order of the data are restored.

    The loss at step 4 is the loss that version 0.1 computed.
    """
    result = fit(read_config(old_run).replace({"train.steps": 4}), str(old_run), quiet=True)
    assert result.finished
    losses = {row["step"]: row["loss"] for row in read_metrics(old_run)}
    assert losses == pytest.approx(LOSSES, rel=1e-6)
