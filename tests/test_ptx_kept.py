"""The kernels that are kept as PTX are the current ones, and can be read as they were written."""

import importlib.util

import pytest
from ptx import kept
from ptx.program import TensorMap

NAMES = sorted(path.stem for path in kept.FOLDER.glob("*.ptx"))
has_wheels = importlib.util.find_spec("jax_cuda13_plugin") is not None


def test_a_kept_kernel_is_read_as_it_was_written(tmp_path, monkeypatch):
    program = kept.load("stick_breaking_forward")
    assert any(isinstance(x, TensorMap) for block in program.parameters if isinstance(block, tuple) for x in block)
    assert sum((kept.FOLDER / f"{name}{end}").stat().st_size for name in NAMES for end in (".ptx", ".json")) < 400_000
    monkeypatch.setattr(kept, "FOLDER", tmp_path)
    monkeypatch.setattr(kept, "makers", dict)
    kept.write("again", program)
    assert kept.load("again") == program


@pytest.mark.skipif(not has_wheels, reason="needs the CUDA wheels and no GPU: make test-ptx")
def test_kept_kernels_are_the_current_ones(capsys):
    if any(kept.made_with(name) != kept.makers() for name in NAMES):
        pytest.skip("other versions compile to other PTX")
    assert kept.main(["--check"]) == 0, capsys.readouterr().err
    assert sorted(kept.current()) == NAMES
