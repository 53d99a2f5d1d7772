"""Read and write run folders: config.json, metrics.jsonl and checkpoints. They are only data, and never executed.

Two other kinds of folders can be read like a run folder: a Hugging Face folder, and a folder of one model, which `save`
or `stickjax.convert` writes. A folder of one model has the parameters in model.safetensors instead of checkpoints,
because Orbax can write an array only if the whole array is in memory.
"""

import os
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from stickjax.config import Config
from stickjax.config.command import say_error
from stickjax.config.command_line import read_json
from stickjax.config.decoder import ModelConfig
from stickjax.data.labelled import LABELS_FILE, read_labels
from stickjax.data.tokenizer import WORDS_FILE, Tokenizer, load_tokenizer
from stickjax.models.families import family_of
from stickjax.models.parameters import shardings
from stickjax.models.transformer import Transformer
from stickjax.models.universal import LanguageModel, PairClassifier
from stickjax.storage import hugging_face
from stickjax.storage.checkpoints import Checkpoints, check_finite, named_leaves
from stickjax.storage.hugging_face.files import Lazy, open_safetensors, write_safetensors
from stickjax.system.disk import write_file, writing
from stickjax.system.lock import complete_folder
from stickjax.system.memory import check_fits, local_bytes
from stickjax.system.text import printable

MODEL_FILE = "model.safetensors"  # the file of a folder of one model, which has no checkpoints
# Fields that hold paths. A checkpoint records hashes of the files, so the paths may change.
PATH_FIELDS = ("data.path", "data.heldout_path", "data.labels", "data.tokenizer")
_NO_PATHS = (None, "byte", "words")  # values of these fields that are not paths
# Fields that may change when a run is resumed: they change neither the state nor the results of a step.
_FREE = (
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.max_bad_steps",
    "model.implementation",
    "mesh.",
)


class Loaded(NamedTuple):
    """A trained model with its config and tokenizer, as `load` returns it.

    Call the model as `model(tokens).logits`; a Universal Transformer as `model(batch).logits`. `tokenizer` is None for
    a converted model without a tokenizer. `step` is the training step of the checkpoint; 0 for a converted model.
    """

    model: Transformer | LanguageModel | PairClassifier
    config: Config
    tokenizer: Tokenizer | None
    step: int


def read_config(run: str | os.PathLike) -> Config:
    """Return the config of a run folder or a Hugging Face folder.

    `data.tokenizer` is the tokenizer.json or the words.json in the folder, and `data.labels` the labels.json, if there
    are such files. Raise ValueError if the folder has no config.json, or if the file cannot be read.
    """
    path = Path(run) / "config.json"
    if not path.exists():
        raise ValueError(f"{run} is not a run folder: it has no config.json")
    if hugging_face.is_folder(Path(run)):
        return hugging_face.read_config(Path(run))
    # The files of the training are also there after the folder was moved.
    return read_json(path).replace(_own_files(run))


def _own_files(run: str | os.PathLike) -> dict[str, str]:
    """Return {field of the config: path} of the tokenizer and the labels that a run folder keeps."""
    folder = Path(run)
    files = {"data.tokenizer": "tokenizer.json", "data.labels": LABELS_FILE}
    if not (folder / "tokenizer.json").exists():
        files["data.tokenizer"] = WORDS_FILE
    return {place: str(folder / name) for place, name in files.items() if (folder / name).exists()}


def with_own_files(run: str | os.PathLike, config: Config) -> Config:
    """Return a copy of the config that uses the files in the run folder: its tokenizer, and its list of labels.

    Without such a file, or with the byte tokenizer, return the config unchanged. Raise ValueError if the config names a
    tokenizer or labels with another content.
    """
    changes = {}
    for place, own in _own_files(run).items():
        given = attrgetter(place)(config)
        if place == "data.labels" and config.data.source != "labelled":
            continue
        if given == "byte" or (given == "words" and Path(own).name != WORDS_FILE):
            continue  # `check_config` says that the run has another tokenizer
        if (
            given not in _NO_PATHS
            and Path(given).exists()
            and _content(place, given, config) != _content(place, own, config)
        ):
            what = "the tokenizer" if place == "data.tokenizer" else "the labels"
            both = f"{place}={given!r} differs from {own}, {what} of {run}"
            raise ValueError(f"{both}; use the file in the run folder, or another run folder")
        changes[place] = own
    return config.replace(changes)


def _content(place: str, path: str, config: Config):
    """Return what identifies the content of a tokenizer or of a list of labels."""
    return load_tokenizer(path, config.data.eot).name if place == "data.tokenizer" else read_labels(path)


def check_tokenizer(extra: dict, config: Config, tokenizer: Tokenizer | None, source: str) -> None:
    """Raise ValueError if a model was trained with another tokenizer.

    `extra` is the dictionary in its checkpoint; "tokenizer" there is the name of the tokenizer in training. `source` is
    the name of the checkpoint in the message.
    """
    recorded = extra.get("tokenizer")
    if recorded and tokenizer and recorded != tokenizer.name:
        where = f"data.tokenizer={config.data.tokenizer!r}"
        raise ValueError(f"{where} is {tokenizer.name}, but {source} was trained with {recorded}")


def check_trained(extra: dict, config: Config, tokenizer: Tokenizer | None, source: str) -> None:
    """Raise ValueError if training cannot continue from a checkpoint.

    It cannot continue if the checkpoint is not from a training run, or if the tokenizer is another one. `extra` is the
    dictionary in the checkpoint, and `source` is the name of the checkpoint in the message.
    """
    if missing := {"config", "corpus", "data"} - extra.keys():
        raise ValueError(f"{source} was not saved by a training run: it does not record {', '.join(sorted(missing))}")
    check_tokenizer(extra, config, tokenizer, source)


def check_config(run: str | os.PathLike, config: Config) -> None:
    """Raise ValueError if the folder `run` has a run that `config` cannot resume, or a converted model.

    The message lists the fields that differ. Some fields may differ, such as the paths of the data. A folder without
    config.json passes.
    """
    if not (Path(run) / "config.json").exists():
        return
    if _is_model(run):
        raise ValueError(f"{run} holds a converted model; train in another --run folder with --init-from {run}")
    before, free = read_config(run), [*_FREE, *(f"{place}:" for place in PATH_FIELDS)]
    if {"byte", "words"} & {before.data.tokenizer, config.data.tokenizer}:
        free.remove("data.tokenizer:")
    changed = [d for d in before.diff(config) if not d.startswith(tuple(free))]
    if not (config.optim.decay_tokens or config.optim.schedule == "cosine"):
        # Without a decay, no step depends on the length of the run.
        changed = [d for d in changed if not d.startswith("train.steps")]
    if changed:
        raise ValueError(f"{run} is a run of another config ({'; '.join(changed)}); choose another --run folder")


def write_config(
    run: str | os.PathLike, config: Config, tokenizer: Tokenizer | None = None, files: Mapping[str, bytes] | None = None
) -> None:
    """Create a run folder, and write the files of the tokenizer, other files and config.json into it.

    `files` is {name: content}; None: the labels that the config names, if there are any. Each file is written
    completely or not at all. Paths in the config become absolute, so that the run can be read from any working folder.
    """
    folder, labels = Path(run), config.data.labels
    if files is None:
        files = {LABELS_FILE: Path(labels).read_bytes()} if labels is not None and Path(labels).exists() else {}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(folder / name, content)
    if tokenizer is not None:
        tokenizer.save(folder)
    places = {place: attrgetter(place)(config) for place in PATH_FIELDS}
    places = {place: str(Path(path).absolute()) for place, path in places.items() if path not in _NO_PATHS}
    write_file(folder / "config.json", config.replace(places).to_json())


def _is_model(folder: str | os.PathLike) -> bool:
    return hugging_face.is_folder(Path(folder)) or (Path(folder) / MODEL_FILE).exists()


def model_leaves(folder: str | os.PathLike, model: ModelConfig) -> dict[str, Lazy] | None:
    """Return {name: leaf} of the parameters in a Hugging Face folder or a folder of one model.

    Return None for a run with checkpoints. A leaf is read when it is used. Raise ValueError if the names or shapes
    are not the names or shapes of a model with this config.
    """
    if not _is_model(folder):
        return None
    path = Path(folder)
    theirs = hugging_face.is_folder(path)
    leaves = hugging_face.read(path, model) if theirs else open_safetensors(path / MODEL_FILE)
    expected = named_leaves(jax.eval_shape(lambda: family_of(model).init(model, jax.random.key(0))))
    hugging_face.check(leaves, {name: leaf.shape for name, leaf in expected.items()}, str(folder))
    return leaves


def results_folder(run: Path) -> Path | None:
    """Return `run`, the folder of a run, if results such as a table may be written into it; otherwise None.

    For a Hugging Face folder, and for a folder that cannot be written, print a message and return None.
    """
    if hugging_face.is_folder(run):
        reason = "is in the Hugging Face layout"
    elif not os.access(run, os.W_OK):
        reason = "cannot be written"
    else:
        return run
    say_error(f"{printable(run)} {reason}: nothing is written into it; --plot PNG writes the picture elsewhere")
    return None


def with_shardings(mesh: Mesh | None, abstract):
    """Return a pytree of parameters, as ShapeDtypeStructs, with shardings on the mesh; unchanged without a mesh."""
    if mesh is None:
        return abstract
    places = shardings(mesh, abstract)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, places)


def load(
    run: str | os.PathLike, *, step: int | None = None, changes: dict | None = None, mesh: Mesh | None = None
) -> Loaded:
    """Load the model in a run folder or a Hugging Face folder.

    From a run with checkpoints, load the newest intact checkpoint, or the checkpoint of `step`.

    Args:
      run: the folder of a run, a folder in the Hugging Face layout, or a folder from `stickjax.convert`.
      step: the step of the checkpoint; only a run has several checkpoints.
      changes: config fields to change, such as {"model.window": 128}; the parameters must stay the same.
      mesh: the devices that get the parameters; it may differ from the mesh in training. None: the first device.

    Raises:
      ValueError: there is no run folder or no checkpoint. The parameters have another shape, are not finite or do not
        fit into the free memory. A Hugging Face folder is damaged, or its model is not supported.
    """
    config = read_config(run).replace(changes or {})
    shapes = jax.eval_shape(lambda: family_of(config.model).init(config.model, jax.random.key(0)))
    abstract = with_shardings(mesh, shapes)
    check_fits({"parameters": local_bytes(abstract)}, mesh)
    if (leaves := model_leaves(run, config.model)) is not None:
        if step is not None:
            raise ValueError(
                f"{run} has no checkpoint of step {step}: it holds one model, without steps; leave out the step"
            )
        arrays = [_on_devices(leaves[name], spec) for name, spec in named_leaves(abstract).items()]
        params = jax.tree.structure(abstract).unflatten(arrays)
        check_finite(params, str(run))
        return Loaded(params, config, tokenizer_of(config), 0)
    restored = Checkpoints(run).restore(abstract, step=step, prefix="params")
    if restored is None:
        raise ValueError(f"{run} has no checkpoint yet")
    check_finite(restored.state, f"{run}, checkpoint of step {restored.step}")
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eot)
    check_tokenizer(restored.extra, config, tokenizer, f"{run}@{restored.step}")
    return Loaded(restored.state, config, tokenizer, restored.step)


def tokenizer_of(config: Config) -> Tokenizer | None:
    """Load the tokenizer of a config. Return None if its file does not exist, as for some converted models."""
    name = config.data.tokenizer
    return load_tokenizer(name, config.data.eot) if name == "byte" or Path(name).exists() else None


def _on_devices(leaf: Lazy, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """Read an array, convert it to the type of `spec`, and place it on the devices by the sharding of `spec`."""
    host = leaf.read(None).astype(spec.dtype, copy=False)
    sharding = spec.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.make_array_from_callback(spec.shape, sharding, lambda index: host[index])


def save(run: str | os.PathLike, model: Transformer, config: Config) -> None:
    """Write the parameters of a model and its config as a new folder, which `load` and --init-from can read.

    Raises:
      ValueError: the folder exists, or the parameters do not have the shapes of `config.model`.
      OSError: the folder could not be written.
    """
    ours = named_leaves(jax.eval_shape(lambda: family_of(config.model).init(config.model, jax.random.key(0))))
    theirs = named_leaves(model)
    if wrong := [n for n in ours.keys() | theirs.keys() if _shape(ours.get(n)) != _shape(theirs.get(n))]:
        raise ValueError(f"the parameters of the model are not as its config says: {', '.join(sorted(wrong))}")
    with complete_folder(run) as folder:
        write_config(folder, config, tokenizer_of(config))
        write_safetensors(folder / MODEL_FILE, in_memory(model))


def _shape(leaf) -> tuple | None:
    return None if leaf is None else (leaf.shape, leaf.dtype)


def in_memory(params: Transformer) -> dict[str, Lazy]:
    """Return {name: leaf} of a model in memory. The leaves are `Lazy` arrays, as from a file."""

    def leaf(array) -> Lazy:
        return Lazy(array.shape, array.dtype, lambda i: np.asarray(array if i is None else array[i]))

    return {name: leaf(array) for name, array in named_leaves(params).items()}
