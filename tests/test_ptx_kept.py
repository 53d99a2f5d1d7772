"""Test the kernels whose PTX is stored in tests/ptx/kept.

The PTX machine computes correct results with them, and compiling the current kernels gives the same PTX.
"""

import importlib.util

import jax.numpy as jnp
import pytest
from conftest import FORWARD, assert_close
from ptx import capture, kept
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


@pytest.mark.parametrize("name", kept.CASES)
def test_the_machine_computes_with_a_kept_kernel_what_the_reference_does(name):
    case = kept.CASES[name]()
    out = capture.run(case.function, *case.arrays, program_of=kept.program_of)
    expected = case.reference(*(x.astype(jnp.float32) for x in case.arrays))
    assert_close(out, expected, FORWARD["bfloat16"])


@pytest.mark.skipif(not has_wheels, reason="needs the CUDA wheels and no GPU: make test-ptx")
def test_kept_kernels_are_the_current_ones(capsys):
    if any(kept.made_with(name) != kept.makers() for name in NAMES):
        pytest.skip("the stored PTX was made with other versions of the compiler")
    assert kept.main(["--check"]) == 0, capsys.readouterr().err
    assert sorted(kept.current()) == NAMES
