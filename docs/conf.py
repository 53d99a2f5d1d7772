"""The settings with which Sphinx builds the documentation (`make docs`). The build needs no network."""

import dataclasses
import inspect
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
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_use_rtype = False
smartquotes_action = "D"  # dashes alone: the quotes in docstrings are Python's
highlight_language = "none"  # formulas in docstrings; examples, after >>>, are Python
default_role = "code"  # docstrings write `x` for code, as Markdown does

html_theme = "sphinx_book_theme"
html_title = "stickjax"
html_static_path = ["static"]
html_css_files = ["stickjax.css"]
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has a search field already
}
html_show_sourcelink = False


def escape(text: str) -> str:
    """Escape the characters of a text that have a meaning in reStructuredText, except within `code`.

    Without escapes, Sphinx would read a letter with a dot, as in "E.", as the beginning of a list, and it would not end
    `code` before a letter, as in `tree`s. Options such as --run become code.
    """
    parts = re.split(r"(`[^`]+`|(?<![\w-])--[a-z][\w.-]*\w)", text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"`{part.strip('`')}`"
        else:
            parts[i] = re.sub(r"[*|\\]|(?<=\w)_(?!\w)|(?<=: [A-Z])\.", r"\\\g<0>", part)
            parts[i] = re.sub(r"^(?=[a-z])", r"\\ ", parts[i]) if i else parts[i]
    return "".join(parts)


def bullets(paragraph: str) -> str:
    """Convert a paragraph to a list, if every line that is not indented begins with "`name`:".

    Return any other paragraph unchanged.
    """
    if not re.fullmatch(r"(`[^`\n]+`(, `[^`\n]+`)*( \[[^]\n]*\])*:[^\n]*(\n +[^\n]*)*\n?){2,}", paragraph):
        return paragraph
    return re.sub("^`", "- `", re.sub("^ +", "  ", paragraph, flags=re.MULTILINE), flags=re.MULTILINE)


def restructured(text: str) -> list[str]:
    """Convert the text of a docstring to reStructuredText, and return its lines.

    In a docstring only examples after >>>, `code` and directives are markup; everything else is plain text. An indented
    paragraph without a heading, such as a formula, is shown with its spaces and line breaks.
    """
    found, indented = [], True
    for paragraph in re.split(r"\n\s*\n", text):
        alone = all(line.startswith("  ") for line in paragraph.split("\n") if line)
        if ">>>" in paragraph or paragraph.lstrip().startswith(".. "):
            found.append(paragraph)
        elif alone and paragraph.strip() and not indented:
            found += ["::", paragraph]
            continue  # further ones belong to the same text
        else:
            found.append(bullets(escape(paragraph)))
        indented = alone or bool(re.match(r"[A-Z]\w*:\n|\.\. ", paragraph))
    return "\n\n".join(found).split("\n")


def plain_docstrings(app, what, name, subject, options, lines: list[str]) -> None:
    lines[:] = restructured("\n".join(lines))


def docstrings_of_properties(app, what, name, subject, options, lines: list[str]) -> None:
    """Replace `lines`, the docstring of a property as Sphinx has it, by the docstring in the code.

    Sphinx's extension Napoleon takes the words before the first colon as the type of the property, and removes them.
    """
    if what == "property":
        lines[:] = restructured(inspect.getdoc(subject) or "")


def short_signature(app, what, name, subject, options, signature: str | None, returned: str | None):
    """Return (signature, returned type) as Sphinx shows them: shorter than they are in the code.

    A config class has `(**fields)`, because its fields have their own table. A Flax module has only the names of its
    arguments. A returned type of more than 100 characters is left out.
    """
    if what == "class" and dataclasses.is_dataclass(subject) and subject.__module__.startswith("stickjax.config."):
        signature = "(**fields)"
    elif what == "class" and (signature or "").startswith("(*args: Any"):  # of a Flax module
        signature = f"({', '.join([*inspect.signature(subject.__init__).parameters][1:])})"
    return signature, None if len(returned or "") > 100 else returned


def setup(app) -> None:
    generated.write(HERE)
    app.connect("autodoc-process-docstring", plain_docstrings, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", docstrings_of_properties, priority=900)  # after napoleon
    app.connect("autodoc-process-signature", short_signature)
