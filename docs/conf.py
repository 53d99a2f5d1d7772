"""How Sphinx builds these pages: `make docs`. The build needs no network."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generated  # noqa: E402

import stickjax  # noqa: E402

project, author, copyright = "stickjax", "the stickjax authors", "the stickjax authors"
release = version = stickjax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]

nb_execution_mode = "off"  # notebooks are stored with their outputs; the tests run them
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
default_role = "code"  # docstrings write `x` for code, as Markdown does

html_theme = "sphinx_book_theme"
html_title = "stickjax"
html_static_path = ["static"]
html_css_files = ["stickjax.css"]
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "use_fullscreen_button": False}
html_show_sourcelink = False


def escape(text: str) -> str:
    """Text with the characters that have a meaning in reStructuredText escaped, except within `code`."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        part if i % 2 else re.sub(r"[*|\\]|(?<=\w)_(?!\w)", r"\\\g<0>", part) for i, part in enumerate(parts)
    )


def plain_docstrings(app, what, name, subject, options, lines: list[str]) -> None:
    """Docstrings are plain text in which only examples, after >>>, and `code` have a markup."""
    paragraphs = re.split(r"(\n\s*\n)", "\n".join(lines))
    lines[:] = "".join(part if ">>>" in part else escape(part) for part in paragraphs).split("\n")


def setup(app) -> None:
    generated.write(HERE)
    app.connect("autodoc-process-docstring", plain_docstrings, priority=100)  # before napoleon
