"""Read, compare and write the config of a run folder, with the files that it names."""

import os
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path

from stickjax.config import Config
from stickjax.config.command_line import read_json
from stickjax.config.mixture import Part
from stickjax.data.labelled import LABELS_FILE, read_labels
from stickjax.data.tokenizer import WORDS_FILE, Tokenizer, load_tokenizer
from stickjax.storage import hugging_face
from stickjax.system.compiled import AUTO
from stickjax.system.disk import write_file, writing

MODEL_FILE = "model.safetensors"  # the file with the parameters in a folder of one model, which has no checkpoints
# Fields that hold paths. A checkpoint records hashes of the files, and of the weights of a mixture, so the paths may
# change.
PATH_FIELDS = ("data.path", "data.mixture", "data.heldout_path", "data.labels", "data.tokenizer", "data.cache")
_NO_PATHS = {"data.tokenizer": ("byte", "words")}  # values of these fields that are not paths
# Fields that may change when a run is resumed: they change neither the state nor the results of a step.
_FREE = (
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.max_bad_steps",
    "train.eval_every",
    "train.track",
    "train.compilation_cache",
    "model.implementation",
    "mesh.",
)


def read_config(run: str | os.PathLike) -> Config:
    """Return the config in a run folder, or a config for the model in a Hugging Face folder.

    If a run folder has a tokenizer.json or a words.json, `data.tokenizer` of the result is the path of this file. If it
    has a labels.json, `data.labels` is the path of this file. Raise ValueError if the folder has no config.json, or if
    config.json cannot be read.
    """
    path = Path(run) / "config.json"
    if not path.exists():
        reason = "it has no config.json" if Path(run).exists() else "it does not exist"
        raise ValueError(
            f"{run} is neither a run folder, a Hugging Face folder, nor a model on the hub (org/name): {reason}"
        )
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


def check_config(run: str | os.PathLike, config: Config) -> None:
    """Raise ValueError if training with `config` cannot begin or continue in the folder `run`.

    Training can begin if the folder has no config.json. It can continue if config.json and `config` agree in all fields
    that change the training. (A path does not change it.) If they do not agree, the message lists the fields that
    differ. Training cannot continue in a folder that has one model and no checkpoints (see `model_leaves`).
    """
    if not (Path(run) / "config.json").exists():
        return
    if is_model(run):
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
    places["train.compilation_cache"] = AUTO  # programs in this folder are executed, so a stored config names none
    write_file(folder / "config.json", config.replace(places).to_json())


def _absolute(value: str | tuple[Part, ...] | None, no_paths: tuple[str, ...] = ()) -> str | tuple[Part, ...] | None:
    """Return a copy of `value` with absolute paths. `value` is the value of a config field that has a path.

    PATH_FIELDS lists these fields. The value of `data.mixture` is a tuple of parts, and each part has paths. `no_paths`
    are values of the field that are not paths, such as "byte".
    """
    if isinstance(value, tuple):
        return tuple(part._replace(path=_absolute(part.path)) for part in value)
    return value if value is None or value in no_paths else str(Path(value).absolute())


def is_model(folder: str | os.PathLike) -> bool:
    """Return whether a folder has one model without checkpoints: a Hugging Face folder, or a folder with MODEL_FILE."""
    return hugging_face.is_folder(Path(folder)) or (Path(folder) / MODEL_FILE).exists()
