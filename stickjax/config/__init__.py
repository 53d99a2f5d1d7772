"""The config of an experiment: nested dataclasses, whose fields a command line can change."""

from stickjax.config.experiment import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    OrderedMemoryConfig,
    SutConfig,
    TrainConfig,
    TreeConfig,
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
    "OrderedMemoryConfig",
    "SutConfig",
    "TrainConfig",
    "TreeConfig",
    "field_names",
    "locate",
]
