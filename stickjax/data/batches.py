"""Batches for training: the token stream of a corpus is cut into windows of T + 1 tokens.

    source -> Corpus (train, held-out) -> train_loader: batches   |   data.heldout: windows for evaluation
    stickjax.data.tasks -> task_loader: batches of examples, without a token stream

`stickjax.data.readers` chooses the training data of a model. `python -m stickjax.data tokenize SOURCE OUT` writes a
token file, and `verify OUT` compares it with its sha256.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import grain
import numpy as np

from stickjax.config import Config, DataConfig
from stickjax.config.fields import one_of
from stickjax.data.corpus import Corpus, load_corpus
from stickjax.data.tasks import TASKS
from stickjax.data.tokenizer import Tokenizer


class _Windows:
    """Random access to windows of T + 1 tokens at stride T, so that no target is in two windows."""

    def __init__(self, tokens: np.ndarray, T: int):
        self.tokens, self.T = tokens, T

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.T

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self.tokens[index * self.T : (index + 1) * self.T + 1], np.int32)


def make_batch(windows: np.ndarray, eot: int, bos: int | None = None) -> dict[str, np.ndarray]:
    """Convert windows [B, T + 1] into a training batch of arrays [B, T].

    `tokens` (int32) is a window without its last token, and `targets` (int32) is a window without its first token.
    `segment_ids` (int32) number the documents within the window. `loss_mask` (bool) is False where a target is not
    trained.

    A document begins in training as in sampling. As a target, an end of text belongs to the document that it ends. As
    an input, an end of text belongs to the next document, whose first token is predicted from it. There is one
    exception: if the next document begins with `bos`, the end of text is the last input of the document that it ends,
    and its target, `bos`, is not trained.

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
    """Return the endless batches of this process: B // process_count examples of a source, stacked.

    Every epoch visits every example once, in a new order set by `seed`. The batches of all processes, concatenated by
    process_index, are the batch of a single process.

    `get_state()` of the result is a small JSON value, which is the same on every process. `set_state()` continues from
    it at once, bit for bit, with any process_count.

    Args:
      source: the examples, with random access.
      transform: a function that is applied to whole batches.
      first: examples that come before all others, in their order.

    Raises ValueError if there are no examples, or if B is not a multiple of process_count.

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
    # Epoch e is shuffled by seed + e. Without this hash, runs with neighbouring seeds would share all but one epoch.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    epochs = grain.MapDataset.source(source).shuffle(seed=seed)
    if len(first):  # concatenated datasets must be finite; so `first` comes again, but only after 10,000 epochs
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
    """Return the endless `batches` of the windows of a text: dicts of `make_batch`, arrays [B // process_count, T].

    Raises ValueError if the text has fewer than T + 1 tokens or B is not a multiple of process_count.

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
    """Return the endless `batches` of a task of `stickjax.data.tasks`.

    The examples are `examples(part, T=config.T, **options)` of the task. `config.seed` sets their order; the option
    `seed` sets the examples themselves.

    Raises ValueError for an unknown task, and for the same reasons as `examples` and `batches`.

    >>> batch = next(task_loader("recall", DataConfig(T=8, B=4), keys=2))
    >>> {name: array.shape for name, array in batch.items()}
    {'loss_mask': (4, 8), 'segment_ids': (4, 8), 'targets': (4, 8), 'tokens': (4, 8)}
    """
    one_of("task", task, TASKS)
    source = TASKS[task].examples(part, T=config.T, **options)
    return batches(source, config.B, config.seed, process_index=process_index, process_count=process_count)


class TrainingData(NamedTuple):
    """The training data of a run. `loader(index, count)` returns the batches of process `index` of `count`."""

    loader: Callable[[int, int], grain.DatasetIterator]
    vocab_size: int
    hash: str
    source: str
    summary: str
    tokenizer: Tokenizer | None = None  # only for a text
    heldout_source: str | None = None  # only for a text
    heldout_hash: str | None = None  # only for a text


def text_data(config: Config) -> TrainingData:
    """Load a text as training data. Raises ValueError for a curriculum, or if the source cannot be read."""
    d = config.data
    if d.curriculum:
        raise ValueError(f"curriculum={d.curriculum} orders pairs of sentences; this model reads a text")
    corpus, heldout = load_corpus(d)
    loader = lambda index, count: train_loader(corpus, d, process_index=index, process_count=count)  # noqa: E731
    held = f"{heldout.documents:,} documents ({len(heldout.tokens):,} tokens) are held out"
    summary = f"{corpus.summary()}; {held}"
    return TrainingData(
        loader, corpus.tokenizer.vocab_size, corpus.hash, corpus.source, summary, corpus.tokenizer,
        heldout.source, heldout.hash,
    )  # fmt: skip
