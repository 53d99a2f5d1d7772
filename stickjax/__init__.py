"""Sparse, stick-breaking language models in JAX.

In a notebook or a program, four lines train a model, read its loss, load it, and generate text with it:

    result = stickjax.fit("tiny")          # trains in runs/tiny; call it again to continue
    result.metrics["loss"]                 # a NumPy array with one value for each logged step
    model = stickjax.load("runs/tiny")
    model.generate("def main(", max_new_tokens=40)

`help(stickjax.fit)` and `help(stickjax.load)` explain the arguments. Each command is run as `python -m stickjax.NAME`,
where NAME is train, evaluate, generate, convert, plan, surgery, sweeps, launch or data. The package `stickjax.models`
contains the models, and the package `pallas_kernels` contains the GPU kernels.
"""

import sys
from typing import TYPE_CHECKING

from stickjax.config import Config, DataConfig, ExpertsConfig, ModelConfig, OptimConfig, SutConfig, TrainConfig
from stickjax.config.command import end_on_interrupt
from stickjax.system import renamed

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from typing import Literal

    from jax.sharding import Mesh

    from stickjax.interactive import TrainedModel
    from stickjax.training.loop import Result

__all__ = [
    "Config", "DataConfig", "ExpertsConfig", "ModelConfig", "OptimConfig", "SutConfig", "TrainConfig",
    "export", "fit", "load", "register",
]  # fmt: skip
__version__ = "0.1.0"
renamed.install()

if sys.argv[:1] == ["-m"] and any(word.startswith("stickjax") for word in sys.orig_argv):
    end_on_interrupt()  # `python -m stickjax.COMMAND`, whose modules take seconds to import


def fit(
    config: "Config | str | os.PathLike",
    run: "str | os.PathLike | None" = None,
    *,
    init_from: str | None = None,
    branch: str | None = None,
    quiet: bool = False,
    on_metrics: "Callable[[dict], None] | None" = None,
) -> "Result":
    """Train a model, and write its checkpoints and metrics into a run folder.

    If the folder already has checkpoints, the training continues from the newest one. On a CPU, a training that was
    interrupted and continued has the same result, bit for bit, as a training without interruption.

    In a notebook, `fit` shows a progress bar and a plot of the loss. If you interrupt the notebook's kernel, or press
    Ctrl-C in a terminal, the training finishes its step, saves a checkpoint and returns. Call `fit` again to continue.
    A second interrupt ends the training at once, without a new checkpoint.

    Args:
      config: a `Config`, the name of a config such as "tiny", or the path of a config file.
      run: the run folder. None: `runs/NAME`, where NAME is the name of the config or of its file. For a `Config`
        object, NAME is a hash of its content, so the same config gives the same folder.
      init_from: a run folder. Its parameters are the initial parameters of this training. The optimizer state is new,
        and the data begin with the first batch.
      branch: "RUN@STEP", a checkpoint of another run. The training continues from it with `config`, which may for
        example add a learning-rate decay.
      quiet: True to print and show nothing.
      on_metrics: `on_metrics(row)` is called with every row of metrics, {name of a metric: number}, after the row is
        written into the run folder. With several processes, only process 0 calls it. An exception in it ends the
        training.

    Returns:
      `Result`: the last training `state`; `finished`, whether all steps were done; `tokens_per_second`; `stopped_by`,
      the number of the signal that stopped the training, or 0; `run`, the folder; and `metrics`, {name: NumPy array
      with one value for each logged step}.

    Raises:
      ValueError: the config does not fit its data or devices, the folder belongs to another config, or another process
        is training in the folder.
      FloatingPointError: the loss or the gradient was not finite in too many steps in a row (`train.max_bad_steps`).
        The last good checkpoint is kept.
      OSError: a checkpoint or the metrics could not be written.

    >>> import stickjax, tempfile
    >>> sizes = {"model.D": 8, "model.L": 1, "model.N": 2, "model.K": 1, "model.H": 4, "model.F": 16}
    >>> data = {"data.source": "recall", "data.examples": 100, "data.T": 16, "data.B": 2, "optim.warmup_tokens": 0}
    >>> config = stickjax.Config().replace(sizes | data | {"train.steps": 2, "train.log_every": 1})
    >>> result = stickjax.fit(config, tempfile.mkdtemp() + "/run", quiet=True)
    >>> result.finished, result.metrics["tokens"].tolist()
    (True, [32, 64])
    """
    from stickjax.interactive import fit

    return fit(config, run, init_from=init_from, branch=branch, quiet=quiet, on_metrics=on_metrics)


def load(
    run: "str | os.PathLike",
    *,
    step: "int | str | None" = None,
    changes: dict | None = None,
    mesh: "Mesh | Literal['run'] | None" = None,
) -> "TrainedModel":
    """Load the model of a run folder or of a Hugging Face folder, ready to generate text and to be evaluated.

    Args:
      run: a run folder, a folder in the Hugging Face layout, a folder that `stickjax.convert` wrote, or the name of a
        model on the Hugging Face hub, such as "org/name".
      step: the step of the checkpoint to load; "best": the checkpoint with the best score of the validations during
        the training (`train.eval_every`); None: the newest intact checkpoint.
      changes: config fields to change, such as {"model.window": 128}. The shapes of the parameters must stay the same.
      mesh: the devices that hold the parameters, and on which `evaluate` and `generate` run. None: the first device. A
        `jax.sharding.Mesh` that `stickjax.parallel.mesh.make_mesh` made: all devices of the mesh. "run": the mesh in
        the config of the run, with the `changes`, such as {"mesh.fsdp": 8}. If this mesh cannot be made on this
        machine, or if the model is not a language model, the first device is used. But if `changes` has a field of the
        mesh, or if there are several processes, both cases raise a ValueError.

    Returns:
      `TrainedModel` with the fields `model` (the module with the parameters: for a decoder, `model(tokens)` returns an
      object with `logits`), `config`, `tokenizer`, `step` (the step of the checkpoint) and `metrics` (the logged
      metrics of the training). Its methods are `evaluate()`; `generate(prompts, max_new_tokens)`, for language models;
      `predict(texts)`, for classifiers and translation models; and `trees(texts)`, for models that induce trees.

    Raises:
      ValueError: there is no run folder or no checkpoint; the parameters have other shapes than the config says, are
        not finite or do not fit into the free memory; a Hugging Face folder is damaged or has a model that is not
        supported; the hub does not have the model, or cannot be reached.

    >>> import stickjax, tempfile
    >>> sizes = {"model.D": 8, "model.L": 1, "model.N": 2, "model.K": 1, "model.H": 4, "model.F": 16}
    >>> data = {"data.source": "recall", "data.examples": 100, "data.T": 16, "data.B": 2, "optim.warmup_tokens": 0}
    >>> run = tempfile.mkdtemp() + "/run"
    >>> result = stickjax.fit(stickjax.Config().replace(sizes | data | {"train.steps": 1}), run, quiet=True)
    >>> model = stickjax.load(run)
    >>> isinstance(model.generate("a", max_new_tokens=4), str), model.step
    (True, 1)
    """
    from stickjax.interactive import load

    return load(run, step=step, changes=changes, mesh=mesh)


def export(
    model, path: "str | os.PathLike", *, type: str | None = None, shard_bytes: int = 5_000_000_000, push: bool = False
) -> None:
    """Write a decoder as a Hugging Face folder: config.json, model.safetensors, and tokenizer.json if there is one.

    `stickjax.load(path)` returns the same parameters, bit for bit. The only exception is a model with muP multipliers
    that is written as type="stickbreaking_attn" (see `stickjax.convert.export`). The page docs/guides/hugging_face.md
    lists the model types.

    Args:
      model: the result of `stickjax.load`, or only the module with the parameters. A module has no tokenizer, so no
        tokenizer.json is written for it.
      path: a folder that does not exist yet; it appears only when it is complete.
      type: the model type in config.json, such as "llama". None: the type is chosen, if exactly one type other than
        "stickjax" can hold the model. The type "stickjax" can hold every decoder with attention "stick_breaking" or
        "softmax" and without added or pruned experts. With this type, the folder also has PyTorch code.
      shard_bytes: the largest size of a file with parameters, in bytes. A larger model is divided into several files,
        and an index file lists them.
      push: True to write the model to the Hugging Face hub instead. `path` is then its name, such as "org/name". A new
        model on the hub is private.

    Raises:
      ValueError: the folder exists; the model type cannot express the model; `type` is None, and the number of
        types other than "stickjax" that can express the model is not 1; a parameter is not finite; or the upload fails.

    >>> import jax, stickjax, tempfile
    >>> from stickjax.models.transformer import init
    >>> config = stickjax.ModelConfig(V=16, D=8, L=2, N=2, K=1, H=4, F=16, attention="softmax")
    >>> folder = tempfile.mkdtemp() + "/model"
    >>> stickjax.export(init(config, jax.random.key(0)), folder, type="llama")
    >>> stickjax.load(folder).model.embed.shape
    (16, 8)
    """
    from stickjax.convert import export

    export(model, path, type=type, shard_bytes=shard_bytes, push=push)


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__version__"]


def register(what, name: str | None = None) -> None:
    """Register a model family, or an attention variant under a name, so that configs and commands can use it.

    A Python config file may define a family and call `register`. Then `python -m stickjax.train FILE` can train it.

    Args:
      what: a `stickjax.models.family.Family`, or a `stickjax.config.attention.AttentionVariant`.
      name: for a variant, the value of the config field `model.attention` that selects it. None for a family, because
        the field `family` of its config class contains its name.

    Raises:
      ValueError: another family or variant has the same name; `name` is given for a family, or missing for a variant;
        or `what` is neither a `Family` nor an `AttentionVariant`.
    """
    from stickjax.config.attention import AttentionVariant, register_attention
    from stickjax.models.families import Family
    from stickjax.models.families import register as register_family

    if isinstance(what, Family) and name is None:
        register_family(what)
    elif isinstance(what, AttentionVariant) and name is not None:
        register_attention(name, what)
    else:
        raise ValueError(
            "register() takes a Family without a name, or an AttentionVariant with a name, got "
            f"what={what!r}, name={name!r}"
        )
