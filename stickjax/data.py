"""From text to batches: every source becomes one flat token stream, cut into windows of T + 1 tokens.

    source -> Corpus (train, held-out) -> train_loader: batches   |   heldout_windows: evaluation

`python -m stickjax.data tokenize SOURCE OUT` turns text into a token file once, for corpora that do
not fit into memory: OUT.bin holds the tokens, OUT.json says what they are.
"""

import argparse
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

import grain
import numpy as np

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
    """One token stream: documents one after the other, each ended by `tokenizer.eot`."""

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


def tokenize(source: str, out: str, tokenizer: str = "byte", text_field: str = "text") -> dict:
    """Write the documents of `source` as the token file out.bin + out.json and return the content of the latter.

    One document is in memory at a time. Both files appear under their names only when complete; the .json
    comes last and vouches for the .bin. Raises ValueError for bad input and when the disk is full.
    """
    encoder, (data_path, meta_path) = load_tokenizer(tokenizer), _token_paths(out)
    dtype, digest = token_dtype(encoder.vocab_size), hashlib.sha256()
    count = dict(num_documents=0, num_tokens=0, num_bytes=0)
    partial = []
    try:
        with tempfile.NamedTemporaryFile(dir=data_path.parent, prefix=".tokens-", delete=False) as file:
            partial.append(file.name)
            for text in text_documents(source, text_field, name="SOURCE"):
                block = np.append(encoder.encode(text).astype(dtype), dtype.type(encoder.eot)).tobytes()
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
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.eot], dtype)
    tokens = np.concatenate([part for ids, _ in documents for part in (ids, end)], dtype=dtype)
    num_bytes = sum(size for _, size in documents)
    return Corpus(tokens, tokenizer, source, len(documents), num_bytes, hashlib.sha256(tokens).hexdigest()[:16])


def _ends(tokens: np.ndarray, eot: int) -> np.ndarray:
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
    later = _ends(tokens[target - 1 :], eot) + target - 1
    if later[0] < n:
        cut = int(later[0])
    elif len(ends := _ends(tokens, eot)) > 1:  # the last document alone is more than its share
        cut = int(ends[-2])

    def part(start: int, stop: int, documents: int) -> Corpus:
        digest = hashlib.sha256(f"{corpus.hash}:{start}:{stop}".encode()).hexdigest()[:16]
        num_bytes = round(corpus.bytes * (stop - start) / n)
        return dataclasses.replace(corpus, tokens=tokens[start:stop], documents=documents, bytes=num_bytes, hash=digest)

    heldout = max(1, len(later) - 1)
    return part(0, cut, corpus.documents - heldout + int(tokens[cut - 1] != eot)), part(cut, n, heldout)


def load_corpus(config: DataConfig) -> tuple[Corpus, Corpus]:
    """The training and the held-out stream of a config.

    With `heldout_path` each path is one stream. Otherwise documents 0, heldout_every, 2 * heldout_every, ...
    are held out; of a token file the last 1 / heldout_every, so that both parts stay views of the file. A
    single document is cut in two at that place. Neither part is ever empty.

    Raises ValueError naming the field or the file: missing, unreadable, empty, undecodable, or not made by
    `config.tokenizer`.

    >>> train, heldout = load_corpus(DataConfig(heldout_every=10))
    >>> train.tokens.dtype, len(train.tokens) > 8 * len(heldout.tokens) > 0
    (dtype('uint16'), True)
    """
    tokenizer = load_tokenizer(config.tokenizer)

    def encoded(documents: Iterable[str]) -> list[tuple[np.ndarray, int]]:
        return [(tokenizer.encode(text), len(text.encode())) for text in documents]

    if config.source == "tokens":
        corpus = _open_tokens(config.path, tokenizer, "data.path")
        if config.heldout_path is None:
            return _cut(corpus, config.heldout_every)
        return corpus, _open_tokens(config.heldout_path, tokenizer, "data.heldout_path")
    if config.source == "stdlib":
        source, documents = "stdlib", encoded(stdlib_documents())
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


# Batches


class _Windows:
    """Random access to windows of T + 1 tokens at stride T: every target of the stream is in one of them."""

    def __init__(self, tokens: np.ndarray, T: int):
        self.tokens, self.T = tokens, T

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.T

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self.tokens[index * self.T : (index + 1) * self.T + 1], np.int32)


def make_batch(windows: np.ndarray, eot: int) -> dict[str, np.ndarray]:
    """Turn windows [B, T + 1] into what the model is trained on, each of shape [B, T].

    `tokens` and `targets` (int32) are the window without its last and its first token. `segment_ids` (int32)
    number the documents within the window; an end of text belongs to the document it ends. `loss_mask` (bool)
    is False where the target belongs to the next document.

    >>> {name: array.tolist() for name, array in make_batch(np.array([[7, 8, 9, 5]]), eot=8).items()}
    {'tokens': [[7, 8, 9]], 'targets': [[8, 9, 5]], 'segment_ids': [[0, 0, 1]], 'loss_mask': [[True, False, True]]}
    """
    tokens = np.asarray(windows[:, :-1], np.int32)
    ends = tokens == eot
    segment_ids = np.cumsum(ends, axis=1, dtype=np.int32) - ends
    return dict(tokens=tokens, targets=np.asarray(windows[:, 1:], np.int32), segment_ids=segment_ids, loss_mask=~ends)


def train_loader(
    corpus: Corpus, config: DataConfig, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless batches of this process: dicts of `make_batch` with arrays [B // process_count, T].

    Every epoch visits every window once, in a new order set by `config.seed`. The shares of all processes,
    concatenated by process_index, are the batch of a single process. `get_state()` is a small JSON value,
    the same on every process, and `set_state()` takes up there at once, bit for bit, whatever the new
    process_count.

    Raises ValueError when the text has fewer than T + 1 tokens or B is not a multiple of process_count.

    >>> config = DataConfig(T=8, B=4)
    >>> next(train_loader(load_corpus(config)[0], config))["tokens"].shape
    (4, 8)
    """
    if config.B % process_count:
        raise ValueError(f"B={config.B} sequences must be a multiple of process_count={process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be in 0..{process_count - 1}")
    windows, eot = _Windows(corpus.tokens, config.T), corpus.tokenizer.eot
    if not len(windows):
        raise ValueError(
            f"T={config.T} needs {config.T + 1} tokens, but {corpus.source} has {len(corpus.tokens)} to train on"
        )
    # Epoch e is shuffled by seed + e: neighbouring seeds would share all but one of their epochs.
    seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0])
    return iter(
        grain.MapDataset.source(windows)
        .shuffle(seed=seed)
        .repeat()
        .batch(config.B // process_count, drop_remainder=True)
        .slice(slice(process_index, None, process_count))
        .map(lambda windows: make_batch(windows, eot))
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    )


@dataclass(frozen=True, eq=False)
class EvalWindows:
    """Held-out windows of M * T + 1 tokens, each inside one document; M is the largest length."""

    tokens: np.ndarray  # [W, M * T + 1], int32
    T: int
    bytes: int  # of text that all targets together stand for

    def pieces(self, m: int) -> np.ndarray:
        """The windows cut into contexts of m * T tokens: [W * M / m, m * T + 1]; the targets are the same for all m."""
        size, M = m * self.T, self.tokens.shape[1] // self.T
        if m < 1 or M % m:
            raise ValueError(f"m={m} must divide the largest length M={M}")
        starts = np.arange(0, M * self.T, size)
        return self.tokens[:, starts[:, None] + np.arange(size + 1)].reshape(-1, size + 1)


def heldout_windows(
    corpus: Corpus, T: int, *, lengths: tuple[int, ...] = (1, 2, 4, 8), max_tokens: int = 2**17, seed: int = 0
) -> EvalWindows:
    """Windows to evaluate contexts of m * T tokens for every m of `lengths` on the same targets.

    No window crosses a document. One is taken from each document before a second from any, in an order set
    by `seed`, until `max_tokens` targets are reached (at least one window is taken). A context holds no end of
    text; the last target may be one.

    Raises ValueError when a length does not divide the largest or no document is long enough.

    >>> corpus = load_corpus(DataConfig())[1]
    >>> windows = heldout_windows(corpus, 64, lengths=(1, 2), max_tokens=1024)
    >>> windows.tokens.shape, windows.pieces(1).shape
    ((8, 129), (16, 65))
    """
    M = max(lengths)
    for m in lengths:
        if m < 1 or M % m:
            raise ValueError(f"every length must divide the largest: {m} does not divide {M} (lengths={lengths})")
    size, ends = M * T, _ends(corpus.tokens, corpus.tokenizer.eot)
    starts = np.append(0, ends[:-1])
    fits = (ends - starts - 1) // size  # windows in each document
    if not fits.any():
        raise ValueError(
            f"no held-out document of {corpus.source} holds {M} * T + 1 = {size + 1} tokens (T={T}, "
            f"lengths={lengths}): the longest has {int((ends - starts).max())}"
        )
    wanted = max(1, max_tokens // size)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(fits))
    chosen: list[int] = []
    turn = 0
    while len(chosen) < wanted and len(order := order[fits[order] > turn]):
        chosen += (starts[order] + turn * size).tolist()
        turn += 1
    tokens = np.stack([corpus.tokens[s : s + size + 1] for s in sorted(chosen[:wanted])]).astype(np.int32)
    # Less the first token, which is no target; with it decoding knows what the first target follows.
    count = corpus.tokenizer.count_bytes
    return EvalWindows(tokens, T, sum(count(window) - count(window[:1]) for window in tokens))


def main(argv: list[str] | None = None) -> None:
    """`tokenize SOURCE OUT [--tokenizer byte|tokenizer.json] [--text-field text]`"""
    parser = argparse.ArgumentParser(prog="python -m stickjax.data")
    command = parser.add_subparsers(required=True).add_parser("tokenize", help="text to a token file")
    command.add_argument("source", metavar="SOURCE", help="text file, .jsonl file or folder")
    command.add_argument("out", metavar="OUT", help="OUT.bin and OUT.json are written")
    command.add_argument("--tokenizer", default="byte", help="byte, or the path of a tokenizer.json")
    command.add_argument("--text-field", default="text", help="field of a jsonl line that holds the text")
    words = parser.parse_args(argv)
    try:
        meta = tokenize(**vars(words))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    counts = (f"{meta['num_' + what]:,} {what}" for what in ("documents", "tokens", "bytes"))
    print(f"{words.out}: {', '.join(counts)}, {meta['sha256'][:16]}")


if __name__ == "__main__":
    main()
