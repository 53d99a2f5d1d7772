"""The config of one experiment as nested frozen dataclasses. Every field has a default, a type and a help text.

A field of one capital letter, such as D or L, is the size of an axis (docs/reference/letters.md). `Config.to_json`
returns a config as JSON text, and `Config.from_dict` makes a config from the parsed JSON. The module
`stickjax.config.command_line` parses changes of a config on a command line.
"""

import dataclasses
import functools
import json
import logging
from dataclasses import dataclass
from typing import Any, Literal

from stickjax.config.data import DataConfig
from stickjax.config.decoder import ModelConfig
from stickjax.config.family import MODEL_CONFIGS, FamilyConfig
from stickjax.config.fields import (
    SEED,
    accept_former_names,
    check_fields,
    field,
    field_types,
    former_names,
    nearest,
    nested_fields,
    shown,
    with_present_names,
)
from stickjax.config.latent_tree import TreeConfig
from stickjax.config.ordered_memory import OrderedMemoryConfig
from stickjax.config.synonyms import suggestion
from stickjax.config.universal import SutConfig

__all__ = [
    "Config", "DataConfig", "MeshConfig", "ModelConfig", "OptimConfig", "OrderedMemoryConfig", "SutConfig",
    "TrainConfig", "TreeConfig", "locate",
]  # fmt: skip

log = logging.getLogger(__name__)


@accept_former_names
@dataclass(frozen=True)
class OptimConfig:
    """The config of the optimizer (AdamW with muP) and of the learning-rate schedule, whose lengths are in tokens."""

    schedule: Literal["power", "wsd", "cosine", "constant"] = field(
        "power", "learning rate after the warmup: Power scheduler, warmup-stable-decay, cosine decay, or constant"
    )
    peak_lr: float = field(
        0.02, "highest learning rate: cap of the power law, or plateau of the other schedules", above=0
    )
    a: float = field(
        4.0,
        "power: factor a of the learning rate beta * a * n^b after n tokens; beta is the batch size in tokens / 4096",
        above=0,
    )
    b: float = field(-0.51, "power: exponent b of the learning rate beta * a * n^b")
    warmup_tokens: int = field(0, "length of the linear warmup, in tokens", at_least=0)
    decay_tokens: int = field(0, "length of the decay at the end of the run, in tokens; 0: no decay", at_least=0)
    decay: Literal["exponential", "linear", "sqrt", "cosine"] = field("exponential", "shape of the learning-rate decay")
    end_ratio: float = field(
        0.0, "final learning rate divided by the learning rate at the start of the decay", at_least=0, at_most=1
    )
    beta1: float = field(0.9, "Adam: decay of the first moment", at_least=0, below=1)
    beta2: float = field(0.95, "Adam: decay of the second moment", at_least=0, below=1)
    eps: float = field(1e-10, "Adam: epsilon", at_least=0)
    weight_decay: float = field(0.1, "decoupled weight decay; norms and biases have none", at_least=0)
    scale_decay: bool = field(False, "strict muP: multiply the weight decay of hidden matrices by m_width")
    trainable: str = field(
        "*", "name patterns of the parameters to train, such as *.new_*,*.router.*; a pattern after ! freezes: !embed",
        was="learn",
    )  # fmt: skip
    clip: float | None = field(
        1.0, "largest global norm of the gradient; a larger gradient is scaled down; None: no clipping", above=0
    )

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class TrainConfig:
    """The config of the training: its length, log lines, checkpoints, validation, and seed."""

    steps: int = field(400, "number of optimizer steps", at_least=1, at_most=2**31 - 1)
    accumulate: int = field(1, "microbatches per step; B must be a multiple of it", at_least=1)
    seed: int = field(0, "seed of the initial parameters and of random choices in training", at_least=0, at_most=SEED)
    log_every: int = field(10, "steps between lines of metrics.jsonl", at_least=1)
    checkpoint_every: int = field(100, "steps between checkpoints; the last step always has one", at_least=1)
    keep: int = field(3, "number of newest checkpoints to keep", at_least=1)
    eval_every: int = field(
        0, "steps between validations of the model; the last step always has one; 0: no validation", at_least=0
    )
    eval_tokens: int = field(2**16, "largest number of held-out tokens that a validation scores", at_least=1)
    track: Literal["tensorboard", "wandb", "trackio"] | None = field(
        None, "tracker of experiments that also gets the metrics: tensorboard, wandb or trackio; None: no tracker"
    )
    compilation_cache: str | None = field(
        "auto",
        "folder that keeps compiled programs, so that the next start is faster; auto: a folder in the user's cache; "
        "None: do not change JAX's settings",
    )
    max_bad_steps: int = field(
        10, "stop after this many steps in a row with a loss or gradient that is not finite", at_least=1
    )

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class MeshConfig:
    """The config of the device mesh: the number of devices along each mesh axis.

    The number of devices of a run is the product of all axes. One axis may be -1: it takes all devices that the other
    axes leave.
    """

    data: int = field(1, "parts of the batch; every device has all parameters", at_least=-1)
    fsdp: int = field(1, "parts of the batch, and of the parameters and optimizer state (fully sharded)", at_least=-1)
    expert: int = field(1, "parts of the batch, and of the experts", at_least=-1)
    context: int = field(1, "parts of every sequence (stick-breaking only)", at_least=-1)
    tensor: int = field(1, "parts of the heads, the hidden units and the vocabulary", at_least=-1)

    def __post_init__(self):
        check_fields(self)
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size == 0:
                raise ValueError(f"{axis}={size} must be at least 1, or -1 for all devices that the other axes leave")
        if len(left := [axis for axis, size in sizes.items() if size == -1]) > 1:
            raise ValueError(f"only one axis of the mesh may be -1, not {' and '.join(left)}")


@dataclass(frozen=True)
class Config:
    """The config of a whole experiment: the model, the data, the optimizer, the training and the mesh of devices."""

    model: FamilyConfig = field(None, "the model", ModelConfig)
    data: DataConfig = field(None, "the data", DataConfig)
    optim: OptimConfig = field(None, "the optimizer", OptimConfig)
    train: TrainConfig = field(None, "the training", TrainConfig)
    mesh: MeshConfig = field(None, "the devices", MeshConfig)

    def __post_init__(self):
        check_fields(self)
        if self.data.B % self.train.accumulate:
            raise ValueError(f"B={self.data.B} sequences must be a multiple of accumulate={self.train.accumulate}")
        if self.train.accumulate > 1 and not self.model.accumulates:
            raise ValueError(
                f"accumulate={self.train.accumulate}: a model of family={self.model.family!r} needs all B sequences "
                "of a step at once; use accumulate=1"
            )
        if self.optim.decay_tokens > self.total_tokens:
            self.check_lengths()

    def check_lengths(self, step: int = 0, tokens: int = 0) -> None:
        """Raise ValueError if the warmup and the decay together are longer than the run, in tokens.

        For a run that continues from a checkpoint, `step` is the step of the checkpoint, and `tokens` is the number of
        tokens that were trained until then. The config alone does not determine the length of such a run in tokens,
        because the steps before the checkpoint may have had another batch size.
        """
        total = tokens + (self.train.steps - step) * self.data.tokens_per_step
        if self.optim.warmup_tokens + self.optim.decay_tokens > total:
            before = f"{tokens} + (steps - {step})" if step else "steps"
            raise ValueError(
                f"warmup_tokens={self.optim.warmup_tokens} and decay_tokens={self.optim.decay_tokens} "
                f"together exceed the run of {before} * B * T = {total} tokens; raise train.steps, or lower one of them"
            )

    @property
    def total_tokens(self) -> int:
        """The number of training tokens in a new run: steps * B * T."""
        return self.train.steps * self.data.tokens_per_step

    def replace(self, changes: dict[str, Any]) -> "Config":
        """Return a copy of the config with changes such as {"data.B": 8, "model.experts.E": 4}.

        The new config is checked after all changes are made, so several fields can change together. A data.mixture
        that is not None also sets data.source to "mixture" and data.path to None. A data.source other than "mixture"
        also sets data.mixture to None. A field that is in `changes` itself is not changed in this way. Raise ValueError
        for an unknown field or a wrong value.
        """
        sections: dict[str, dict] = {}
        for key, value in _with_one_source(changes).items():
            section, name = locate(self, key)
            if names := former_names(type(getattr(self, section))).get(name):
                new = " and ".join(f"{section}.{name}" for name in names)
                log.warning("%s is now %s; the next version removes the old name", key, new)
            sections.setdefault(section, {})[name] = value
        return dataclasses.replace(self, **{s: _changed(getattr(self, s), fields) for s, fields in sections.items()})

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict) -> "Config":
        """Make a config from `tree`, the result of `to_dict` or the content of a config.json.

        The checks are the same as for a command line. Fields that `tree` does not have get their defaults.

        Raises:
          ValueError: `tree` is not a config, or it has an unknown section, an unknown field or a wrong value.
        """
        if not isinstance(tree, dict):
            raise ValueError(f"a config is a JSON object with the sections {', '.join(_SECTIONS)}, not {shown(tree)}")
        if {"model_type", "architectures"} & tree.keys():
            raise ValueError(
                "this is the config of a Hugging Face model; convert its folder first: "
                "python -m stickjax.convert FOLDER RUN, then train with --init-from RUN"
            )
        for section, fields in tree.items():
            if section not in _SECTIONS:
                raise ValueError(f"unknown section {shown(section)}{nearest(str(section), _SECTIONS)}")
            if not isinstance(fields, dict):
                raise ValueError(f"{section}={shown(fields)} must be a JSON object of fields")
        family = tree.get("model", {}).get("family", "decoder")
        if family not in tuple(MODEL_CONFIGS):
            raise ValueError(
                f"family={shown(family)} is not one of {', '.join(map(repr, MODEL_CONFIGS))}"
                f"{nearest(str(family), MODEL_CONFIGS)}; import the file that defines the family, if it is your own"
            )
        config = cls(MODEL_CONFIGS[family]())
        sections = {section: _flat(type(getattr(config, section)), fields) for section, fields in tree.items()}
        for section, fields in sections.items():
            for name in fields:
                locate(config, f"{section}.{name}")
        return dataclasses.replace(
            config, **{s: _changed(getattr(config, s), fields) for s, fields in sections.items()}
        )

    def diff(self, other: "Config") -> list[str]:
        """Compare two configs. Return a line 'section.field: value here -> value in other' for each field that differs.

        If the model families differ, the only line is about `model.family`.
        """
        if self.model.family != other.model.family:
            return [f"model.family: {self.model.family!r} -> {other.model.family!r}"]
        here, there = (
            {s: _flat(type(getattr(config, s)), fields) for s, fields in config.to_dict().items()}
            for config in (self, other)
        )
        return [
            f"{s}.{n}: {here[s][n]!r} -> {there[s][n]!r}" for s in here for n in here[s] if here[s][n] != there[s][n]
        ]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _with_one_source(changes: dict[str, Any]) -> dict[str, Any]:
    """Return `changes`, {"section.field": value}, with the other data fields that a new mixture or source changes.

    If `changes` sets data.mixture to a mixture, data.source becomes "mixture" and data.path becomes None. Otherwise,
    if it sets data.source to another source, data.mixture becomes None. A field that `changes` already has keeps its
    value.
    """
    if changes.get("data.mixture") is not None:
        return {"data.source": "mixture", "data.path": None} | changes
    return ({"data.mixture": None} if changes.get("data.source", "mixture") != "mixture" else {}) | changes


_SECTIONS = tuple(section.name for section in dataclasses.fields(Config))


def _flat(section: type, fields: dict) -> dict:
    """Flatten nested dictionaries in a section of a config: {"experts": {"E": 8}} becomes {"experts.E": 8}.

    `fields` is {field: value}. Only a field whose value is a dataclass, such as `experts`, is flattened. `section` is
    the class of the section.
    """
    flat = {}
    for name, value in fields.items():
        if name in nested_fields(section) and isinstance(value, dict):
            flat |= {f"{name}.{inner}": x for inner, x in value.items()}
        else:
            flat[name] = value
    return flat


def _changed(section, changes: dict[str, Any]):
    """Return a copy of a section of a config, such as `config.model`, with changes such as {"D": 64, "experts.E": 8}.

    A key with a dot, such as "experts.E", means the field E of the dataclass in the field `experts` of the section.
    """
    values: dict[str, Any] = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    for group in nested_fields(type(section)):
        values[group] = dict(vars(values[group]))
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        (values[group] if group else values)[name] = value
    return type(section)(**with_present_names(type(section), values))


@functools.cache
def field_names(*models: type) -> list[str]:
    """Return the keys of all fields of a config, such as 'data.B' or 'model.experts.E'.

    `models` are the classes that the section `model` may have. Without arguments, they are the config classes of all
    model families.
    """
    sections = [(s.name, s.default_factory) for s in dataclasses.fields(Config) if s.name != "model"]
    sections = [("model", model) for model in models or MODEL_CONFIGS.values()] + sections
    names = []
    for section, config in sections:
        nested = nested_fields(config)
        for f in dataclasses.fields(config):
            inside = (
                [f"{f.name}.{g.name}" for g in dataclasses.fields(nested[f.name])] if f.name in nested else [f.name]
            )
            names += [f"{section}.{name}" for name in inside]
    return list(dict.fromkeys(names))


def types_of(config: Config, section: str, name: str) -> tuple:
    """Return the types that the value of a config field may have, such as (int, NoneType).

    `section` is the name of a section, such as "model". `name` is a field of the section, such as "D", "experts.E" for
    a field of a nested dataclass, or a former name of a field.
    """
    kind = type(getattr(config, section))
    group, _, last = (former_names(kind).get(name, (name,))[0]).rpartition(".")
    return field_types(nested_fields(kind)[group] if group else kind)[last]


def locate(config: Config, key: str) -> tuple[str, str]:
    """Check that a config has the field `key`, and split the key: "model.experts.E" -> ("model", "experts.E").

    `key` may also contain a former name of the field. Raise ValueError for an unknown key. The message suggests the
    nearest known key.
    """
    section, _, name = key.partition(".")
    known = field_names(type(config.model))
    if name not in former_names(type(getattr(config, section, config))) and key not in known:
        raise ValueError(f"unknown config key {key!r}{suggestion(key, known)}")
    return section, name
