"""Load a config from a file, and change its fields by `--section.field=value` on the command line."""

import difflib
import inspect
import json
import operator
import os
import runpy
import traceback
from pathlib import Path
from typing import Any

from stickjax.config import Config, field_names, locate
from stickjax.config.experiment import types_of
from stickjax.config.fields import shown


def parse_value(text: str, kinds: tuple):
    """Convert the text of a config field on the command line to a value: "8" becomes 8, "none" becomes None.

    `kinds` are the types that the field may have, such as (int, type(None)). A text that fits none of them is returned
    unchanged; then the config class raises an error that names the field.
    """
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds:
        return {"true": True, "false": False}.get(text.lower(), text)
    for kind in kinds:
        if kind in (int, float):
            try:
                number = float(text)
                if kind is float:
                    return number
                if number == int(number):  # 1e6 is an integer too
                    return int(text) if text.lstrip("+-").isdigit() else int(number)
            except (ValueError, OverflowError):
                continue
    return text


def parse_changes(config: Config, argv: list[str]) -> dict[str, Any]:
    """Parse the changes of config fields on a command line: `--section.field=value` or `--section.field value`.

    Args:
      config: the config to which the changes belong. Its fields say which keys are known, and which types the values
        have. `config` itself is not changed.
      argv: the words of the command line.

    Returns:
      The changes as {"section.field": value}.

    Raises:
      ValueError: a word does not begin with "--", a field is unknown (the message suggests the nearest name), or the
        value of a field is missing.

    >>> parse_changes(Config(), ["--optim.peak_lr=3e-4", "--data.B", "8"])
    {'optim.peak_lr': 0.0003, 'data.B': 8}
    """
    changes, words = {}, iter(argv)
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}; config fields are written --section.field=value")
        key, eq, text = word[2:].partition("=")
        section, name = locate(config, key)
        if not eq:
            text = next(words, None)
            if text is None:
                raise ValueError(f"--{key} needs a value")
        changes[f"{section}.{name}"] = parse_value(text, types_of(config, section, name))
    return changes


def parse(config: Config, argv: list[str]) -> Config:
    """Return a copy of the config with the changes in `argv`, words of a command line such as `--data.B=8`."""
    return config.replace(parse_changes(config, argv))


def describe(config: Config) -> str:
    """Return the part of --help about a config: a line per field, with its key, its value and its help text."""
    lines = []
    for key in field_names(type(config.model)):
        group, _, name = key.rpartition(".")
        owner = operator.attrgetter(group)(config)
        head = f"  --{key}={getattr(owner, name)}"
        lines.append(f"{head:<44} {owner.__dataclass_fields__[name].metadata['doc']}")
    return "\n".join(lines)


# The folder `configs` lies beside the packages in a checkout, and inside stickjax in an installation (pyproject.toml).
_PACKAGE = Path(__file__).parent.parent
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_WHAT = "a config is a name ({}), a Python file that defines get_config(), or the config.json of a run"


def named_configs() -> dict[str, Path]:
    """Return {name: Python file} of the configs that come with stickjax.

    >>> {'tiny', 'tiny_softmax'} <= set(named_configs())
    True
    """
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    return {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"}


def load_config(path: str) -> Config:
    """Load a config. `path` is the name of a config that comes with stickjax, a Python file, or a config.json.

    A name is a key of `named_configs()`, such as "tiny". A Python file is run, and its function `get_config()` returns
    the config.

    Raises:
      ValueError: there is no such config, or it cannot be read. If a line of a Python file raises an error, the message
        has the number of this line.
    """
    file, named = Path(path), named_configs()
    if path in named:
        return _run(named[path])
    what = _WHAT.format(", ".join(named))
    if path and file.is_dir():
        if (file / "config.json").exists():
            what = (
                f"did you mean {file / 'config.json'}? To start from the parameters of this run, use the option of the "
                f"command train: --init-from {path}"
            )
        raise ValueError(f"{path} is a folder; {what}")
    if not path or not file.exists():
        near = difflib.get_close_matches(file.stem, named, n=1, cutoff=0.6)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{path or repr(path)} does not exist{hint}; {what}")
    if file.suffix.lower() == ".json":
        return read_json(file)
    if file.suffix.lower() != ".py":
        raise ValueError(f"{path} is not a config: {what}")
    return _run(file)


def config_name(path: str | os.PathLike) -> str:
    """Return the name of a config: the name of its file without ending, or for a config.json the name of its folder.

    >>> config_name("configs/tiny.py"), config_name("runs/base/config.json")
    ('tiny', 'base')
    """
    file = Path(path)
    return file.absolute().parent.name if file.name == "config.json" else file.stem


def read_json(path: str | os.PathLike) -> Config:
    """Read a config from a config.json. Raise ValueError if the file is not a config; the message names the path."""
    try:
        tree = json.loads(Path(path).read_text("utf-8-sig"))
    except RecursionError as error:
        raise ValueError(f"{path}: the JSON is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: the file is not JSON: {error}") from error
    try:
        return Config.from_dict(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _run(file: Path) -> Config:
    """Run a Python file, call its function `get_config()` and return the config.

    Raise ValueError for any error in the file. The message begins with the path of the file and, if a line of the file
    raised the error, the number of this line. If the file imports a module with a syntax error, the message begins with
    the path of the module and the line in the module instead.
    """
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        if get_config is None:
            raise ValueError("the file defines no function get_config()")
        try:
            inspect.signature(get_config).bind()
        except TypeError as error:
            line = getattr(getattr(get_config, "__code__", None), "co_firstlineno", 1)
            raise SyntaxError(f"get_config() must take no arguments: {error}", (str(file), line, None, None)) from error
        config = get_config()
        if not isinstance(config, Config):
            raise ValueError(f"get_config() must return a stickjax.Config, not {shown(config)}")
        return config
    except SyntaxError as error:
        raise ValueError(f"{error.filename or file}:{error.lineno or 1}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{file}{f':{lines[-1]}' if lines else ''}: {kind}{error}") from error
