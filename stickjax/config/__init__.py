"""The config of an experiment as nested dataclasses, and its changes by a command line."""

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
