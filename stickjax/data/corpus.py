"""Load a source of text as two token streams, which are arrays [n] of ids: one for training, one held out."""

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stickjax.config import DataConfig
from stickjax.data import tasks
from stickjax.data.sources import stdlib_documents, text_documents
from stickjax.data.token_files import open_tokens, tokenize
from stickjax.data.tokenizer import Tokenizer, load_tokenizer, token_dtype
from stickjax.system.text import printable

__all__ = ["Corpus", "document_ends", "load_corpus", "stdlib_documents", "text_documents", "tokenize"]

_BLOCK = 2**22  # tokens read at a time from a file that may not fit into memory


@dataclass(frozen=True, eq=False)
class Corpus:
    """One token stream: the ids of documents, one document after the other. `tokenizer.document` encodes each one."""

    tokens: np.ndarray  # [n], uint8, uint16 or uint32; a memmap for token files
    tokenizer: Tokenizer
    source: str  # for messages
    documents: int
    bytes: int  # of UTF-8 text; in proportion to the tokens if one text was cut in two
    hash: str  # 16 hex digits of a sha256: of the tokens, or of the hash of a token file and the part of it

    def summary(self) -> str:
        """Return a line for the training banner: the source, its sizes, the tokenizer and the hash."""
        return (
            f"{printable(self.source)}: {self.documents:,} documents, {len(self.tokens):,} tokens, "
            f"{self.bytes:,} bytes, {self.tokenizer.name}, {self.hash}"
        )


def _of_token_file(path: str, tokenizer: Tokenizer, name: str) -> Corpus:
    tokens, meta = open_tokens(path, tokenizer, name)
    return Corpus(tokens, tokenizer, path, meta["num_documents"], meta["num_bytes"], meta["sha256"][:16])


def _pack(documents: list[tuple[np.ndarray, int]], tokenizer: Tokenizer, source: str) -> Corpus:
    """Join documents into one token stream. A document is given as (ids [n], number of bytes of its text)."""
    tokens = np.concatenate([ids for ids, _ in documents], dtype=token_dtype(tokenizer.vocab_size))
    num_bytes = sum(size for _, size in documents)
    return Corpus(tokens, tokenizer, source, len(documents), num_bytes, hashlib.sha256(tokens).hexdigest()[:16])


def document_ends(tokens: np.ndarray, eot: int) -> np.ndarray:
    """Return the end position of every document in a stream [n] of ids: the position after its last token, in order.

    The id `eot` ends a document, and the end of the stream ends the last one. The ids are read in blocks, because a
    token file may be larger than the memory.
    """
    blocks = range(0, len(tokens), _BLOCK)
    ends = np.concatenate([np.flatnonzero(tokens[b : b + _BLOCK] == eot) + b + 1 for b in blocks])
    return ends if len(ends) and ends[-1] == len(tokens) else np.append(ends, len(tokens))


def _cut(corpus: Corpus, heldout_every: int) -> tuple[Corpus, Corpus]:
    """Cut a stream into a training part and a held-out part, which are views of the stream.

    The cut is at the first document boundary after 1 - 1/heldout_every of the tokens. If there is none, the last
    document is held out. A stream of one document is cut inside the document.
    """
    tokens, eot, n = corpus.tokens, corpus.tokenizer.eot, len(corpus.tokens)
    if n < 2:
        raise ValueError(f"{corpus.source} has {n} token, but a training part and a held-out part need one each")
    target = n - max(1, n // heldout_every)
    cut = target  # this is inside a document; it is used only if there is a single document
    later = document_ends(tokens[target - 1 :], eot) + target - 1
    if later[0] < n:
        cut = int(later[0])
    elif len(ends := document_ends(tokens, eot)) > 1:  # the last document is larger than the held-out share
        cut = int(ends[-2])

    def part(start: int, stop: int, documents: int) -> Corpus:
        digest = hashlib.sha256(f"{corpus.hash}:{start}:{stop}".encode()).hexdigest()[:16]
        num_bytes = round(corpus.bytes * (stop - start) / n)
        return dataclasses.replace(corpus, tokens=tokens[start:stop], documents=documents, bytes=num_bytes, hash=digest)

    heldout = max(1, len(later) - 1)
    return part(0, cut, corpus.documents - heldout + int(tokens[cut - 1] != eot)), part(cut, n, heldout)


def _load(source: str, config: DataConfig, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """Load the training stream and the held-out stream of one source, such as "stdlib"; see `load_corpus`."""

    def encoded(documents: Iterable[str]) -> list[tuple[np.ndarray, int]]:
        return [(tokenizer.document(text), len(text.encode())) for text in documents]

    if source == "tokens":
        corpus = _of_token_file(config.path, tokenizer, "data.path")
        if config.heldout_path is None:
            return _cut(corpus, config.heldout_every)
        return corpus, _of_token_file(config.heldout_path, tokenizer, "data.heldout_path")
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
    """Concatenate streams into one, after each is cut to the length of the shortest.

    The last token of each part becomes an end of text, because the cut may be inside a document.
    """
    corpora = list(corpora)
    tokenizer = corpora[0].tokenizer
    tokens = np.stack([corpus.tokens[: min(len(c.tokens) for c in corpora)] for corpus in corpora])
    tokens[:, -1] = tokenizer.eot  # ends the document that was cut
    tokens = tokens.ravel()
    documents, num_bytes = int((tokens == tokenizer.eot).sum()), tokenizer.count_bytes(tokens)
    source, digest = ",".join(corpus.source for corpus in corpora), hashlib.sha256(tokens).hexdigest()
    return Corpus(tokens, tokenizer, source, documents, num_bytes, digest[:16])


def load_corpus(config: DataConfig) -> tuple[Corpus, Corpus]:
    """Load the training stream and the held-out stream of a config.

    Several sources, such as `source="stdlib,logic"`, are loaded one by one. Then the training streams of all sources
    are cut to the length of the shortest and concatenated, so that all sources have equal shares. The same is done with
    the held-out streams. A generated source (`stickjax.data.tasks`) has `config.examples` lines, in documents of about
    4 KB, which are the same in every run.

    With `heldout_path`, the training stream comes from `path` and the held-out stream from `heldout_path`. Otherwise,
    the documents 0, heldout_every, 2 * heldout_every, ... are held out. In a token file, the last 1 / heldout_every of
    the tokens is held out, so that both streams stay views of the file. If there is a single document, it is cut in
    two at the same place. Neither stream is ever empty.

    Raises ValueError, naming the field or the file, if a file is missing, empty, cannot be read or decoded, or is a
    token file of another tokenizer than `config.tokenizer`.

    >>> train, heldout = load_corpus(DataConfig(heldout_every=10))
    >>> train.tokens.dtype, len(train.tokens) > 8 * len(heldout.tokens) > 0
    (dtype('uint16'), True)
    """
    tokenizer = load_tokenizer(config.tokenizer, config.eot)
    if len(config.sources) == 1:
        return _load(config.source, config, tokenizer)
    train, heldout = zip(*(_load(source, config, tokenizer) for source in config.sources), strict=True)
    return _mix(train), _mix(heldout)
