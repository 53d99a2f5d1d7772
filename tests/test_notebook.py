"""The notebooks run from top to bottom, show their pictures, and are stored without outputs."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The words that each notebook prints; each also shows three pictures.
NOTEBOOKS = {
    "build_and_check": ("stick_breaking_attention: ", "bits per byte"),
    "modules": ("bits that a module says", "the half used most: ", "fine-tuned {'Python': "),
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_has_no_outputs(name):
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A Jupyter kernel that runs this Python interpreter, whatever kernels are installed."""
    folder = tmp_path / "kernels" / "this-python"
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps(dict(argv=argv, display_name="this", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):  # no files in the home folder
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return folder.name


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, kernel):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}  # the kernel's working folder, so that it imports this source
    NotebookClient(notebook, kernel_name=kernel, timeout=600, resources=resources).execute()  # an error raises
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    assert sum("image/png" in data for data in pictures) == 3
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert all(words in printed for words in NOTEBOOKS[name]), printed
