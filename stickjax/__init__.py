"""Sparse, stick-breaking language models in JAX."""

import sys

from stickjax import renamed
from stickjax.config import Config, DataConfig, ModelConfig, OptimConfig, SutConfig, TrainConfig
from stickjax.config.command import end_on_interrupt

__all__ = ["Config", "DataConfig", "ModelConfig", "OptimConfig", "SutConfig", "TrainConfig", "export", "load"]
__version__ = "0.1.0"
renamed.install()

if sys.argv[:1] == ["-m"] and any(word.startswith("stickjax") for word in sys.orig_argv):
    end_on_interrupt()  # `python -m stickjax.COMMAND`, whose modules take seconds to import


def load(run, *, step=None, changes=None):
    """The model of a run folder or of a Hugging Face folder: `stickjax.storage.run_folder.load`."""
    from stickjax.storage.run_folder import load as load_run

    return load_run(run, step=step, changes=changes)


def export(model, path, **options):
    """Write a model in the Hugging Face layout: `stickjax.convert.export`, imported when it is used."""
    from stickjax.convert import export as export_model

    export_model(model, path, **options)
