"""A config from a file, and changed by the words of a command line: `--section.field=value`."""

import dataclasses
import json
import typing
from typing import Any, Literal

from stickjax.config import Config, locate
from stickjax.fields import alternatives


def _parse_value(key: str, text: str, hint):
    options = alternatives(hint)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    for option in options:
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option is str or typing.get_origin(option) is Literal:
            return text
        if option in (int, float):
            try:
                number = float(text)
                if option is float:
                    return number
                if number == int(number):  # 1e6 is a fine way to write an integer
                    return int(number) if abs(number) >= 2**53 or not text.lstrip("+-").isdigit() else int(text)
            except (ValueError, OverflowError):
                continue
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"--{key}={text}: expected {names}")


def parse_changes(config: Config, argv: list[str]) -> dict[str, Any]:
    """The words `--section.field=value` (or `--section.field value`) as `{"section.field": value}`.

    Raises:
      ValueError: an unknown field (with the nearest name), or a value of another type.

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
        changes[key] = _parse_value(key, text, typing.get_type_hints(type(getattr(config, section)))[name])
    return changes


def parse(config: Config, argv: list[str]) -> Config:
    """A config with the words of a command line applied; see `parse_changes`."""
    return config.replace(parse_changes(config, argv))


def describe(config: Config) -> str:
    """Every field with its present value and its sentence: the body of --help."""
    lines = []
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for field in dataclasses.fields(part):
            head = f"  --{section.name}.{field.name}={getattr(part, field.name)}"
            lines.append(f"{head:<44} {field.metadata['doc']}")
    return "\n".join(lines)


def load_config(path: str) -> Config:
    """Run a config file (Python with `get_config()`, chosen by the user) or read a run's config.json."""
    if path.endswith(".json"):
        with open(path) as file:
            return Config.from_dict(json.load(file))
    import runpy

    namespace = runpy.run_path(path)
    if "get_config" not in namespace:
        raise ValueError(f"{path} defines no get_config()")
    return namespace["get_config"]()
