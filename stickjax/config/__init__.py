"""The config of an experiment: nested dataclasses. A command line can change each field by --section.field=value."""

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
