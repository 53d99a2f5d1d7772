"""Windows of held-out text, in which a model predicts the same target tokens at several context lengths."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stickjax.data.corpus import Corpus, document_ends
from stickjax.system.text import printable

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EvalWindows:
    """W windows of held-out text. A window is inside one document and has at most max(lengths) * T target tokens."""

    tokens: np.ndarray  # [W, longest + 1], int32; the first token is the input of the first target
    targets: np.ndarray  # [W], the number of targets of each window; the rest of its row of `tokens` is padding
    T: int
    lengths: tuple[int, ...]  # multiples of T that some document reaches
    bytes: int  # number of bytes of the text of all targets

    def pieces(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut the windows into P pieces with a context of m * T tokens: (tokens [P, size + 1], target mask [P, size]).

        The mask at [p, i] is True if token i + 1 of piece p is a target, and False if it is padding. `size` is m * T,
        or less if all windows are short. For every m, each target is in exactly one piece.
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
    """Choose windows of a text in which contexts of m * T tokens have the same targets, for every m in `lengths`.

    Every window is inside one document. The first input of a document is the same as in training: the first token of
    the document, if this is the tokenizer's bos; otherwise an end of text in front of the document. All later tokens
    are targets, including the end of text of the document.

    Full windows of M * T targets come first, where M is the largest length. Every document that is long enough gives
    one full window before any document gives a second one; `seed` decides the order of the documents. Then come the
    remaining parts: whole short documents, and the ends of longer documents. At least one window is taken. More windows
    are taken as long as all windows together have at most `max_tokens` targets.

    Lengths that no document reaches are left out, with a log message. The smallest length is never left out.

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
            "the longest held-out document of %s has %d tokens: contexts of %s times T=%d tokens are left out",
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
    """Yield parts of documents with at most `size` targets, full parts first.

    A part is (index of the document, index of its first target in the document, number of its targets).
    `targets` has the number of targets of each document. `seed` decides the order of the documents.
    """
    rng = np.random.default_rng(seed)
    order, turn = rng.permutation(np.flatnonzero(targets >= size)), 0
    while len(order := order[targets[order] >= (turn + 1) * size]):
        yield from ((int(document), turn * size, size) for document in order)
        turn += 1
    for document in rng.permutation(np.flatnonzero(targets % size)):
        rest = int(targets[document]) % size
        yield int(document), int(targets[document]) - rest, rest
