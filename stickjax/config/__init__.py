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

__all__ = [
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
