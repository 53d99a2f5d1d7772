"""Read and write run folders, which have config.json, metrics.jsonl and checkpoints. Nothing in them is executed.

Two other kinds of folders can be read like a run folder: a Hugging Face folder, and a folder of one model, which `save`
or `stickjax.convert` writes. A folder of one model has config.json, and model.safetensors instead of checkpoints. A
safetensors file can be written piece by piece. Orbax, which writes checkpoints, needs a whole array in memory.
"""

import contextlib
import os
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from stickjax.config import Config
from stickjax.config.command import say_error
from stickjax.config.command_line import read_json
from stickjax.config.decoder import ModelConfig
from stickjax.config.mixture import Part
from stickjax.data.labelled import LABELS_FILE, read_labels
from stickjax.data.tokenizer import WORDS_FILE, Tokenizer, load_tokenizer
from stickjax.models.families import family_of
from stickjax.models.parameters import shardings
from stickjax.models.transformer import Transformer
from stickjax.models.universal import LanguageModel, PairClassifier
from stickjax.parallel.mesh import mesh_for_evaluation
from stickjax.storage import hugging_face
from stickjax.storage.checkpoints import Checkpoints, check_finite, named_leaves
from stickjax.storage.hub import local_folder
from stickjax.storage.hugging_face.files import Lazy, open_safetensors, write_safetensors
from stickjax.system.compiled import AUTO, keep_compiled
from stickjax.system.disk import write_file, writing
from stickjax.system.lock import complete_folder
from stickjax.system.memory import check_fits, local_bytes
from stickjax.system.text import printable

MODEL_FILE = "model.safetensors"  # the file with the parameters in a folder of one model, which has no checkpoints
# Fields that hold paths. A checkpoint records hashes of the files, and of the weights of a mixture, so the paths may
# change.
PATH_FIELDS = (
    "data.path", "data.mixture", "data.heldout_path", "data.labels", "data.tokenizer", "data.cache",
    "train.compilation_cache",
)  # fmt: skip
# Values of these fields that are not paths.
_NO_PATHS = {"data.tokenizer": ("byte", "words"), "train.compilation_cache": (AUTO,)}
# Fields that may change when a run is resumed: they change neither the state nor the results of a step.
_FREE = (
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.max_bad_steps",
    "train.eval_every",
    "train.track",
    "model.implementation",
    "mesh.",
)


class Loaded(NamedTuple):
    """A trained model with its config and tokenizer: the result of `load`.

    `model`: the trained model. Call a decoder as `model(tokens).logits`. Call a model of another family
      as `model(batch).logits`, with a dictionary of arrays, such as {"tokens": tokens}.
    `config`: the config in the folder, with the `changes` that were passed to `load`.
    `tokenizer`: the tokenizer of the model; None if the model was converted from a folder without a tokenizer.
    `step`: the training step of the checkpoint; 0 if the folder has one model without checkpoints.
    """

    model: Transformer | LanguageModel | PairClassifier
    config: Config
    tokenizer: Tokenizer | None
    step: int


def read_config(run: str | os.PathLike) -> Config:
    """Return the config in a run folder, or a config for the model in a Hugging Face folder.

    If a run folder has a tokenizer.json or a words.json, `data.tokenizer` of the result is the path of this file. If it
    has a labels.json, `data.labels` is the path of this file. Raise ValueError if the folder has no config.json, or if
    config.json cannot be read.
    """
    path = Path(run) / "config.json"
    if not path.exists():
        reason = "it has no config.json" if Path(run).exists() else "it does not exist"
        raise ValueError(f"{run} is not a run folder: {reason}")
    if hugging_face.is_folder(Path(run)):
        return hugging_face.read_config(Path(run))
    # Use the copies in the run folder: unlike the recorded paths, they are still there after the folder was moved.
    return read_json(path).replace(_own_files(run))


def _own_files(run: str | os.PathLike) -> dict[str, str]:
    """Return the paths of the tokenizer file and of the labels file in a run folder.

    The result is {"data.tokenizer": path, "data.labels": path}. An entry is left out if its file does not exist.
    """
    folder = Path(run)
    files = {"data.tokenizer": "tokenizer.json", "data.labels": LABELS_FILE}
    if not (folder / "tokenizer.json").exists():
        files["data.tokenizer"] = WORDS_FILE
    return {place: str(folder / name) for place, name in files.items() if (folder / name).exists()}


def with_own_files(run: str | os.PathLike, config: Config) -> Config:
    """Return a copy of `config` in which `data.tokenizer` and `data.labels` are the files in the run folder `run`.

    A field stays unchanged if the run folder has no file for it, or if the config uses no such file: for example, the
    byte tokenizer has no file. Raise ValueError if the config names a tokenizer file or a labels file whose content
    differs from the file in the run folder.
    """
    changes = {}
    for place, own in _own_files(run).items():
        given = attrgetter(place)(config)
        if place == "data.labels" and config.data.source != "labelled":
            continue
        if given == "byte" or (given == "words" and Path(own).name != WORDS_FILE):
            continue  # `check_config` says that the run has another tokenizer
        if (
            given not in (None, *_NO_PATHS["data.tokenizer"])
            and Path(given).exists()
            and _content(place, given, config) != _content(place, own, config)
        ):
            what = "the tokenizer" if place == "data.tokenizer" else "the labels"
            both = f"{place}={given!r} differs from {own}, {what} of {run}"
            raise ValueError(f"{both}; use the file in the run folder, or another run folder")
        changes[place] = own
    return config.replace(changes)


def _content(place: str, path: str, config: Config):
    """Return a value by which two tokenizer files, or two labels files, can be compared.

    `place` is the config field of the file at `path`: "data.tokenizer" or "data.labels". For a tokenizer file, the
    value is the name of the tokenizer, which contains a hash. For a labels file, it is the tuple of the labels.
    """
    return load_tokenizer(path, config.data.eot).name if place == "data.tokenizer" else read_labels(path)


def check_tokenizer(extra: dict, config: Config, tokenizer: Tokenizer | None, source: str) -> None:
    """Raise ValueError if a model was trained with another tokenizer than `tokenizer`.

    `extra` is the dictionary in the model's checkpoint: extra["tokenizer"] is the name of the tokenizer of the
    training. If this entry is missing, or if `tokenizer` is None, nothing is checked. Only the message uses `config`
    and `source`, the name of the checkpoint.
    """
    recorded = extra.get("tokenizer")
    # Runs of older versions did not record "+prefix" (see `HuggingFaceTokenizer`).
    if recorded and tokenizer and recorded not in (tokenizer.name, tokenizer.name.partition("+")[0]):
        where = f"data.tokenizer={config.data.tokenizer!r}"
        raise ValueError(
            f"{where} is the tokenizer {tokenizer.name}, but {source} was trained with {recorded}; set data.tokenizer "
            "to the tokenizer of the training"
        )


def check_trained(extra: dict, config: Config, tokenizer: Tokenizer | None, source: str) -> None:
    """Raise ValueError if training cannot continue from a checkpoint.

    Two things are checked: a training run has saved the checkpoint, and the model was trained with `tokenizer`. `extra`
    is the dictionary in the checkpoint. Only the message uses `config` and `source`, the name of the checkpoint.
    """
    if missing := {"config", "corpus", "data"} - extra.keys():
        raise ValueError(
            f"training cannot continue from {source}: it is not a checkpoint of a training run, because the "
            f"dictionary `extra` in it has no {' and no '.join(map(repr, sorted(missing)))}"
        )
    check_tokenizer(extra, config, tokenizer, source)


def check_config(run: str | os.PathLike, config: Config) -> None:
    """Raise ValueError if training with `config` cannot begin or continue in the folder `run`.

    Training can begin if the folder has no config.json. It can continue if config.json and `config` agree in all fields
    that change the training. (A path does not change it.) If they do not agree, the message lists the fields that
    differ. Training cannot continue in a folder that has one model and no checkpoints (see `model_leaves`).
    """
    if not (Path(run) / "config.json").exists():
        return
    if _is_model(run):
        raise ValueError(
            f"{run} holds one model, without checkpoints; train in another --run folder with --init-from {run}"
        )
    before, free = read_config(run), [*_FREE, *(f"{place}:" for place in PATH_FIELDS)]
    if {"byte", "words"} & {before.data.tokenizer, config.data.tokenizer}:
        free.remove("data.tokenizer:")
    changed = [d for d in before.diff(config) if not d.startswith(tuple(free))]
    if not (config.optim.decay_tokens or config.optim.schedule == "cosine"):
        # Without a decay of the learning rate, no step depends on the length of the run.
        changed = [d for d in changed if not d.startswith("train.steps")]
    if changed:
        raise ValueError(
            f"{run} is a run of another config (the run's value -> your value: {'; '.join(changed)}); "
            "choose another --run folder"
        )


def write_config(
    run: str | os.PathLike, config: Config, tokenizer: Tokenizer | None = None, files: Mapping[str, bytes] | None = None
) -> None:
    """Create the run folder `run`, and write config.json, the files of the tokenizer and other files into it.

    `files` is {name: content} of the other files; None: only the labels file that the config names, if it exists. Each
    file is written completely or not at all. In the written config.json, paths are absolute, so that the run can be
    read from any working directory.
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
    places = {place: _absolute(attrgetter(place)(config), _NO_PATHS.get(place, ())) for place in PATH_FIELDS}
    write_file(folder / "config.json", config.replace(places).to_json())


def _absolute(value: str | tuple[Part, ...] | None, no_paths: tuple[str, ...] = ()) -> str | tuple[Part, ...] | None:
    """Return a copy of `value` with absolute paths. `value` is the value of a config field that has a path.

    PATH_FIELDS lists these fields. The value of `data.mixture` is a tuple of parts, and each part has paths. `no_paths`
    are values of the field that are not paths, such as "byte".
    """
    if isinstance(value, tuple):
        return tuple(part._replace(path=_absolute(part.path)) for part in value)
    return value if value is None or value in no_paths else str(Path(value).absolute())


def _is_model(folder: str | os.PathLike) -> bool:
    return hugging_face.is_folder(Path(folder)) or (Path(folder) / MODEL_FILE).exists()


def model_leaves(folder: str | os.PathLike, model: ModelConfig) -> dict[str, Lazy] | None:
    """Return {name: parameter} of a folder that has one model and no checkpoints. For any other folder, return None.

    A folder of one model is a Hugging Face folder, or a folder that `save` or `stickjax.convert` has written. Each
    parameter is read when it is used. Raise ValueError if the parameters have other names or shapes than in a model
    with the config `model`.
    """
    if not _is_model(folder):
        return None
    path = Path(folder)
    theirs = hugging_face.is_folder(path)
    leaves = hugging_face.read(path, model) if theirs else open_safetensors(path / MODEL_FILE)
    expected = named_leaves(jax.eval_shape(lambda: family_of(model).init(model, jax.random.key(0))))
    hugging_face.check(leaves, {name: leaf.shape for name, leaf in expected.items()}, str(folder))
    return leaves


def results_folder(run: Path, elsewhere: str = "--plot PNG writes the picture elsewhere") -> Path | None:
    """Return the folder into which results, such as a table, may be written: the run folder `run`, or None.

    If `run` is a Hugging Face folder or cannot be written, print a message and return None. The message ends in
    `elsewhere`, which says how to write results into another place.
    """
    if hugging_face.is_folder(run):
        reason = "is a Hugging Face folder"
    elif not os.access(run, os.W_OK):
        reason = "cannot be written"
    else:
        return run
    say_error(f"{printable(run)} {reason}: nothing is written into it; {elsewhere}")
    return None


def with_shardings(mesh: Mesh | None, abstract):
    """Return a copy of `abstract`, a pytree of ShapeDtypeStructs, with the shardings of its arrays on the mesh.

    `abstract` is a model or a whole training state. Without a mesh, return `abstract` itself.
    """
    if mesh is None:
        return abstract
    places = shardings(mesh, abstract)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, places)


def load(
    run: str | os.PathLike,
    *,
    step: int | Literal["best"] | None = None,
    changes: dict | None = None,
    mesh: Mesh | Literal["run"] | None = None,
) -> Loaded:
    """Load a trained model with its config and tokenizer from a run folder, a Hugging Face folder or the hub.

    Args:
      run: a run folder, a Hugging Face folder, a folder that `save` or `stickjax.convert` has written, or the name of a
        model on the Hugging Face hub, such as "org/name" (see `stickjax.storage.hub.local_folder`).
      step: the step of the checkpoint to load; "best": the checkpoint with the best score of the validations during
        the training (`train.eval_every`); None: the newest intact checkpoint. Only a run folder has checkpoints.
      changes: config fields to change, such as {"model.window": 128}. The shapes of the parameters must not change.
      mesh: the mesh of devices on which the parameters are placed; it may differ from the mesh of the training. "run":
        the mesh of the config, with the `changes` (see `stickjax.parallel.mesh.mesh_for_evaluation`). None: the first
        device. Every device reads its own part of a parameter; no device ever holds more.

    Raises:
      ValueError: `run` is not such a folder, or has no intact checkpoint (of this `step`). The parameters are not
        finite, do not have the shapes that the config says, or do not fit into the free memory. A Hugging Face folder
        is damaged, or its model is not supported.
    """
    run = local_folder(run)
    config = read_config(run).replace(changes or {})
    with contextlib.suppress(ValueError):  # the config may name a folder of another machine
        keep_compiled(config.train.compilation_cache)
    mesh = mesh_for_evaluation(config, changes or ()) if mesh == "run" else mesh
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
    if step == "best" and (step := Checkpoints(run).best()) is None:
        raise ValueError(
            f"{run} has no best checkpoint, because none was validated; train with train.eval_every above 0, or leave "
            'out step="best"'
        )
    restored = Checkpoints(run).restore(abstract, step=step, prefix="params")
    if restored is None:
        raise ValueError(f"{run} has no checkpoint yet")
    check_finite(restored.state, f"{run}, checkpoint of step {restored.step}")
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eot)
    check_tokenizer(restored.extra, config, tokenizer, f"{run}@{restored.step}")
    return Loaded(restored.state, config, tokenizer, restored.step)


def tokenizer_of(config: Config) -> Tokenizer | None:
    """Load the tokenizer of a config. Return None if its file does not exist, as for some converted models.

    Raise ValueError if the file has more ids than the V of the model.
    """
    name, V = config.data.tokenizer, config.model.vocabulary
    if name != "byte" and not Path(name).exists():
        return None
    tokenizer = load_tokenizer(name, config.data.eot)
    if name != "byte" and config.model.reads == "text" and tokenizer.vocab_size > V:
        raise ValueError(f"{name} has {tokenizer.vocab_size} ids, but the model has V={V}; use the model's tokenizer")
    return tokenizer


def _on_devices(leaf: Lazy, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """Read an array from its file, and place it on devices, with the type and the sharding of `spec`.

    If several devices need the same part of the array, the part is read only once. A stacked array, whose first axis is
    the axis of layers, is read layer by layer. So the host needs memory for one part and one layer only.
    """

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if not leaf.stacked:
            return leaf.read(None)[index].astype(spec.dtype)
        layers = range(spec.shape[0])[index[0]]
        first = leaf.read(layers[0])[index[1:]]
        found = np.empty((len(layers), *first.shape), spec.dtype)
        found[0] = first
        for place, layer in enumerate(layers[1:], 1):
            found[place] = leaf.read(layer)[index[1:]]
        return found

    sharding = spec.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    devices: dict[tuple[slice, ...], list] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        devices.setdefault(index, []).append(device)
    arrays = []
    for index, owners in devices.items():
        host = part(index)
        arrays += [jax.device_put(host, device) for device in owners]
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)


def save(run: str | os.PathLike, model: Transformer, config: Config) -> None:
    """Write a model, its config and its tokenizer into the new folder `run`, which `load` and --init-from can read.

    Raises:
      ValueError: the folder exists, or the parameters have other names, shapes or types than `config.model` says.
      OSError: the folder could not be written.
    """
    ours = named_leaves(jax.eval_shape(lambda: family_of(config.model).init(config.model, jax.random.key(0))))
    theirs = named_leaves(model)
    if wrong := [n for n in ours.keys() | theirs.keys() if _shape(ours.get(n)) != _shape(theirs.get(n))]:
        raise ValueError(
            f"the model and its config differ in the names, shapes or types of parameters: {', '.join(sorted(wrong))}"
        )
    with complete_folder(run) as folder:
        write_config(folder, config, tokenizer_of(config))
        write_safetensors(folder / MODEL_FILE, in_memory(model))


def _shape(leaf) -> tuple | None:
    return None if leaf is None else (leaf.shape, leaf.dtype)


def in_memory(params: Transformer) -> dict[str, Lazy]:
    """Return the parameters of a model in memory as `Lazy` arrays, {name: array}, for `write_safetensors`."""

    def leaf(array) -> Lazy:
        return Lazy(array.shape, array.dtype, lambda i: np.asarray(array if i is None else array[i]))

    return {name: leaf(array) for name, array in named_leaves(params).items()}
