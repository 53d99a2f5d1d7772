"""Read and write run folders, which have config.json, metrics.jsonl and checkpoints. Nothing in them is executed.

Two other kinds of folders can be read like a run folder: a Hugging Face folder, and a folder of one model, which `save`
or `stickjax.convert` writes. A folder of one model has config.json, and model.safetensors instead of checkpoints. A
safetensors file can be written piece by piece. Orbax, which writes checkpoints, needs a whole array in memory.
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from stickjax.config import Config
from stickjax.config.command import say_error
from stickjax.config.decoder import ModelConfig
from stickjax.data.tokenizer import Tokenizer, load_tokenizer
from stickjax.models.families import family_of
from stickjax.models.parameters import shardings
from stickjax.models.transformer import Transformer
from stickjax.models.universal import LanguageModel, PairClassifier
from stickjax.parallel.mesh import mesh_for_evaluation
from stickjax.storage import hugging_face
from stickjax.storage.checkpoints import Checkpoints, check_finite, named_leaves
from stickjax.storage.hub import local_folder
from stickjax.storage.hugging_face.files import Lazy, open_safetensors, write_safetensors
from stickjax.storage.run_config import MODEL_FILE, is_model, read_config, write_config
from stickjax.system.compiled import AUTO, keep_compiled
from stickjax.system.lock import complete_folder
from stickjax.system.memory import check_fits, local_bytes
from stickjax.system.text import printable


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


def model_leaves(folder: str | os.PathLike, model: ModelConfig) -> dict[str, Lazy] | None:
    """Return {name: parameter} of a folder that has one model and no checkpoints. For any other folder, return None.

    A folder of one model is a Hugging Face folder, or a folder that `save` or `stickjax.convert` has written. Each
    parameter is read when it is used. Raise ValueError if the parameters have other names or shapes than in a model
    with the config `model`.
    """
    if not is_model(folder):
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
    keep_compiled(config.train.compilation_cache if "train.compilation_cache" in (changes or {}) else AUTO)
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
