"""Find special tokens, such as the end of text: their ids are in files next to a tokenizer.json, in the same folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stickjax.system.disk import write_file

GENERATION = "generation_config.json"
# A file in a run folder. It keeps the ids from the config.json of the Hugging Face folder: our config.json has no ids.
TOKEN_IDS = "token_ids.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Files that belong to a tokenizer.json. The first of them that names an end of text decides.
FILES = (
    GENERATION, TOKEN_IDS, TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Named(NamedTuple):
    """The ids of the special tokens that the files in a tokenizer's folder name. The function `named` returns it."""

    ends: tuple[int, ...]  # each of these ids ends a generated text; the first also ends a document in training
    special: frozenset[int]  # the ids of all added tokens that a file names as special tokens, for any purpose
    problem: str = ""  # a message, if a file names an end of text that the tokenizer does not have


def read_object(content: bytes, where: str | Path) -> dict[str, Any]:
    """Parse bytes that are a JSON object, and return it as a dictionary. A byte order mark is allowed.

    Raise ValueError for anything else; the message begins with `where`, such as the path of the file.

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

    These are the files in `FILES` that exist. A Hugging Face config.json also has ids of special tokens: they are
    returned as the content of a file with the name TOKEN_IDS. Raise ValueError if a file cannot be read.
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
    """Return a copy of `files` in which the entries for the end of text have the ids `ends`, or the text `text`.

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
        # If there is no GENERATION file, other programs read the ids for generation from config.json.
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

    Raises ValueError if a file is not a JSON object, or if an entry is neither an id nor a token.

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
                # An ordinary token may end a generated text, but not a document.
                ends = tuple(sorted(found, key=lambda i: i not in added.values()))
            else:
                wrong = f"{folder / name} says {key}={tree[key]!r}, which is no added token of tokenizer.json"
                problem = problem or wrong
    return Named(ends, frozenset(special & set(added.values())), "" if ends else problem)


def _ids(key: str, value: Any, added: Mapping[str, int], where: Path) -> list[int]:
    """Return the token ids that an entry of a JSON file stands for.

    Negative ids, and texts of tokens that are not in `added`, are left out.

    Args:
      key: the name of the entry, such as "eos_token_id".
      value: the value of the entry: a token id if `key` ends in "_id", otherwise the text of a token or an object
        {"content": text}. It may also be a list of these, or None. For the key "added_tokens_decoder", it is a
        dictionary of objects {"content": text, "special": bool}; only those with a true "special" are used.
      added: {text: id} of the added tokens.
      where: the path of the file, for messages.

    Raises ValueError for any other value.
    """
    if value is None:
        return []
    if key == "added_tokens_decoder":  # {id: {"content": text, "special": whether}}
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
