"""Load a text as two token streams, for training and for evaluation. A token stream is an array [n] of token ids."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from stickjax.config import DataConfig
from stickjax.data import tasks
from stickjax.data.encoding import encode_documents
from stickjax.data.sources import stdlib_documents, text_documents
from stickjax.data.token_files import open_tokens, tokenize
from stickjax.data.tokenizer import Tokenizer, load_tokenizer, token_dtype
from stickjax.system.text import printable

__all__ = ["Corpus", "document_ends", "load_corpus", "stdlib_documents", "text_documents", "tokenize"]

_BLOCK = 2**22  # tokens read at a time from a file that may not fit into memory


@dataclass(frozen=True, eq=False)
class Corpus:
    """One token stream: the ids of all documents, one document after the other, and facts about the text.

    The ids of each document are `tokenizer.document(text)`, so every document ends with the token `tokenizer.eot`.
    """

    tokens: np.ndarray  # [n], uint8, uint16 or uint32; a memmap for token files
    tokenizer: Tokenizer
    source: str  # the name of the text in messages
    documents: int  # number of documents
    # number of bytes of the UTF-8 text; for a part of a stream (`_cut`), an estimate from the number of tokens
    bytes: int
    # 16 hex digits of the sha256 of all tokens. For a part of a stream (`_cut`), it is the sha256 of the hash of the
    # stream and the positions. For concatenated streams of a mixture (`_joined`), it is the sha256 of their hashes.
    hash: str

    def summary(self) -> str:
        """Return one line about the text, which training prints when it starts.

        The line has the source, the numbers of documents, tokens and bytes, the tokenizer and the hash.
        """
        return (
            f"{printable(self.source)}: {self.documents:,} documents, {len(self.tokens):,} tokens, "
            f"{self.bytes:,} bytes, {self.tokenizer.name}, {self.hash}"
        )


def _of_token_file(path: str, tokenizer: Tokenizer, name: str) -> Corpus:
    tokens, meta = open_tokens(path, tokenizer, name)
    return Corpus(tokens, tokenizer, path, meta["num_documents"], meta["num_bytes"], meta["sha256"][:16])


def _pack(documents: list[tuple[np.ndarray, int]], tokenizer: Tokenizer, source: str) -> Corpus:
    """Concatenate documents into one token stream. Each document is a pair (its ids [n], number of bytes of its text).

    `source` is the name of the text in messages.
    """
    tokens = np.concatenate([ids for ids, _ in documents], dtype=token_dtype(tokenizer.vocab_size))
    num_bytes = sum(size for _, size in documents)
    return Corpus(tokens, tokenizer, source, len(documents), num_bytes, hashlib.sha256(tokens).hexdigest()[:16])


def document_ends(tokens: np.ndarray, eot: int) -> np.ndarray:
    """Return the end of every document in a token stream: an increasing array of positions in `tokens` [n].

    The end of a document is the position after its token `eot`. If the last document has no `eot`, its end is the end
    of the stream. The ids are read in blocks, because a token file may be larger than the memory.
    """
    blocks = range(0, len(tokens), _BLOCK)
    ends = np.concatenate([np.flatnonzero(tokens[b : b + _BLOCK] == eot) + b + 1 for b in blocks])
    return ends if len(ends) and ends[-1] == len(tokens) else np.append(ends, len(tokens))


def _cut(corpus: Corpus, heldout_every: int) -> tuple[Corpus, Corpus]:
    """Cut a stream of n tokens into a training part and a held-out part. Return both parts, as views of the stream.

    The cut is at the first end of a document at or after the position n - n / heldout_every. If this document end is
    the end of the stream, the cut is before the last document, however long this document is. If the stream has a
    single document, the cut is inside the document, at the position n - n / heldout_every.
    """
    tokens, eot, n = corpus.tokens, corpus.tokenizer.eot, len(corpus.tokens)
    if n < 2:
        raise ValueError(
            f"{corpus.source} has {n} tokens, but it needs at least 2: one to train on and one to hold out"
        )
    target = n - max(1, n // heldout_every)
    cut = target  # a position inside a document, which is used only if there is a single document
    later = document_ends(tokens[target - 1 :], eot) + target - 1
    if later[0] < n:
        cut = int(later[0])
    elif len(ends := document_ends(tokens, eot)) > 1:  # the last document has more than n / heldout_every tokens
        cut = int(ends[-2])

    def part(start: int, stop: int, documents: int) -> Corpus:
        digest = hashlib.sha256(f"{corpus.hash}:{start}:{stop}".encode()).hexdigest()[:16]
        num_bytes = round(corpus.bytes * (stop - start) / n)
        return dataclasses.replace(corpus, tokens=tokens[start:stop], documents=documents, bytes=num_bytes, hash=digest)

    heldout = max(1, len(later) - 1)
    return part(0, cut, corpus.documents - heldout + int(tokens[cut - 1] != eot)), part(cut, n, heldout)


def _load(source: str, config: DataConfig, tokenizer: Tokenizer, name: str) -> tuple[Corpus, Corpus]:
    """Return (training stream, held-out stream) of one source. `load_corpus` explains how the text is divided.

    `source` is one of the names in `config.sources`, such as "stdlib". `name` says in messages where the path
    `config.path` comes from: "data.path", or "mixture: path" for a row of a mixture.
    """

    def encoded(documents: Iterable[str]) -> list[tuple[np.ndarray, int]]:
        return list(encode_documents(documents, tokenizer, config.cache))

    if source == "tokens":
        corpus = _of_token_file(config.path, tokenizer, name)
        if config.heldout_path is None:
            return _cut(corpus, config.heldout_every)
        return corpus, _of_token_file(config.heldout_path, tokenizer, "data.heldout_path")
    if source == "stdlib":
        documents = encoded(stdlib_documents())
    elif source in tasks.TASKS:
        documents = encoded(tasks.documents(source, config.examples))
    else:
        source, documents = config.path, encoded(text_documents(config.path, config.text_field, name))
    if config.heldout_path is not None:
        heldout = encoded(text_documents(config.heldout_path, config.text_field, "data.heldout_path"))
        return _pack(documents, tokenizer, source), _pack(heldout, tokenizer, config.heldout_path)
    if len(documents) == 1:
        return _cut(_pack(documents, tokenizer, source), config.heldout_every)
    heldout = documents[:: config.heldout_every]
    del documents[:: config.heldout_every]
    return _pack(documents, tokenizer, source), _pack(heldout, tokenizer, source)


def _mix(corpora: Iterable[Corpus]) -> Corpus:
    """Cut several token streams to the length of the shortest stream, and concatenate them into one stream.

    After the cut, the last token of each stream is replaced by the end-of-text token, because the cut may be inside a
    document.
    """
    corpora = list(corpora)
    tokenizer = corpora[0].tokenizer
    tokens = np.stack([corpus.tokens[: min(len(c.tokens) for c in corpora)] for corpus in corpora])
    tokens[:, -1] = tokenizer.eot  # the end of the document that was cut
    tokens = tokens.ravel()
    documents, num_bytes = int((tokens == tokenizer.eot).sum()), tokenizer.count_bytes(tokens)
    source, digest = ",".join(corpus.source for corpus in corpora), hashlib.sha256(tokens).hexdigest()
    return Corpus(tokens, tokenizer, source, documents, num_bytes, digest[:16])


def _joined(corpora: Sequence[Corpus]) -> Corpus:
    """Concatenate several token streams. An end-of-text token is added after each stream that does not end with one.

    If there is only one stream, it is returned unchanged, and no token is added.
    """
    if len(corpora) == 1:
        return corpora[0]
    tokenizer, end = corpora[0].tokenizer, np.full(1, corpora[0].tokenizer.eot, corpora[0].tokens.dtype)
    streams = [stream for c in corpora for stream in ([c.tokens] if c.tokens[-1] == end else [c.tokens, end])]
    digest = hashlib.sha256(",".join(corpus.hash for corpus in corpora).encode()).hexdigest()
    return Corpus(
        np.concatenate(streams), tokenizer, ",".join(corpus.source for corpus in corpora),
        sum(corpus.documents for corpus in corpora), sum(corpus.bytes for corpus in corpora), digest[:16],
    )  # fmt: skip


def load_corpora(config: DataConfig) -> tuple[list[Corpus], Corpus]:
    """Load the text that `config` names. Return (list of the training streams, the held-out stream).

    A mixture has one training stream for each source. Other data have one training stream. The held-out stream of a
    mixture contains the held-out parts of all sources, one after the other. The function `load_corpus` explains what is
    held out, and the errors.

    >>> streams, heldout = load_corpora(DataConfig(mixture="logic:2,listops:1", examples=1000))
    >>> [stream.source for stream in streams], heldout.source
    (['logic', 'listops'], 'logic,listops')
    """
    tokenizer = load_tokenizer(config.tokenizer, config.eot)
    name = "data.path" if config.mixture is None else "mixture: path"
    if len(config.sources) > 1:
        train, heldout = zip(*(_load(source, config, tokenizer, name) for source in config.sources), strict=True)
        return [_mix(train)], _mix(heldout)
    train, heldout = zip(*(_load(part.source, part, tokenizer, name) for part in config.parts), strict=True)
    return list(train), _joined(heldout)


def load_corpus(config: DataConfig) -> tuple[Corpus, Corpus]:
    """Load the text that `config` names, and return two token streams: (for training, held out for evaluation).

    If `heldout_path` is set, the text of `path` is for training, and the text of `heldout_path` is held out. Otherwise
    the documents 0, heldout_every, 2 * heldout_every, ... are held out. A token file or a single document is cut into
    two parts instead, and the second part is held out (see `_cut`). It has about 1 / heldout_every of the tokens. If
    the last of several documents is longer than that, the whole last document is held out. Both parts are views of
    one array. Each stream has at least one token.

    Several sources, such as `source="stdlib,logic"`, are loaded one by one. Then the training streams of all sources
    are cut to the length of the shortest stream and concatenated, so that all sources have equal shares. The held-out
    streams are treated in the same way. The source may also be the name of a task, such as "logic". Then the text is
    `config.examples` generated lines, which are the same in every run and are joined into documents of about 4 KB.

    The streams of a mixture (`config.mixture`) are concatenated without a cut. Training does not use this concatenated
    stream: it calls `load_corpora`, which returns the streams separately.

    Raises ValueError, naming the field or the file, if a file is missing or empty, cannot be read or decoded, or is a
    token file that was made with another tokenizer than `config.tokenizer`.

    >>> train, heldout = load_corpus(DataConfig(heldout_every=10))
    >>> train.tokens.dtype, len(train.tokens) > 8 * len(heldout.tokens) > 0
    (dtype('uint16'), True)
    """
    corpora, heldout = load_corpora(config)
    return _joined(corpora), heldout
