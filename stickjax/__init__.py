"""Sparse, stick-breaking language models in JAX."""

import sys

from stickjax import renamed
from stickjax.config import Config, DataConfig, ModelConfig, OptimConfig, SutConfig, TrainConfig
from stickjax.config.command import end_on_interrupt

__all__ = [
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "SutConfig",
    "TrainConfig",
    "export",
    "load",
    "register",
]
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


def register(what, name: str | None = None) -> None:
    """Make a family of models, or an attention variant under a name, known to configs and to all commands.

    A config file may call it: then `python -m stickjax.train FILE` trains the family that the file defines.

    Args:
      what: a `stickjax.models.family.Family`, or a `stickjax.config.attention.AttentionVariant`.
      name: the variant's value of `model.attention`; a family has its name in its config.

    Raises:
      ValueError: the name is taken, or `what` is neither of the two.
    """
    from stickjax.config.attention import AttentionVariant, register_attention
    from stickjax.models.families import Family
    from stickjax.models.families import register as register_family

    if isinstance(what, Family) and name is None:
        register_family(what)
    elif isinstance(what, AttentionVariant) and name is not None:
        register_attention(name, what)
    else:
        raise ValueError(f"register a Family, or an AttentionVariant with a name, not {what!r}")
