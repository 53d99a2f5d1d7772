"""The README's Python code runs, its commands exist, and its table of letters agrees with the code."""

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert "stick_breaking_attention: xla" in out and "(1, 12, 257)" in out


def test_what_the_readme_names_is_there():
    targets = set(re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets
    for path in re.findall(r"(?:configs|docs|launch|notebooks)/[\w./]+\w", README):
        assert (ROOT / path).exists(), path
    for module in set(re.findall(r"python -m (stickjax\.\w+|benchmarks)", README)):
        base = ROOT / module.replace(".", "/")
        assert base.with_suffix(".py").exists() or (base / "__main__.py").exists(), module


def test_every_option_of_the_readme_is_an_option():
    from stickjax.config import Config, SutConfig
    from stickjax.config.command_line import describe

    known = describe(Config()) + describe(Config(SutConfig()))
    for option in re.findall(r"--((?:model|data|optim|train|mesh)\.\w+)", README):
        assert f"--{option}=" in known, option


def test_links_between_pages_lead_somewhere():
    pages = {ROOT / "README.md", *(ROOT / "docs").rglob("*.md")}
    linked = {
        page: {
            (page.parent / target).resolve()
            for target in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", page.read_text())
        }
        for page in pages
    }
    assert set().union(*linked.values()) <= pages
    assert linked[ROOT / "README.md"] >= set((ROOT / "docs" / "kernels").glob("*.md"))


def test_every_python_name_of_the_pages_exists():
    text = README + "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    names = set(re.findall(r"`((?:stickjax|pallas_kernels)(?:\.\w+)+)", text))
    assert names
    for name in names:
        try:
            pkgutil.resolve_name(name)
        except (AttributeError, ImportError):
            pytest.fail(f"{name} does not exist")


def test_the_family_of_the_page_trains_from_its_file(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    Path("bigram.py").write_text(blocks[0])
    Path("variant.py").write_text(f"import sys\n{blocks[1]}\nassert config.attention == 'halved'\n")
    for words in (["-m", "stickjax.train", "bigram.py"], ["variant.py"]):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len((tmp_path / "runs" / "bigram" / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_page_of_the_layout_names_files_that_exist():
    rows = re.findall(r"^\| `([\w/]+)/` \| (.*)$", (ROOT / "docs" / "layout.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    for folder, cells in rows:
        for name in re.findall(r"`(\w+\.py|\w+/)`", cells):
            assert (ROOT / folder / name).exists() or any((ROOT / folder).glob(f"*/{name}")), f"{folder}/{name}"
