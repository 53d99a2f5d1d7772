"""Models on the Hugging Face hub: download the folder of a model, or upload a folder.

The optional package huggingface_hub does both. It keeps downloaded files in a cache on this machine. It reads only this
cache if there is no network, or if HF_HUB_OFFLINE=1 is set. No code from the hub is downloaded or run.
"""

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stickjax.data import special_tokens
from stickjax.system.lock import complete_folder

_PARAMETERS = "*.safetensors"
# The files of a model that are read and written. Other files, such as pickles and code, are never downloaded.
FILES = (_PARAMETERS, "*.json", "*.txt", "*.jinja")
# The files of an older version that a push deletes, if the new version does not have them.
_REPLACED = ["model*.safetensors", "model.safetensors.index.json", "tokenizer.json", *special_tokens.FILES]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def local_folder(run: str | os.PathLike) -> str | os.PathLike:
    """Return the folder of a model. The argument is a folder, or the name of a model on the hub, such as "org/name".

    A folder is returned unchanged, and a `pathlib.Path` is always a folder. The text "org/name" is the name of a model
    on the hub only if there is no file or folder "org" in the current folder. The model is downloaded into the cache,
    unless the cache has its newest version. In the same process, later calls return the same folder.

    Raises:
      ValueError: the hub has no such model; access to it must be granted first; the hub cannot be reached, and the
        cache does not have the model; the model has no safetensors files; or the package huggingface_hub is missing.

    >>> local_folder("runs"), local_folder("../runs/tiny")
    ('runs', '../runs/tiny')
    """
    if not isinstance(run, str) or not _NAME.fullmatch(run) or Path(run).parent.exists():
        return run
    return _downloaded(run)


@functools.cache
def _downloaded(name: str) -> str:
    hub = _package(f"{name} is not a folder; to load a model of this name from the Hugging Face hub")
    with _in_one_line(name, "cannot be downloaded from"):
        # "*/*": subfolders are left out, because they have copies in other formats.
        folder = hub.snapshot_download(name, allow_patterns=list(FILES), ignore_patterns=["*/*"])
    if not any(Path(folder).glob(_PARAMETERS)):
        raise ValueError(
            f"{name} has no safetensors files on the Hugging Face hub (or in the local cache, if there is no network); "
            "other formats are not downloaded"
        )
    return folder


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, push: bool) -> Iterator[Path]:
    """A context for a block that writes the folder `path` or, with `push`, a model on the hub.

    The context yields a temporary folder. If the block succeeds, this folder becomes `path` (see `complete_folder`).
    With `push`, the temporary folder is uploaded in one commit instead, as the model with the name `path`. If the hub
    has no such model, a private one is created. If the hub has the model, its parameters, tokenizer and config are
    replaced, and its other files stay.

    Raises:
      ValueError: `path` exists; or, with `push`, it is not a name such as "org/name", nobody is logged in, the upload
        fails, or the package huggingface_hub is missing.
    """
    if not push:
        with complete_folder(path) as folder:
            yield folder
        return
    name = os.fspath(path)
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a model on the Hugging Face hub, such as org/name")
    hub = _package(f"to push {name}")
    if hub.get_token() is None:
        raise ValueError(f"to push {name}, log in to the Hugging Face hub first: hf auth login")
    with tempfile.TemporaryDirectory(prefix="stickjax-push-") as temporary:
        yield Path(temporary)
        with _in_one_line(name, "cannot be pushed to"):
            hub.create_repo(name, private=True, exist_ok=True)
            hub.upload_folder(
                repo_id=name, folder_path=temporary, delete_patterns=_REPLACED, commit_message="Export from stickjax"
            )


def _package(purpose: str):
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"{purpose}, install the package huggingface_hub: pip install 'stickjax[hf]'") from error
    return huggingface_hub


@contextlib.contextmanager
def _in_one_line(name: str, fails: str) -> Iterator[None]:
    """A context in which every error of huggingface_hub becomes a ValueError of one line about the model `name`.

    `fails` is a part of the message, such as "cannot be pushed to".
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: ask for access on its page on the Hugging Face hub, then log in: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{name} is neither a folder nor a model on the Hugging Face hub; if it is private, log in: hf auth login"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name} is not a folder, the Hugging Face hub cannot be reached (no network, or HF_HUB_OFFLINE is set), "
            "and the local cache does not have the whole model"
        ) from error
    except Exception as error:  # the network has many classes of errors, and the disk may be full
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} {fails} the Hugging Face hub: {type(error).__name__}{reason and f': {reason}'}"
        ) from error
