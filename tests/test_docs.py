"""The documentation is true: its Python code runs, and everything that a page names exists.

This includes commands, options, files, links, Python names and error messages.
"""

import ast
import contextlib
import io
import os
import pkgutil
import re
from pathlib import Path

import pytest

from stickjax.config import field_names
from stickjax.config.attention import ATTENTION
from stickjax.config.family import MODEL_CONFIGS
from stickjax.models.families import FAMILIES
from stickjax.models.parameters import PARAMETERS

ROOT = Path(__file__).parent.parent
MADE = {"docs/reference/config.md", "docs/_build/html"}  # the build of the documentation writes them
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *ROOT.glob("CONTRIBUTING.md"), *sorted((ROOT / "docs").rglob("*.md"))]
    if "_build" not in path.parts and str(path.relative_to(ROOT)) not in MADE
}
ALL = "\n".join(PAGES.values())


def blocks(name: str) -> list[tuple[str, str]]:
    """Return the code blocks of the page `name` as (language, text), in their order.

    The language is `python`, or `text` for what the Python block above it prints.
    """
    return re.findall(r"^```(python|text)\n(.*?)^```", PAGES[name], re.DOTALL | re.MULTILINE)


# The Python blocks of these pages are files: they begin with a file name such as "# bigram.py". Other tests run them.
FILES = [name for name in PAGES if any(re.match(r"# [\w/]+\.py\n", text) for _, text in blocks(name))]
NEW_FILES = {match for name in FILES for _, text in blocks(name) for match in re.findall(r"\A# ([\w/]+\.py)\n", text)}
RUN = [name for name in PAGES if name not in FILES and any(kind == "python" for kind, _ in blocks(name))]


@pytest.fixture
def registries():
    """Remove the families and attention variants that a test registers: later tests may register the same names."""
    before = [(registry, dict(registry)) for registry in (MODEL_CONFIGS, FAMILIES, PARAMETERS, ATTENTION)]
    yield
    for registry, content in before:
        registry.clear()
        registry.update(content)


# tests/test_ordered_memory.py and tests/test_latent_tree.py make the same calls as the code on these two pages.
EXHAUSTIVE = {
    "test_the_python_of_a_page_runs": lambda name: name.endswith(("ordered_memory.md", "guides/latent_trees.md"))
}


@pytest.mark.parametrize("name", RUN)
def test_the_imports_of_a_page_work(name):
    tree = ast.parse("\n".join(text for kind, text in blocks(name) if kind == "python"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), name, "exec"), {})


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("name", RUN)
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    """The Python blocks of a page run from top to bottom in one namespace, and print every line that the page shows."""
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "configs", "configs")
    names, printed, before = {}, "", ""
    for kind, block in blocks(name):
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block, name, "exec"), names)
            printed = out.getvalue()
        elif before == "python":
            for line in filter(None, map(str.strip, block.splitlines())):
                assert line in printed, f"{name} says that its code prints {line!r}; it prints\n{printed}"
        before = kind


def test_commands_and_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {found for found in re.findall(r"(?:`|^ *)make ([a-z][a-z-]+)", ALL, re.MULTILINE)} <= targets
    for module in set(re.findall(r"python -m ((?:stickjax|benchmarks)[\w.]*\w)", ALL)):
        base = ROOT / module.replace(".", "/")
        assert base.with_suffix(".py").exists() or (base / "__main__.py").exists(), module


def test_options_of_configs_exist():
    known = set(field_names())
    for option in re.findall(r"--((?:model|data|optim|train|mesh)\.[\w.]*\w)", ALL):
        assert option in known, f"--{option}"


def test_files_exist():
    folders = "configs|docs|launch|notebooks|stickjax|pallas_kernels|tests"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./]+\w", ALL):
        assert (ROOT / path).exists() or path in NEW_FILES | MADE, path


def test_links_lead_somewhere():
    for name, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            path = (ROOT / name).parent.joinpath(target).resolve()
            place = str(path.relative_to(ROOT)).replace("docs/notebooks/", "notebooks/")  # the build copies them
            assert (ROOT / place).exists() or place in MADE, f"{name}: {target}"


def test_python_names_exist():
    names = set(re.findall(r"`((?:stickjax|pallas_kernels)(?:\.\w+)+)", ALL))
    assert names
    for name in names:
        try:
            pkgutil.resolve_name(name)
        except (AttributeError, ImportError):
            pytest.fail(f"the Python name {name} on a page does not exist")


def texts_of_the_code() -> list[str]:
    """Return every string in the packages except docstrings.

    In the text of an f-string, "…" stands for each inserted value.
    """
    found = []
    for path in [*(ROOT / "stickjax").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):  # an f-string comes before its parts
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
                left_out |= {id(part) for part in node.values}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
                found.append(node.value)
    return [" ".join(text.split()) for text in found]


def test_the_errors_of_the_page_are_in_the_code():
    """Every error message in docs/reference/errors.md occurs in a string of the code.

    In a message, "…" stands for any text. One string of the code must contain the words before, between and after the
    "…", in the same order.
    """
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    messages, texts = re.findall(r"^```none\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE), texts_of_the_code()
    assert len(messages) == len(set(messages)) >= 30
    assert all(len(re.findall(r"\w{2,}", message)) >= 2 for message in messages), "a message needs two words"
    patterns = {message: ".*".join(re.escape(part.strip()) for part in message.split("…")) for message in messages}
    missing = [message for message in messages if not any(re.search(patterns[message], text) for text in texts)]
    assert not missing, f"docs/reference/errors.md has messages that are not in the code: {missing}"
