"""From text to tokens: every source becomes one flat stream of documents, a training and a held-out one.

A token file, for corpora that do not fit into memory, is OUT.bin with the tokens and OUT.json that says what they are.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from stickjax import tasks
from stickjax.config import DataConfig
from stickjax.tokenizer import Tokenizer, load_tokenizer, token_dtype

log = logging.getLogger(__name__)

_BLOCK = 2**22  # tokens looked at together where a file must not be read whole

# Of the standard library: what is no library code, and tables that are data written as Python.
_NOT_LIBRARY = re.compile(
    r"(site-packages|dist-packages|tests?|idlelib|lib2to3|pydoc_data|encodings|ensurepip|__pycache__|config-.*)$"
)
_TABLES = re.compile(r"html/entities\.py$|_sysconfigdata.*\.py$")
_GENERATED = re.compile(r"generated (by|from)|automatically generated", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Corpus:
    """One token stream: documents one after the other, each as `tokenizer.document` has it."""

    tokens: np.ndarray  # [n], uint8, uint16 or uint32; a memmap for token files
    tokenizer: Tokenizer
    source: str  # for messages
    documents: int
    bytes: int  # of UTF-8 text; in proportion to the tokens where one text was cut in two
    hash: str  # 16 hex digits of the sha256 of the tokens, or of a token file's hash and the part taken

    def summary(self) -> str:
        """One line for the training banner."""
        return (
            f"{self.source}: {self.documents:,} documents, {len(self.tokens):,} tokens, "
            f"{self.bytes:,} bytes, {self.tokenizer.name}, {self.hash}"
        )


# Sources: iterators of documents


def _files(folder: Path, skip: re.Pattern | None = None) -> Iterator[Path]:
    """Files below a folder that are not hidden, sorted by relative path; folders that match `skip` are not entered."""
    found = []
    for root, folders, names in folder.walk():
        folders[:] = [f for f in folders if not f.startswith(".") and not (skip and skip.match(f))]
        found += [root / name for name in names if not name.startswith(".")]
    return iter(sorted(found, key=lambda file: file.relative_to(folder).as_posix()))


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error


def _read(file: Path) -> str:
    with _open(file) as stream:
        return stream.read().decode()


def stdlib_documents() -> Iterator[str]:
    """Source files of the running Python's standard library: no tests, no generated tables, UTF-8 only."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for file in _files(folder, _NOT_LIBRARY):
        if file.suffix != ".py" or _TABLES.search(file.relative_to(folder).as_posix()):
            continue
        try:
            text = _read(file)
        except UnicodeDecodeError:
            continue
        if text and not _GENERATED.search(text[:200]):
            yield text


def _jsonl_documents(file: Path, text_field: str) -> Iterator[str]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{file}:{number}: not a line of JSON: {error}") from error
            text = record.get(text_field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"{file}:{number}: no text in the field data.text_field={text_field!r}")
            if re.search("[\ud800-\udfff]", text):  # JSON can spell what UTF-8 cannot
                raise ValueError(f"{file}:{number}: half a surrogate pair in the field {text_field!r}")
            if text:
                yield text


def text_documents(path: str, text_field: str = "text", name: str = "data.path") -> Iterator[str]:
    """Documents of a text file (one), a .jsonl file (one a line) or a folder of both; empty ones are left out.

    In a folder, hidden files and files that are not text (not UTF-8, or with zero bytes) are left out; the number
    of the latter is logged.
    `name` is how errors call the path. Raises ValueError for a path that is missing, cannot be read, is empty
    or is not UTF-8, and for a line of JSON without the field (with file and line).

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "b.jsonl").write_text('{"text": "two"}\\n{"text": "three"}\\n')
    ...     _ = Path(folder, "a.txt").write_text("one")
    ...     list(text_documents(folder))
    ['one', 'two', 'three']
    """
    root, empty, skipped = Path(path), True, 0
    if not root.exists():
        raise ValueError(f"{name}={path!r} does not exist")
    for file in _files(root) if root.is_dir() else [root]:
        if file.suffix == ".jsonl":
            documents: Iterable[str] = _jsonl_documents(file, text_field)
        else:
            try:
                text = _read(file)
            except UnicodeDecodeError as error:
                if file == root:
                    where = f"{error.reason} at byte {error.start}"
                    raise ValueError(f"{name}={path!r} is not UTF-8 text: {where}") from error
                text = "\0"
            if file != root and "\0" in text:  # also what decodes by accident, such as a token file
                skipped += 1
                continue
            documents = [text] if text else []
        for text in documents:
            empty = False
            yield text
    if skipped:
        log.warning("%s=%r: left out %d files that are not text", name, path, skipped)
    if empty:
        raise ValueError(f"{name}={path!r} holds no text")


# Token files


def _token_paths(path: str) -> tuple[Path, Path]:
    stem = Path(path).with_suffix("") if Path(path).suffix in (".bin", ".json") else Path(path)
    return stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".json")


def tokenize(source: str, out: str, tokenizer: str = "byte", text_field: str = "text", eot: str | None = None) -> dict:
    """Write the documents of `source` as the token file out.bin + out.json and return the content of the latter.

    One document is in memory at a time. Both files appear under their names only when complete; the .json
    comes last and vouches for the .bin. Raises ValueError for bad input and when the disk is full.
    """
    encoder, (data_path, meta_path) = load_tokenizer(tokenizer, eot), _token_paths(out)
    dtype, digest = token_dtype(encoder.vocab_size), hashlib.sha256()
    count = dict(num_documents=0, num_tokens=0, num_bytes=0)
    partial = []
    try:
        with tempfile.NamedTemporaryFile(dir=data_path.parent, prefix=".tokens-", delete=False) as file:
            partial.append(file.name)
            for text in text_documents(source, text_field, name="SOURCE"):
                block = encoder.document(text).tobytes()
                file.write(block)
                digest.update(block)
                count["num_documents"] += 1
                count["num_tokens"] += len(block) // dtype.itemsize
                count["num_bytes"] += len(text.encode())
            file.flush()
            os.fsync(file.fileno())
        meta = dict(format="stickjax-tokens", version=1, dtype=dtype.str, vocab_size=encoder.vocab_size)
        meta |= dict(eot=encoder.eot, tokenizer=encoder.name, sha256=digest.hexdigest()) | count
        with tempfile.NamedTemporaryFile("w", dir=data_path.parent, prefix=".tokens-", delete=False) as file:
            partial.append(file.name)
            file.write(json.dumps(meta, indent=2) + "\n")
        meta_path.unlink(missing_ok=True)  # it must never stand next to tokens it does not describe
        for temporary, path in zip(partial, (data_path, meta_path), strict=True):
            os.chmod(temporary, 0o644)  # temporary files are private
            os.replace(temporary, path)
    except OSError as error:  # reading raises ValueError
        raise ValueError(f"cannot write {data_path}: {error.strerror}") from error
    finally:
        for temporary in partial:
            Path(temporary).unlink(missing_ok=True)
    return meta


def _open_tokens(path: str, tokenizer: Tokenizer, name: str) -> Corpus:
    data_path, meta_path = _token_paths(path)
    for file in (data_path, meta_path):
        if not file.exists():
            raise ValueError(f"{name}={path!r}: no {file}; make it by python -m stickjax.data tokenize")
    try:
        meta = json.loads(_read(meta_path))
        if (meta["format"], meta["version"]) != ("stickjax-tokens", 1):
            raise ValueError(f"format {meta['format']!r} version {meta['version']}")
        n, dtype = meta["num_tokens"], np.dtype(meta["dtype"])
        documents, num_bytes, sha = meta["num_documents"], meta["num_bytes"], meta["sha256"]
        made_by = (meta["tokenizer"], meta["vocab_size"], meta["eot"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}={path!r}: {meta_path} does not describe a token file: {error}") from error
    if made_by != (tokenizer.name, tokenizer.vocab_size, tokenizer.eot):
        raise ValueError(
            f"{name}={path!r} was made by tokenizer {made_by[0]!r} with vocab_size={made_by[1]} and eot={made_by[2]}, "
            f"but data.tokenizer is {tokenizer.name!r} with vocab_size={tokenizer.vocab_size} and eot={tokenizer.eot}"
        )
    if dtype != token_dtype(tokenizer.vocab_size):
        raise ValueError(f"{name}={path!r}: dtype {dtype.str} does not follow from vocab_size={tokenizer.vocab_size}")
    if not n or data_path.stat().st_size != n * dtype.itemsize:
        raise ValueError(
            f"{name}={path!r}: {data_path} has {data_path.stat().st_size} bytes instead of "
            f"num_tokens={n} times {dtype.itemsize}; it is empty, truncated or of another type"
        )
    tokens = np.memmap(data_path, dtype, mode="r")
    largest = max(int(tokens[:_BLOCK].max()), int(tokens[-_BLOCK:].max()))
    if largest >= tokenizer.vocab_size:
        raise ValueError(f"{name}={path!r}: token {largest} is outside vocab_size={tokenizer.vocab_size}")
    return Corpus(tokens, tokenizer, path, documents, num_bytes, sha[:16])


# Training and held-out part


def _pack(documents: list[tuple[np.ndarray, int]], tokenizer: Tokenizer, source: str) -> Corpus:
    """Join (tokens, bytes) of documents."""
    tokens = np.concatenate([ids for ids, _ in documents], dtype=token_dtype(tokenizer.vocab_size))
    num_bytes = sum(size for _, size in documents)
    return Corpus(tokens, tokenizer, source, len(documents), num_bytes, hashlib.sha256(tokens).hexdigest()[:16])


def document_ends(tokens: np.ndarray, eot: int) -> np.ndarray:
    """Positions just after every document, in order; found by blocks."""
    blocks = range(0, len(tokens), _BLOCK)
    ends = np.concatenate([np.flatnonzero(tokens[b : b + _BLOCK] == eot) + b + 1 for b in blocks])
    return ends if len(ends) and ends[-1] == len(tokens) else np.append(ends, len(tokens))


def _cut(corpus: Corpus, heldout_every: int) -> tuple[Corpus, Corpus]:
    """Cut a stream in two views, at the first document boundary after 1 - 1/heldout_every of the tokens."""
    tokens, eot, n = corpus.tokens, corpus.tokenizer.eot, len(corpus.tokens)
    if n < 2:
        raise ValueError(f"{corpus.source} has {n} token: too short for a training and a held-out part")
    target = n - max(1, n // heldout_every)
    cut = target  # inside a document only when there is just one
    later = document_ends(tokens[target - 1 :], eot) + target - 1
    if later[0] < n:
        cut = int(later[0])
    elif len(ends := document_ends(tokens, eot)) > 1:  # the last document alone is more than its share
        cut = int(ends[-2])

    def part(start: int, stop: int, documents: int) -> Corpus:
        digest = hashlib.sha256(f"{corpus.hash}:{start}:{stop}".encode()).hexdigest()[:16]
        num_bytes = round(corpus.bytes * (stop - start) / n)
        return dataclasses.replace(corpus, tokens=tokens[start:stop], documents=documents, bytes=num_bytes, hash=digest)

    heldout = max(1, len(later) - 1)
    return part(0, cut, corpus.documents - heldout + int(tokens[cut - 1] != eot)), part(cut, n, heldout)


def _load(source: str, config: DataConfig, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """The two parts of one source."""

    def encoded(documents: Iterable[str]) -> list[tuple[np.ndarray, int]]:
        return [(tokenizer.document(text), len(text.encode())) for text in documents]

    if source == "tokens":
        corpus = _open_tokens(config.path, tokenizer, "data.path")
        if config.heldout_path is None:
            return _cut(corpus, config.heldout_every)
        return corpus, _open_tokens(config.heldout_path, tokenizer, "data.heldout_path")
    if source == "stdlib":
        documents = encoded(stdlib_documents())
    elif source in tasks.TASKS:
        documents = encoded(tasks.documents(source, config.examples))
    else:
        source, documents = config.path, encoded(text_documents(config.path, config.text_field))
    if config.heldout_path is not None:
        heldout = encoded(text_documents(config.heldout_path, config.text_field, "data.heldout_path"))
        return _pack(documents, tokenizer, source), _pack(heldout, tokenizer, config.heldout_path)
    if len(documents) == 1:
        return _cut(_pack(documents, tokenizer, source), config.heldout_every)
    heldout = documents[:: config.heldout_every]
    del documents[:: config.heldout_every]
    return _pack(documents, tokenizer, source), _pack(heldout, tokenizer, source)


def _mix(corpora: Iterable[Corpus]) -> Corpus:
    """Streams one after the other, each cut to the length of the shortest: equal shares."""
    corpora = list(corpora)
    tokenizer = corpora[0].tokenizer
    tokens = np.stack([corpus.tokens[: min(len(c.tokens) for c in corpora)] for corpus in corpora])
    tokens[:, -1] = tokenizer.eot  # of the document that was cut
    tokens = tokens.ravel()
    documents, num_bytes = int((tokens == tokenizer.eot).sum()), tokenizer.count_bytes(tokens)
    source, digest = ",".join(corpus.source for corpus in corpora), hashlib.sha256(tokens).hexdigest()
    return Corpus(tokens, tokenizer, source, documents, num_bytes, digest[:16])


def load_corpus(config: DataConfig) -> tuple[Corpus, Corpus]:
    """The training and the held-out stream of a config.

    Of several sources, `source="stdlib,logic"`, every one is loaded as if it were alone; then each is cut to the
    length of the shortest, in both parts, so that all have equal shares. Generated sources (`stickjax.tasks`) are
    `examples` lines in documents of about 4 KB, the same in every run.

    With `heldout_path` each path is one stream. Otherwise documents 0, heldout_every, 2 * heldout_every, ...
    are held out; of a token file the last 1 / heldout_every, so that both parts stay views of the file. A
    single document is cut in two at that place. Neither part is ever empty.

    Raises ValueError naming the field or the file: missing, unreadable, empty, undecodable, or not made by
    `config.tokenizer`.

    >>> train, heldout = load_corpus(DataConfig(heldout_every=10))
    >>> train.tokens.dtype, len(train.tokens) > 8 * len(heldout.tokens) > 0
    (dtype('uint16'), True)
    """
    tokenizer = load_tokenizer(config.tokenizer, config.eot)
    if len(config.sources) == 1:
        return _load(config.source, config, tokenizer)
    train, heldout = zip(*(_load(source, config, tokenizer) for source in config.sources), strict=True)
    return _mix(train), _mix(heldout)
