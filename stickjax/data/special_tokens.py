"""Find the ids of special tokens, such as the end of text, in the files beside a tokenizer.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stickjax.system.disk import write_file

GENERATION = "generation_config.json"
# A file in a run folder, with the ids from the config.json of a Hugging Face folder. The config.json of a run has none.
TOKEN_IDS = "token_ids.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Files that may lie beside a tokenizer.json. If several of them name an end of text, the first in this order counts.
FILES = (
    GENERATION, TOKEN_IDS, TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Named(NamedTuple):
    """The ids of the special tokens that the files in a tokenizer's folder name: the result of the function `named`.

    `ends`: each of these ids ends a generated text. The first of them also ends a document in training.
    `special`: the ids of all added tokens that a file names as special tokens, for any purpose. Added tokens are the
      tokens in the list "added_tokens" of the tokenizer.json.
    `problem`: an error message if the files name at least one end of text, but none of these is an added token.
      Otherwise "".
    """

    ends: tuple[int, ...]
    special: frozenset[int]
    problem: str = ""


def read_object(content: bytes, where: str | Path) -> dict[str, Any]:
    """Parse bytes that are a JSON object, and return it as a dictionary. A byte order mark is allowed.

    Raises ValueError for other bytes. The message begins with `where`, such as the path of the file.

    >>> read_object(b'{"eos_token_id": 5}', "config.json")
    {'eos_token_id': 5}
    """
    try:
        tree = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{where} must be a JSON object, not a {type(tree).__name__}")
    return tree


def read_files(folder: Path) -> dict[str, bytes]:
    """Read the files of a tokenizer's folder that may name special tokens, and return {name of the file: content}.

    The result has the files in `FILES` that exist. If the folder has the config.json of a Hugging Face model, the
    result also has an entry TOKEN_IDS: the ids of special tokens in this config.json, as JSON. This entry replaces a
    file with the name TOKEN_IDS.

    Raises ValueError if a file cannot be read.
    """
    files = {}
    for name in (*FILES, "config.json"):
        try:
            content = (folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"cannot read {folder / name}: {error.strerror}") from error
        if name != "config.json":
            files[name] = content
        elif b'"model_type"' in content:  # otherwise it is not the config of a Hugging Face model
            tree = read_object(content, folder / name)
            files[TOKEN_IDS] = json.dumps({key: tree[key] for key in _IDS if key in tree}).encode()
    return files


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write `files`, {name of the file: content}, into a folder. Each file is written completely or not at all."""
    for name, content in files.items():
        write_file(folder / name, content)


def with_end(files: Mapping[str, bytes], ends: Sequence[int], text: str, folder: Path) -> dict[str, bytes]:
    """Return a copy of `files` that names another end of text.

    The entry "eos_token_id" of generation_config.json and of the file TOKEN_IDS gets the ids `ends`. The entry
    "eos_token" of tokenizer_config.json gets the text `text`. A missing file is added, except generation_config.json.

    Args:
      files: {name of the file: content}, the result of `read_files(folder)`.
      ends: the ids that end a generated text. The first of them also ends a document in training.
      text: the text of the token whose id is ends[0].
      folder: the folder of the files, for messages.
    """
    ids = ends[0] if len(ends) == 1 else list(ends)
    changed = dict(files)
    for name, key, value in (
        (GENERATION, "eos_token_id", ids), (TOKEN_IDS, "eos_token_id", ids), (TOKENIZER_CONFIG, "eos_token", text),
    ):  # fmt: skip
        # A missing GENERATION file is not created: without it, other programs read these ids from config.json.
        if name != GENERATION or name in files:
            tree = read_object(files.get(name, b"{}"), folder / name)
            changed[name] = (json.dumps(tree | {key: value}, indent=2) + "\n").encode()
    return changed


def named(files: Mapping[str, bytes], added: Mapping[str, int], folder: Path) -> Named:
    """Return the ids of the special tokens that are named in the files of a tokenizer's folder.

    Args:
      files: {name of the file: content}, the result of `read_files(folder)`. If several files name ends of text, the
        first file in the order of `FILES` decides.
      added: {text: id} of the added tokens in the tokenizer.json of the folder.
      folder: the folder of the files, for messages.

    Raises ValueError if a file is not a JSON object, or if the value of an entry for a special token is neither a token
    id nor the text of a token.

    >>> named({"generation_config.json": b'{"eos_token_id": [5, 6]}'}, {"<|end|>": 5}, Path("folder"))
    Named(ends=(5, 6), special=frozenset({5}), problem='')
    """
    ends: tuple[int, ...] = ()
    special: set[int] = set()
    problem = ""
    for name in FILES:
        if name not in files or not name.endswith(".json"):
            continue
        tree = read_object(files[name], folder / name)
        for key in (*_IDS, *_TOKENS, "additional_special_tokens", "added_tokens_decoder"):
            found = _ids(key, tree.get(key), added, folder / name)
            special.update(found)
            if not key.startswith("eos") or tree.get(key) in (None, "", -1) or ends:
                continue
            if set(found) & set(added.values()):
                # Added tokens come first: an ordinary token may end a generated text, but not a document.
                ends = tuple(sorted(found, key=lambda i: i not in added.values()))
            else:
                wrong = f"{folder / name} says {key}={tree[key]!r}, which is not an added token of tokenizer.json"
                problem = problem or wrong
    return Named(ends, frozenset(special & set(added.values())), "" if ends else problem)


def token_texts(files: Mapping[str, bytes], folder: Path) -> dict[str, str]:
    """Return the texts of the special tokens that the files in a tokenizer's folder name: {"bos_token": text, ...}.

    An entry of tokenizer_config.json replaces an entry of special_tokens_map.json. `files` and `folder` are as in
    `named`. The token "bos_token" is not always put in front of a text (see `prefix_of`).

    >>> token_texts({"tokenizer_config.json": b'{"bos_token": {"content": "<s>"}}'}, Path("folder"))
    {'bos_token': '<s>'}
    """
    found = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        for key, entry in read_object(files.get(name, b"{}"), folder / name).items():
            text = entry.get("content") if isinstance(entry, dict) else entry
            if key in _TOKENS and isinstance(text, str):
                found[key] = text
    return found


def prefix_of(own: tuple[int, ...], files: Mapping[str, bytes], added: Mapping[str, int], folder: Path) -> tuple:
    """Return the ids that a tokenizer puts in front of every text.

    If tokenizer_config.json has the entry "add_bos_token", this entry decides: true means the id of "bos_token" alone,
    and false means no id. Without this entry, the result is `own`.

    Args:
      own: the ids that the tokenizer.json puts in front.
      files, added, folder: as in `named`.

    >>> prefix_of((), {"tokenizer_config.json": b'{"add_bos_token": true, "bos_token": "<s>"}'}, {"<s>": 1}, Path())
    (1,)
    """
    tree = read_object(files.get(TOKENIZER_CONFIG, b"{}"), folder / TOKENIZER_CONFIG)
    if not isinstance(adds := tree.get("add_bos_token"), bool):
        return own
    return tuple(_ids("bos_token", tree.get("bos_token"), added, folder / TOKENIZER_CONFIG)) if adds else ()


def _ids(key: str, value: Any, added: Mapping[str, int], where: Path) -> list[int]:
    """Return the token ids that an entry of a JSON file stands for.

    Negative ids, and texts of tokens that are not in `added`, are left out.

    Args:
      key: the name of the entry, such as "eos_token_id".
      value: the value of the entry: a token id if `key` ends in "_id", otherwise the text of a token or an object
        {"content": text}. It may also be a list of such values, or None. For the key "added_tokens_decoder", it is a
        dictionary {id: {"content": text, "special": bool}}. Only the entries whose "special" is true count. The id of
        such a token is `added[text]`; the keys of the dictionary are not used.
      added: {text: id} of the added tokens.
      where: the path of the file, for messages.

    Raises ValueError for any other value.
    """
    if value is None:
        return []
    if key == "added_tokens_decoder":
        entries = value.values() if isinstance(value, dict) else [value]
        value = [entry for entry in entries if not isinstance(entry, dict) or entry.get("special")]
    ids = []
    for entry in value if isinstance(value, list) else [value]:
        text = entry.get("content") if isinstance(entry, dict) else entry
        if key.endswith("_id") and type(entry) is int:
            ids += [entry] if entry >= 0 else []  # -1 means no token
        elif isinstance(text, str) and not key.endswith("_id"):
            ids += [added[text]] if text in added else []
        else:
            raise ValueError(
                f"{where}: {key}={entry!r} is not {'a token id' if key.endswith('_id') else 'the text of a token'}"
            )
    return ids
