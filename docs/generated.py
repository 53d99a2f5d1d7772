"""Make the pages that do not exist as files in docs/: the table of all config fields, and copies of the notebooks."""

import dataclasses
import shutil
import typing
from pathlib import Path

from stickjax.config import Config, ExpertsConfig, ModelConfig, SutConfig
from stickjax.config.fields import nested_fields
from stickjax.config.rope import RopeScaling

SECTIONS = {
    '`model` of `family="decoder"`: `ModelConfig`': ("model", ModelConfig),
    '`model` of `family="sut"`: `SutConfig`': ("model", SutConfig),
    "`model.experts` and `model.attention_experts`: `ExpertsConfig`": ("model.experts", ExpertsConfig),
    "`model.rope_scaling`: `RopeScaling`": ("model.rope_scaling", RopeScaling),
} | {
    f"`{section.name}`: `{section.default_factory.__name__}`": (section.name, section.default_factory)
    for section in dataclasses.fields(Config)
    if section.name != "model"
}


def write(docs: Path) -> None:
    """Write the page of the config fields into `docs`, the folder of the documentation; copy the notebooks there."""
    (docs / "reference" / "config.md").write_text(config_page())
    shutil.copytree(docs.parent / "notebooks", docs / "notebooks", dirs_exist_ok=True)


def config_page() -> str:
    """Return a Markdown page with all config fields: a table of names, types, defaults and meanings for each class."""
    text = "# Config fields\n\nEvery field is an option of the command line: `--section.field=value`.\n"
    for title, (section, config) in SECTIONS.items():
        text += f"\n## {title}\n\n| field | type | default | meaning |\n|---|---|---|---|\n"
        for field in dataclasses.fields(config):
            if field.name not in nested_fields(config):
                text += _row(section, config, field)
    return text


def _row(section: str, config: type, field: dataclasses.Field) -> str:
    cells = f"`{section}.{field.name}`", _type(typing.get_type_hints(config)[field.name]), f"`{field.default!r}`"
    bounds = ", ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in field.metadata["bounds"].items())
    cells += (field.metadata["doc"] + (f" ({bounds})" if bounds else ""),)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _type(hint) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    return f"`{hint.__name__ if isinstance(hint, type) else hint}`".replace("types.", "")
