"""Windows of held-out text, to evaluate how well a model predicts the same tokens with contexts of several lengths."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stickjax.data.corpus import Corpus, document_ends
from stickjax.system.text import printable

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EvalWindows:
    """Windows of held-out text, to evaluate a model with contexts of m * T tokens, for every m in `lengths`.

    A window is one input token, followed by at most max(lengths) * T target tokens to predict. All targets of a window
    are from one document. Row w of `tokens` is window w, and `targets[w]` is its number of targets.
    """

    tokens: np.ndarray  # [W, longest + 1], int32: each row is the first input, the targets of one window, and padding
    targets: np.ndarray  # [W], the number of targets of each window; the longest window has `longest` targets
    T: int  # the number of tokens of the context for m = 1
    lengths: tuple[int, ...]  # the values of m; `heldout_windows` leaves out values that are too large for the text
    bytes: int  # number of bytes of the text of all targets

    def pieces(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut the windows into P pieces, in which the context of a target is at most m * T tokens.

        Return (tokens [P, size + 1], target mask [P, size]). The inputs of a piece are its first `size` tokens. The
        mask at [p, i] is True if token i + 1 of piece p is a target, and False if this token is padding. `size` is
        m * T, or less if all windows are shorter. For every m, each target is in exactly one piece.
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
    """Choose windows of a held-out text, to compare the loss of a model with contexts of m * T tokens.

    The targets (tokens to predict) are the same for every m in `lengths`. A window is one input token, followed by
    targets from one document. The input token is the token before the first target. At the beginning of a document, it
    is the `bos` of the document, or the end-of-text token if the document has no `bos`. The `bos` is not a target.
    Windows of max(lengths) * T targets are taken first: one from each document that is long enough, then a second one
    from each, and so on. Then come shorter documents and the rest of long ones. At least one window is taken.

    Args:
      corpus: the held-out token stream.
      T: the number of tokens of the context for m = 1.
      lengths: the values of m. If no document has m * T targets, m is left out and logged. The smallest m always stays.
      max_tokens: the largest number of targets in all windows together; the first window may have more.
      seed: decides the order in which documents are taken.

    Raises ValueError if a length is below 1 or does not divide the largest length, or if `max_tokens` is below 1.

    >>> from stickjax.config import DataConfig
    >>> from stickjax.data.corpus import load_corpus
    >>> corpus = load_corpus(DataConfig())[1]
    >>> windows = heldout_windows(corpus, 64, lengths=(1, 2), max_tokens=1024)
    >>> windows.tokens.shape, windows.pieces(1)[0].shape
    ((8, 129), (16, 65))
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    check_lengths(lengths)
    eot, bos, ends = corpus.tokenizer.eot, corpus.tokenizer.bos, document_ends(corpus.tokens, corpus.tokenizer.eot)
    starts = np.append(0, ends[:-1])
    if bos is not None:
        starts = starts + (corpus.tokens[starts] == bos)  # positions of the first targets
    kept = tuple(m for m in lengths if m * T <= (ends - starts).max()) or (min(lengths),)
    if kept != tuple(lengths):
        left_out = ", ".join(str(m) for m in lengths if m not in kept)
        message = "the longest held-out document of %s has %d tokens: contexts of %s times T=%d tokens are left out"
        log.warning(message, printable(corpus.source), (ends - starts).max(), left_out, T)
    chosen, total = [], 0
    for document, first, n in _parts(ends - starts, max(kept) * T, seed):
        if chosen and total + n > max_tokens:
            break
        chosen.append((document, first, n))
        total += n
    windows = []
    for document, first, n in sorted(chosen):
        start = starts[document] + first
        own = first or (start and corpus.tokens[start - 1] == bos)  # whether the previous token is in this document
        before = corpus.tokens[start - 1] if own else eot
        windows.append(np.append(before, corpus.tokens[start : start + n]).astype(np.int32))
    targets = np.array([len(window) - 1 for window in windows])
    tokens = np.stack([np.pad(window, (0, targets.max() + 1 - len(window))) for window in windows])
    # The bytes of a window: decode it with the token before its first target, then subtract the bytes of that token.
    count = corpus.tokenizer.count_bytes
    return EvalWindows(tokens, targets, T, kept, sum(count(window) - count(window[:1]) for window in windows))


def check_lengths(lengths: tuple[int, ...]) -> None:
    """Raise ValueError if a length is below 1 or does not divide the largest length."""
    for m in lengths:
        if m < 1:
            raise ValueError(f"lengths={lengths}: every length must be at least 1, got {m}")
        if (largest := max(lengths)) % m:
            raise ValueError(f"lengths={lengths}: every length must divide the largest length, {largest}, not {m}")


def _parts(targets: np.ndarray, size: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """Divide documents into parts of at most `size` targets (tokens to predict). Yield the full parts first.

    A part is (index of the document, index of the part's first target in the document, number of targets in the part).
    `targets` [n] has the number of targets of each of the n documents. `seed` decides the order of the documents.
    """
    rng = np.random.default_rng(seed)
    order, turn = rng.permutation(np.flatnonzero(targets >= size)), 0
    while len(order := order[targets[order] >= (turn + 1) * size]):
        yield from ((int(document), turn * size, size) for document in order)
        turn += 1
    for document in rng.permutation(np.flatnonzero(targets % size)):
        rest = int(targets[document]) % size
        yield int(document), int(targets[document]) - rest, rest
