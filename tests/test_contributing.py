"""The instructions of the pages in docs/contributing work: a copy of the project is changed as each page says.

- A `python` block whose first line is "# path/of/file.py" is the text of a new file, without its first line.
- A `diff` block whose first line is "--- path/of/file.py" changes this file. Its lines that begin with "-" or a space
  must occur in the file one below the other, in exactly one place. Lines with "+" are new.
- The first pytest command in an `sh` block must pass in the changed copy.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {
    path.stem: path.read_text()
    for path in sorted((ROOT / "docs" / "contributing").glob("*.md"))
    if "```diff\n" in path.read_text()
}
COPIED = "stickjax", "pallas_kernels", "configs", "benchmarks", "tests", "pyproject.toml"
LEFT_OUT = shutil.ignore_patterns("__pycache__", "oracles", "old_run", "kept", "results")


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def new_files(text: str) -> dict[str, str]:
    found = [re.fullmatch(r"# ([\w/]+\.py)\n(.*)", block, re.DOTALL) for block in blocks(text, "python")]
    return {match[1]: match[2] for match in found if match}


def changes(text: str) -> list[tuple[str, str, str]]:
    """Return (file, old lines, new lines) for every `diff` block of a page in Markdown."""
    found = []
    for block in blocks(text, "diff"):
        head, *lines = block.splitlines(keepends=True)
        assert head.startswith("--- ") and {line[0] for line in lines} <= set("+- "), block
        old, new = ("".join(line[1:] for line in lines if line[0] in (" ", sign)) for sign in "-+")
        found.append((head.removeprefix("--- ").strip(), old, new))
    return found


def follow(text: str, folder: Path) -> None:
    for name, content in new_files(text).items():
        assert not (folder / name).exists(), name
        (folder / name).write_text(content)
    for name, old, new in changes(text):
        content = "\n" + (folder / name).read_text()
        assert content.count("\n" + old) == 1, f"{name} has these lines {content.count(chr(10) + old)} times:\n{old}"
        (folder / name).write_text(content.replace("\n" + old, "\n" + new)[1:])


def first_check(text: str) -> list[str]:
    """Return the arguments of the first pytest command in the `sh` blocks of a page in Markdown."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines() if " -m pytest " in line]
    return shlex.split(lines[0])[3:]


def test_the_pages():
    assert set(PAGES) == {"attention_variant", "family", "kernel_backend", "model_type", "router_loss"}


def test_lines_that_are_not_there_are_an_error(tmp_path):
    (tmp_path / "a.py").write_text("one\ntwo\ntwo\n")
    follow("```python\n# b.py\nthree\n```\n```diff\n--- a.py\n one\n+1\n-two\n```\n", tmp_path)
    assert (tmp_path / "a.py").read_text() == "one\n1\ntwo\n" and (tmp_path / "b.py").read_text() == "three\n"
    for line in ("tw", "four", "two\n-two"):
        with pytest.raises(AssertionError, match="times"):
            follow(f"```diff\n--- a.py\n-{line}\n```\n", tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_followed(page, tmp_path):
    for name in COPIED:
        copy = shutil.copy if (ROOT / name).is_file() else lambda *paths: shutil.copytree(*paths, ignore=LEFT_OUT)
        copy(ROOT / name, tmp_path / name)
    follow(PAGES[page], tmp_path)
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *first_check(PAGES[page])]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = [*new_files(PAGES[page]), *(name for name, *_ in changes(PAGES[page]))]
    words = [sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet", *made]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
