"""Sparse, stick-breaking language models in JAX."""

from stickjax.config import Config, DataConfig, ModelConfig, OptimConfig, SutConfig, TrainConfig

__all__ = ["Config", "DataConfig", "ModelConfig", "OptimConfig", "SutConfig", "TrainConfig", "load"]
__version__ = "0.1.0"


def load(run, *, step=None, changes=None):
    """The model of a run folder: `stickjax.run.load`, imported when it is used."""
    from stickjax.run import load as load_run

    return load_run(run, step=step, changes=changes)
