"""From tokens to batches: the stream of a corpus is cut into windows of T + 1 tokens.

    source -> Corpus (train, held-out) -> train_loader: batches   |   heldout_windows: evaluation
    stickjax.data.tasks -> task_loader: batches of examples, with no stream of tokens between

`python -m stickjax.data tokenize SOURCE OUT` writes a token file, `verify OUT` compares it with its sha256.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np

from stickjax.config import Config, DataConfig
from stickjax.config.fields import one_of
from stickjax.data.corpus import Corpus, document_ends, load_corpus
from stickjax.data.tasks import TASKS, Examples, logic
from stickjax.data.token_files import tokenize
from stickjax.data.tokenizer import Tokenizer
from stickjax.system.text import printable

log = logging.getLogger(__name__)

__all__ = [
    "Corpus",
    "EvalWindows",
    "TrainingData",
    "batches",
    "heldout_windows",
    "load_corpus",
    "make_batch",
    "pair_examples",
    "task_loader",
    "tokenize",
    "train_loader",
    "training_data",
]


class _Windows:
    """Random access to windows of T + 1 tokens at stride T: every target of the stream is in one of them."""

    def __init__(self, tokens: np.ndarray, T: int):
        self.tokens, self.T = tokens, T

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.T

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self.tokens[index * self.T : (index + 1) * self.T + 1], np.int32)


def make_batch(windows: np.ndarray, eot: int, bos: int | None = None) -> dict[str, np.ndarray]:
    """Turn windows [B, T + 1] into what the model is trained on, each of shape [B, T].

    `tokens` and `targets` (int32) are the window without its last and its first token. `segment_ids` (int32)
    number the documents within the window. `loss_mask` (bool) is False where a target is not trained.

    A text begins in training as it does in sampling. As a target, an end of text belongs to the document that it ends.
    As an input, it is the first token of the next document: that document's first token is predicted from it. If the
    next document begins with `bos`, the end of text is the last input of the document that it ends, and its target,
    `bos`, is not trained.

    >>> {name: array.tolist() for name, array in make_batch(np.array([[7, 8, 9, 5]]), eot=8).items()}
    {'tokens': [[7, 8, 9]], 'targets': [[8, 9, 5]], 'segment_ids': [[0, 1, 1]], 'loss_mask': [[True, True, True]]}
    >>> {name: array.tolist() for name, array in make_batch(np.array([[7, 8, 9, 5]]), eot=8, bos=9).items()}
    {'tokens': [[7, 8, 9]], 'targets': [[8, 9, 5]], 'segment_ids': [[0, 0, 1]], 'loss_mask': [[True, False, True]]}
    """
    tokens, targets = np.asarray(windows[:, :-1], np.int32), np.asarray(windows[:, 1:], np.int32)
    ends = tokens == eot
    last = ends & (False if bos is None else targets == bos)
    segment_ids = np.cumsum(ends, axis=1, dtype=np.int32) - last
    return dict(tokens=tokens, targets=targets, segment_ids=segment_ids - segment_ids[:, :1], loss_mask=~last)


def batches(
    source: Sequence,
    B: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    transform: Callable | None = None,
    first: Sequence = (),
) -> grain.DatasetIterator:
    """Endless batches of this process from a source with random access: B // process_count examples, stacked.

    Every epoch visits every example once, in a new order set by `seed`. The shares of all processes,
    concatenated by process_index, are the batch of a single process. `get_state()` is a small JSON value,
    the same on every process, and `set_state()` continues there at once, bit for bit, with any
    process_count. `transform` is applied to whole batches. The examples of `first` come before all others, in their
    order.

    Raises ValueError when there are no examples, or B is not a multiple of process_count.

    >>> loader = batches(range(6), B=3, seed=0)
    >>> np.sort(np.concatenate([next(loader), next(loader)]))
    array([0, 1, 2, 3, 4, 5])
    """
    if B % process_count:
        raise ValueError(f"B={B} sequences must be a multiple of process_count={process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be in 0..{process_count - 1}")
    if not len(source):
        raise ValueError(f"no examples to draw B={B} of")
    # Epoch e is shuffled by seed + e: neighbouring seeds would share all but one of their epochs.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    epochs = grain.MapDataset.source(source).shuffle(seed=seed)
    if len(first):  # a dataset cannot follow an endless one, so the repetitions of `first` only come very late
        epochs = grain.MapDataset.concatenate([grain.MapDataset.source(first), epochs.repeat(10_000)])
    dataset = (
        epochs.repeat().batch(B // process_count, drop_remainder=True).slice(slice(process_index, None, process_count))
    )
    if transform is not None:
        dataset = dataset.map(transform)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def train_loader(
    corpus: Corpus, config: DataConfig, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless `batches` of the windows of a text: dicts of `make_batch` with arrays [B // process_count, T].

    Raises ValueError when the text has fewer than T + 1 tokens or B is not a multiple of process_count.

    >>> config = DataConfig(T=8, B=4)
    >>> next(train_loader(load_corpus(config)[0], config))["tokens"].shape
    (4, 8)
    """
    windows, eot, bos = _Windows(corpus.tokens, config.T), corpus.tokenizer.eot, corpus.tokenizer.bos
    if not len(windows):
        raise ValueError(
            f"T={config.T} needs {config.T + 1} tokens, but {corpus.source} has {len(corpus.tokens)} to train on"
        )
    share = dict(process_index=process_index, process_count=process_count)
    return batches(windows, config.B, config.seed, **share, transform=lambda windows: make_batch(windows, eot, bos))


def task_loader(
    task: str, config: DataConfig, part: str = "train", *, process_index: int = 0, process_count: int = 1, **options
) -> grain.DatasetIterator:
    """Endless `batches` of a task of `stickjax.data.tasks`: the arrays of its `examples(part, T=config.T, **options)`.

    `config.seed` orders the examples; which examples there are is set by the option `seed`.

    Raises ValueError for an unknown task, and what `examples` and `batches` raise.

    >>> batch = next(task_loader("recall", DataConfig(T=8, B=4), keys=2))
    >>> {name: array.shape for name, array in batch.items()}
    {'loss_mask': (4, 8), 'segment_ids': (4, 8), 'targets': (4, 8), 'tokens': (4, 8)}
    """
    one_of("task", task, TASKS)
    source = TASKS[task].examples(part, T=config.T, **options)
    return batches(source, config.B, config.seed, process_index=process_index, process_count=process_count)


class TrainingData(NamedTuple):
    """What a run is trained on. `loader(index, count)`: the batches of one of `count` processes."""

    loader: Callable[[int, int], grain.DatasetIterator]
    vocab_size: int
    hash: str
    source: str
    summary: str
    tokenizer: Tokenizer | None = None  # of a text
    heldout_source: str | None = None  # of a text
    heldout_hash: str | None = None  # of a text


def training_data(config: Config) -> TrainingData:
    """Windows of the text, or for a model with classes the pairs of the task `logic`.

    Raises ValueError for a source without pairs, and what the sources raise.
    """
    d = config.data
    if not getattr(config.model, "classes", 0):
        if d.curriculum:
            raise ValueError(f"curriculum={d.curriculum} orders pairs of sentences; the model has classes=0")
        corpus, heldout = load_corpus(d)
        loader = lambda index, count: train_loader(corpus, d, process_index=index, process_count=count)  # noqa: E731
        held = f"{heldout.documents:,} documents ({len(heldout.tokens):,} tokens) are held out"
        summary = f"{corpus.summary()}; {held}"
        return TrainingData(
            loader, corpus.tokenizer.vocab_size, corpus.hash, corpus.source, summary, corpus.tokenizer,
            heldout.source, heldout.hash,
        )  # fmt: skip
    pairs = pair_examples(config, "train")
    source = LengthBucketedBatches(pairs, d.B, d.seed)
    digest = hashlib.sha256("\n".join(f"{row}" for row in pairs.rows).encode()).hexdigest()[:16]

    def loader(index: int, count: int) -> grain.DatasetIterator:
        rows = slice(index * d.B // count, (index + 1) * d.B // count)
        own = lambda batch: {name: array[0][rows] for name, array in batch.items()}  # noqa: E731
        return batches(source, 1, d.seed, transform=own, first=_ShortFirst(source, d.curriculum, d.seed))

    name = f"pairs of {d.source}"
    return TrainingData(loader, len(logic.VOCABULARY), digest, name, f"{len(pairs):,} {name}, {digest}")


class LengthBucketedBatches:
    """Random access to batches of B pairs of about the same length, the shortest first, padded to a multiple of 8.

    A batch of random pairs would be padded to its longest sentence, which takes twice the work. The seed decides which
    pairs of the same length are in one batch.
    """

    def __init__(self, pairs: Examples, B: int, seed: int):
        longest = np.array([max(side.count(" ") + 1 for side in row[:2]) for row in pairs.rows])
        order = np.random.default_rng(seed).permutation(len(longest))
        order = order[np.argsort(longest[order], kind="stable")]
        self.pairs, self.batches = pairs, order[: len(order) // B * B].reshape(-1, B)
        self.T = -(-longest[self.batches].max(1, initial=0) // 8) * 8

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pairs = [self.pairs[i] for i in self.batches[index]]
        batch = {name: np.stack([pair[name] for pair in pairs]) for name in pairs[0]}
        return batch | {side: batch[side][:, : self.T[index]] for side in ("left", "right")}


class _ShortFirst:
    """A curriculum over batches that are sorted by length: step i draws from the first max(1/10, (i + 1) / steps) of
    them."""

    def __init__(self, source: LengthBucketedBatches, steps: int, seed: int):
        self.source, self.steps, self.seed = source, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        known = max(1, int(len(self.source) * max(0.1, (index + 1) / self.steps)))
        return self.source[int(np.random.default_rng([self.seed, index]).integers(known))]


def pair_examples(config: Config, part: str, **options) -> Examples:
    """The training or the held-out part of the `data.examples` pairs of sentences that are drawn for a classifier."""
    if config.data.source != "logic":
        raise ValueError(f"classes={config.model.classes} needs pairs: source='logic', not {config.data.source!r}")
    if config.model.classes != (relations := len(logic.RELATIONS)):
        raise ValueError(f"classes={config.model.classes} must be the {relations} relations of source='logic'")
    options = dict(T=config.data.T, draws=config.data.examples) | options
    return logic.examples(part, **options)


@dataclass(frozen=True, eq=False)
class EvalWindows:
    """Held-out windows of at most M * T targets, each inside one document; M is the largest of `lengths`."""

    tokens: np.ndarray  # [W, longest + 1], int32; the first token is the input of the first target
    targets: np.ndarray  # [W], the number of targets of each window; the rest of its row is padding
    T: int
    lengths: tuple[int, ...]  # multiples of T that some document reaches
    bytes: int  # of the text of all targets

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
    """Windows to evaluate contexts of m * T tokens for every m of `lengths` on the same targets.

    No window crosses a document. A document begins as in training: with its own first token if that is the tokenizer's
    bos, otherwise after an end of text. All later tokens are targets, including the document's end of text.

    Windows of M * T targets come first, where M is the largest length: one from each document before a second from any,
    in an order set by `seed`. Then come the remaining parts: whole short documents, and the ends of longer ones. At
    least one window is taken, and then as many as have no more than `max_tokens` targets together.

    Lengths that no document reaches are left out, which is logged; the smallest always stays.

    Raises ValueError when a length does not divide the largest, or `max_tokens` is below 1.

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
        starts = starts + (corpus.tokens[starts] == bos)  # of the first target
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
        own = first or (start and corpus.tokens[start - 1] == bos)  # the token before belongs to the same document
        before = corpus.tokens[start - 1] if own else eot
        windows.append(np.append(before, corpus.tokens[start : start + n]).astype(np.int32))
    targets = np.array([len(window) - 1 for window in windows])
    tokens = np.stack([np.pad(window, (0, targets.max() + 1 - len(window))) for window in windows])
    # Each window is decoded with the token before its first target, whose own bytes are then subtracted.
    count = corpus.tokenizer.count_bytes
    return EvalWindows(tokens, targets, T, kept, sum(count(window) - count(window[:1]) for window in windows))


def _parts(targets: np.ndarray, size: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """Cut documents into parts of `size` targets: (document, first target, number of targets), the full parts first."""
    rng = np.random.default_rng(seed)
    order, turn = rng.permutation(np.flatnonzero(targets >= size)), 0
    while len(order := order[targets[order] >= (turn + 1) * size]):
        yield from ((int(document), turn * size, size) for document in order)
        turn += 1
    for document in rng.permutation(np.flatnonzero(targets % size)):
        rest = int(targets[document]) % size
        yield int(document), int(targets[document]) - rest, rest
