"""Token files: tokenized texts on disk, which may be larger than the memory of the machine.

A token file OUT consists of two files. OUT.bin has the token ids of the text. OUT.json has the name of the tokenizer,
the number of token ids, and the sha256 of OUT.bin.
"""

import functools
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

import numpy as np

from stickjax.data.encoding import encode_documents, with_progress
from stickjax.data.sources import TOKENS_FORMAT, NotText, read_text, text_documents
from stickjax.data.tokenizer import Tokenizer, load_tokenizer, token_dtype
from stickjax.system.disk import REASONS
from stickjax.system.text import printable

log = logging.getLogger(__name__)

_BLOCK = 2**22  # number of token ids, at the start and at the end of a file, that are compared with vocab_size
_VERIFIED = 2**30  # bytes; the sha256 of a file up to this size is checked when the file is opened (about two seconds)
_TYPES = dict(
    num_documents=int, num_tokens=int, num_bytes=int, dtype=str, vocab_size=int, eot=int, tokenizer=str, sha256=str
)


def token_paths(path: str) -> tuple[Path, Path]:
    """Return the two paths OUT.bin and OUT.json of a token file. `path` is OUT, OUT.bin or OUT.json.

    Raises ValueError if `path` has no file name.
    """
    stem = Path(path).with_suffix("") if Path(path).suffix in (".bin", ".json") else Path(path)
    if not stem.name:
        raise ValueError(f"{path!r} is not the path of a token file; give a path such as folder/name")
    return stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".json")


def tokenize(source: str, out: str, tokenizer: str = "byte", text_field: str = "text", eot: str | None = None) -> dict:
    """Convert a text to a token file, which consists of out.bin and out.json. Return the content of out.json.

    Only one batch of documents is in memory: about two million characters, or one longer document. The progress
    is shown (see `with_progress`). Both files are written under temporary names, and are renamed when they are
    complete. The .json file is renamed last.

    Args:
      source: a text file, a .jsonl, .parquet or .arrow file, or a folder of such files.
      out: the path of the token file, without an ending.
      tokenizer: "byte" or the path of a tokenizer.json.
      text_field: the name of the field in which a JSON object has its text, or of the column of a table.
      eot: the text of the added token that ends a document; None: it is found in the files of the tokenizer.

    A token file with the same path is replaced.

    Raises ValueError if the text or the tokenizer cannot be read, if the folder of `out` does not exist, or if a file
    cannot be written.
    """
    encoder, (data_path, meta_path) = load_tokenizer(tokenizer, eot), token_paths(out)
    if not data_path.parent.is_dir():
        raise ValueError(f"{printable(data_path.parent)} is not a folder; make it first")
    dtype, digest = token_dtype(encoder.vocab_size), hashlib.sha256()
    count = dict(num_documents=0, num_tokens=0, num_bytes=0)
    partial = []
    try:
        with tempfile.NamedTemporaryFile(dir=data_path.parent, prefix=".tokens-", delete=False) as file:
            partial.append(file.name)
            texts = with_progress(text_documents(source, text_field, name="SOURCE"), "tokenize")
            for ids, num_bytes in encode_documents(texts, encoder):
                block = ids.tobytes()
                file.write(block)
                digest.update(block)
                count["num_documents"] += 1
                count["num_tokens"] += len(block) // dtype.itemsize
                count["num_bytes"] += num_bytes
            file.flush()
            os.fsync(file.fileno())
        meta = dict(format=TOKENS_FORMAT, version=1, dtype=dtype.str, vocab_size=encoder.vocab_size)
        meta |= dict(eot=encoder.eot, tokenizer=encoder.name, sha256=digest.hexdigest()) | count
        with tempfile.NamedTemporaryFile("w", dir=data_path.parent, prefix=".tokens-", delete=False) as file:
            partial.append(file.name)
            file.write(json.dumps(meta, indent=2) + "\n")
        meta_path.unlink(missing_ok=True)  # an old .json must never lie beside new tokens
        for temporary, path in zip(partial, (data_path, meta_path), strict=True):
            os.chmod(temporary, 0o644)  # temporary files are readable by their owner only
            os.replace(temporary, path)
    except OSError as error:  # an error of writing; functions that read raise ValueError
        reason = REASONS.get(error.errno, error.strerror)
        raise ValueError(f"cannot write {printable(data_path)}: {reason}") from error
    finally:
        for temporary in partial:
            Path(temporary).unlink(missing_ok=True)
    return meta


def _read_meta(path: str, name: str) -> dict:
    """Return the content of the .json file of a token file. The value of "dtype" is converted to a NumPy dtype.

    `path` is the path of the token file, and `name` is the config field or argument that has this path, for messages.

    Raises ValueError if the .bin or the .json does not exist, if the .json has another format, or if an entry of the
    .json is missing or has a wrong type.
    """
    data_path, meta_path = token_paths(path)
    for file in (data_path, meta_path):
        if not os.path.isfile(file):
            raise ValueError(
                f"{name}={path!r}: there is no {printable(file)}; make it with python -m stickjax.data tokenize"
            )
    try:
        meta = json.loads(read_text(meta_path))
        if (meta["format"], meta["version"]) != (TOKENS_FORMAT, 1):
            raise ValueError(
                f"the format must be {TOKENS_FORMAT!r}, version 1, got {meta['format']!r}, version {meta['version']}"
            )
        for key, kind in _TYPES.items():
            if type(meta[key]) is not kind or (kind is int and meta[key] < 0):
                raise ValueError(
                    f"{key}={meta[key]!r:.80} must be {'a whole number, at least 0' if kind is int else 'a string'}"
                )
        meta["dtype"] = np.dtype(meta["dtype"])
    except KeyError as error:
        raise ValueError(
            f"{name}={path!r}: {meta_path} does not describe a token file: the entry {error} is missing"
        ) from error
    except (ValueError, TypeError, RecursionError, NotText) as error:
        raise ValueError(f"{name}={path!r}: {meta_path} does not describe a token file: {error}") from error
    return meta


@functools.cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """Return the sha256 of a file as hex digits. The result is cached.

    `size` is the size of the file in bytes, and `changed` is the time of its last change in nanoseconds. The
    cache depends on both, so that a file that has changed is read again.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(path: str, name: str = "PATH") -> dict:
    """Check that a token file is intact, and return the content of its .json.

    A token file is intact if the sha256 of its .bin is the one in its .json. `path` is the path of the token file, and
    `name` is the config field or argument that has this path, for messages.

    Raises ValueError if the sha256 differs, if a file is missing, or if the .json does not describe a token file.
    """
    meta, (file, _) = _read_meta(path, name), token_paths(path)
    state = file.stat()
    if (found := _sha256(file, state.st_size, state.st_mtime_ns)) != meta["sha256"]:
        raise ValueError(
            f"{name}={path!r}: {file} is damaged or was replaced: its sha256 is {found[:16]}..., but "
            f"the .json beside it says {meta['sha256'][:16]}...; make both again by python -m stickjax.data tokenize"
        )
    return meta


def open_tokens(path: str, tokenizer: Tokenizer, name: str) -> tuple[np.ndarray, dict]:
    """Open a token file, and return (its token ids [n], the content of its .json).

    The token ids are a memory map of the .bin, so they need not fit into memory. If the .bin has at most 1 GiB, its
    sha256 is checked. If it is larger, a log message says that it is not verified.

    Args:
      path: the path of the token file.
      tokenizer: the tokenizer that must have made the token file.
      name: the name of the config field that has the path, for messages.

    Raises ValueError if the token file is missing, is damaged, or was made by another tokenizer.
    """
    meta, (data_path, _) = _read_meta(path, name), token_paths(path)
    n, dtype = meta["num_tokens"], meta["dtype"]
    made_by = meta["tokenizer"], meta["vocab_size"], meta["eot"]
    if made_by != (tokenizer.name, tokenizer.vocab_size, tokenizer.eot):
        raise ValueError(
            f"{name}={path!r} was made by tokenizer {made_by[0]!r} with vocab_size={made_by[1]} and eot={made_by[2]}, "
            f"but data.tokenizer is {tokenizer.name!r} with vocab_size={tokenizer.vocab_size} and eot={tokenizer.eot}; "
            "use the tokenizer of the file, or tokenize the text again"
        )
    if dtype != token_dtype(tokenizer.vocab_size):
        raise ValueError(
            f"{name}={path!r}: dtype {dtype.str} does not fit vocab_size={tokenizer.vocab_size}, so the file is "
            "damaged; make it again by python -m stickjax.data tokenize"
        )
    size = data_path.stat().st_size
    if not n or size != n * dtype.itemsize:
        raise ValueError(
            f"{name}={path!r}: {data_path} has {size} bytes instead of "
            f"num_tokens={n} times {dtype.itemsize} bytes, so the file is empty or damaged; make it again by "
            "python -m stickjax.data tokenize"
        )
    tokens = np.memmap(data_path, dtype, mode="r")
    largest = max(int(tokens[:_BLOCK].max()), int(tokens[-_BLOCK:].max()))
    if largest >= tokenizer.vocab_size:
        raise ValueError(
            f"{name}={path!r}: token id {largest} must be below vocab_size={tokenizer.vocab_size}, so the file is "
            "damaged; make it again by python -m stickjax.data tokenize"
        )
    if size <= _VERIFIED:
        verify(path, name)
    else:
        log.warning(
            "%s=%r has more than 1 GiB, so it is not verified; python -m stickjax.data verify checks it", name, path
        )
    return tokens, meta
