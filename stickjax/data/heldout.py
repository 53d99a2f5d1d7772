"""Held-out windows, on which the same targets are scored at several context lengths."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stickjax.data.corpus import Corpus, document_ends
from stickjax.system.text import printable

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EvalWindows:
    """Held-out windows of at most M * T targets, each inside one document; M is the largest of `lengths`."""

    tokens: np.ndarray  # [W, longest + 1], int32; the first token is the input of the first target
    targets: np.ndarray  # [W], the number of targets of each window; the rest of its row of `tokens` is padding
    T: int
    lengths: tuple[int, ...]  # multiples of T that some document reaches
    bytes: int  # number of bytes of the text of all targets

    def pieces(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut the windows into contexts of m * T tokens: (tokens [P, size + 1], mask of the targets [P, size]).

        For every m, each target is in exactly one piece. `size` is m * T, or less if all documents are short.
        """
        W, longest = len(self.tokens), self.tokens.shape[1] - 1
        size = min(m * self.T, -(-longest // 64) * 64)
        count = -(-longest // size)
        padded = np.pad(self.tokens, ((0, 0), (0, count * size - longest)))
        starts = np.arange(0, count * size, size)
        pieces = padded[:, starts[:, None] + np.arange(size + 1)].reshape(-1, size + 1)
        target_mask = (np.arange(count * size) < self.targets[:, None]).reshape(W * count, size)
        filled = target_mask.any(1)
        return pieces[filled], target_mask[filled]


def heldout_windows(
    corpus: Corpus, T: int, *, lengths: tuple[int, ...] = (1, 2, 4, 8), max_tokens: int = 2**17, seed: int = 0
) -> EvalWindows:
    """Choose windows to evaluate contexts of m * T tokens, for every m of `lengths`, on the same targets.

    Every window lies within one document. The first input of a document is the same as in training: its first token, if
    that is the tokenizer's bos; otherwise an end of text in front of it. All later tokens are targets, including the
    end of text of the document.

    Full windows of M * T targets come first, where M is the largest length. Every document that is long enough gives
    one full window before any document gives a second one; `seed` sets the order of the documents. Then come the
    remaining parts: whole short documents, and the ends of longer ones. At least one window is taken, and more of them
    as long as they have at most `max_tokens` targets together.

    Lengths that no document reaches are left out, with a log message. The smallest length always stays.

    Raises ValueError if a length does not divide the largest length, or if `max_tokens` is below 1.

    >>> from stickjax.config import DataConfig
    >>> from stickjax.data.corpus import load_corpus
    >>> corpus = load_corpus(DataConfig())[1]
    >>> windows = heldout_windows(corpus, 64, lengths=(1, 2), max_tokens=1024)
    >>> windows.tokens.shape, windows.pieces(1)[0].shape
    ((8, 129), (16, 65))
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    for m in lengths:
        if m < 1 or max(lengths) % m:
            raise ValueError(f"every length must divide the largest: {m} does not divide {max(lengths)} ({lengths=})")
    eot, bos, ends = corpus.tokenizer.eot, corpus.tokenizer.bos, document_ends(corpus.tokens, corpus.tokenizer.eot)
    starts = np.append(0, ends[:-1])
    if bos is not None:
        starts = starts + (corpus.tokens[starts] == bos)  # positions of the first targets
    kept = tuple(m for m in lengths if m * T <= (ends - starts).max()) or (min(lengths),)
    if kept != tuple(lengths):
        left_out = ", ".join(str(m) for m in lengths if m not in kept)
        log.warning(
            "the longest held-out document of %s has %d tokens: lengths %s of T=%d are left out",
            printable(corpus.source), (ends - starts).max(), left_out, T,
        )  # fmt: skip
    chosen, total = [], 0
    for document, first, n in _parts(ends - starts, max(kept) * T, seed):
        if chosen and total + n > max_tokens:
            break
        chosen.append((document, first, n))
        total += n
    windows = []
    for document, first, n in sorted(chosen):
        start = starts[document] + first
        own = first or (start and corpus.tokens[start - 1] == bos)  # whether the token before belongs to this document
        before = corpus.tokens[start - 1] if own else eot
        windows.append(np.append(before, corpus.tokens[start : start + n]).astype(np.int32))
    targets = np.array([len(window) - 1 for window in windows])
    tokens = np.stack([np.pad(window, (0, targets.max() + 1 - len(window))) for window in windows])
    # The bytes of a window: decode it with the token before its first target, then subtract the bytes of that token.
    count = corpus.tokenizer.count_bytes
    return EvalWindows(tokens, targets, T, kept, sum(count(window) - count(window[:1]) for window in windows))


def _parts(targets: np.ndarray, size: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """Cut documents into parts of `size` targets, full parts first: (document, first target, number of targets)."""
    rng = np.random.default_rng(seed)
    order, turn = rng.permutation(np.flatnonzero(targets >= size)), 0
    while len(order := order[targets[order] >= (turn + 1) * size]):
        yield from ((int(document), turn * size, size) for document in order)
        turn += 1
    for document in rng.permutation(np.flatnonzero(targets % size)):
        rest = int(targets[document]) % size
        yield int(document), int(targets[document]) - rest, rest
