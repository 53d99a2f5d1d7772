"""The notebooks run from top to bottom, and print what their files show as output.

`python tests/test_notebook.py [NAME ...]` runs the notebooks and stores their outputs, with small pictures. The output
of a cell with the tag "varies" is not compared, because it differs between machines; sampled text is an example.
"""

import base64
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PICTURES = {"build_and_check": 3, "induced_trees": 3, "kernels_and_sharding": 2, "modules": 3, "python_api": 4}
PICTURE_BYTES = 60_000
# Times, rates and addresses, and where two results differ most.
VARIES = re.compile(
    r"[\d,.]+ tokens/s|[\d,.]+ s left|[\d.]+% of the time|tokens_per_second=\d+|outside=[\d.]+|0x[0-9a-f]+"
    r"|farthest at .*"
)
# The two longest notebooks. `make test-notebooks` runs them, and CI.
EXHAUSTIVE = {"test_a_notebook_still_shows_its_stored_outputs": lambda name: name in ("modules", "induced_trees")}
FOLDER = re.compile(rf"(?:/tmp|{re.escape(tempfile.gettempdir())})/[^/\s]+")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d*)?(?:e[+-]?\d+)?(?![\w.])")


def run(name: str, folder: Path):
    """Run the notebook `name` and return it with its outputs.

    Its kernel is the Python that runs the tests. Jupyter writes its files into `folder`.
    """
    import nbformat
    from nbclient import NotebookClient

    kernel = folder / "kernels" / "this-python"
    kernel.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps(dict(argv=argv, display_name="this", language="python")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):  # nothing goes to the home folder
            patch.setenv(variable, str(folder / variable.lower()))
        patch.delenv("XLA_FLAGS", raising=False)  # the number of devices is the notebook's own
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        resources = {"metadata": {"path": str(ROOT)}}  # the kernel's folder, so that it imports this source tree
        options = dict(kernel_name=kernel.name, timeout=600, resources=resources)
        NotebookClient(notebook, record_timing=False, **options).execute()  # an error raises
    return notebook


def store(name: str) -> None:
    """Run the notebook `name` and write the outputs into its file."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        notebook = run(name, Path(folder))
    notebook.metadata = dict(
        kernelspec=dict(display_name="Python 3", language="python", name="python3"), language_info=dict(name="python")
    )
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    nbformat.write(notebook, ROOT / "notebooks" / f"{name}.ipynb")


def joined(outputs: list) -> list:
    """Return the outputs of a cell in the form in which they are stored.

    Consecutive texts of one stream become one output, names of temporary folders become FOLDER, and pictures become
    small.
    """
    kept: list = []
    for output in outputs:
        if "text" in output:
            output.text = FOLDER.sub("FOLDER", output.text)
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
            continue
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = small(output.data["image/png"])
        kept.append(output)
    return kept


def small(picture: str) -> str:
    """Return a picture, a PNG in base64, reduced to 128 colours and at most 900 pixels in each direction."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.thumbnail((900, 900), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(content, "png", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def shown(cell) -> str:
    """Return the text of a cell's outputs: what it prints, and the plain text of what it displays."""
    outputs = cell.get("outputs", ())
    texts = ("".join(o["text"]) if "text" in o else "".join(o["data"].get("text/plain", "")) + "\n" for o in outputs)
    return FOLDER.sub("FOLDER", "".join(texts))


def compare(stored: str, now: str) -> str | None:
    """Return a message with the first line that differs between the stored output and the new output, or None.

    Words and whole numbers must be equal. A number with a decimal point may be half to twice the stored one, or differ
    by 0.1. Numbers with an exponent, texts that match `VARIES`, and white space are not compared.
    """
    for text, other in zip_lines(stored, now):
        words, others = (re.findall(r"[\w#~.']+|\S", NUMBER.sub("#", VARIES.sub("~", line))) for line in (text, other))
        if words != others:
            return f"stored: {text}\nnow:    {other}"
        numbers, those = (NUMBER.findall(VARIES.sub("~", line)) for line in (text, other))
        if not all(map(near, numbers, those)):
            return f"stored: {text}\nnow:    {other}"
    return None


def zip_lines(stored: str, now: str) -> list[tuple[str, str]]:
    first, second = ([line for line in text.split("\n") if line.strip()] for text in (stored, now))
    length = max(len(first), len(second))
    return list(zip(first + [""] * (length - len(first)), second + [""] * (length - len(second)), strict=True))


def near(stored: str, now: str) -> bool:
    if "e" in stored + now:
        return True
    if "." not in stored + now:
        return stored == now
    a, b = float(stored), float(now)
    return abs(a - b) <= 0.1 or (a * b > 0 and 0.5 <= a / b <= 2)


@pytest.mark.parametrize(
    "stored, now, same",
    [
        ("loss 5.83 -> 2.45\n", "loss 5.81 -> 2.31\n", True),
        ("loss 5.83 -> 2.45\n", "loss 5.81 -> 5.31\n", False),
        ("attention: xla (2 tiles)", "attention: mosaic (2 tiles)", False),
        ("(1, 10, 257)", "(1, 10, 258)", False),
        ("step 40: 1,763 tokens/s, 88.1% of the time", "step 40: 18,287 tokens/s, 7.7% of the time", True),
        ("error 6.5e-08; farthest at [1, 5]: -2.7", "error 1e-07; farthest at [0, 2]: 1.3", True),
        ("one line\n", "one line\nand another\n", False),
        ("[0.05 0.3 ]", "[0.1  0.25]", True),
    ],
)  # fmt: skip
def test_what_counts_as_the_same_output(stored, now, same):
    assert (compare(stored, now) is None) is same


def test_every_notebook_is_tested():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_a_notebook_is_stored_with_its_outputs(name):
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == PICTURES[name]
    assert all(len(base64.b64decode("".join(picture))) < PICTURE_BYTES for picture in pictures)
    assert str(ROOT) not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_a_notebook_still_shows_its_stored_outputs(name, tmp_path):
    stored = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    cells = run(name, tmp_path).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[name]
    for before, cell in zip(stored, cells, strict=True):
        if "varies" in before["metadata"].get("tags", ()):
            assert shown(cell).strip()
        elif difference := compare(shown(before), shown(cell)):
            again = f"python tests/test_notebook.py {name} stores it anew"
            pytest.fail(f"{name}, {before['id']}: {again}\n{difference}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for notebook_name in sys.argv[1:] or PICTURES:
        store(notebook_name)
