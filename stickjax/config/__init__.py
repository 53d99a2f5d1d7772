"""One experiment as nested dataclasses, its fields, and how a command line changes them."""

from stickjax.config.experiment import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SutConfig,
    TrainConfig,
    field_names,
    locate,
)
from stickjax.config.experts import ExpertsConfig

__all__ = [
    "ExpertsConfig",
    "Config",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "SutConfig",
    "TrainConfig",
    "field_names",
    "locate",
]
