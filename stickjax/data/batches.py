"""Batches for training: windows of T + 1 tokens from a token stream, or examples of a task.

    source -> Corpus (training part) -> train_loader: batches for training
    source -> Corpus (held-out part) -> stickjax.data.heldout: windows for evaluation
    stickjax.data.tasks -> task_loader: batches of examples, without a token stream

`stickjax.data.readers` chooses the training data of a model. `python -m stickjax.data tokenize SOURCE OUT` writes a
token file, and `verify OUT` compares it with its sha256.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from stickjax.config import Config, DataConfig
from stickjax.config.fields import one_of
from stickjax.data.corpus import Corpus, load_corpus
from stickjax.data.tasks import TASKS
from stickjax.data.tokenizer import Tokenizer


class _Windows:
    """Random access to the windows [T + 1] of a token stream, for `grain.MapDataset.source`.

    A window begins every T tokens, so its last token is the first token of the next one. No target is in two windows.
    """

    def __init__(self, tokens: np.ndarray, T: int):
        self.tokens, self.T = tokens, T

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.T

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self.tokens[index * self.T : (index + 1) * self.T + 1], np.int32)


def make_batch(windows: np.ndarray, eot: int, bos: int | None = None) -> dict[str, np.ndarray]:
    """Convert B windows of tokens [B, T + 1] into a training batch: a dictionary of arrays [B, T].

    `tokens` (int32) is a window without its last token, and `targets` (int32) is a window without its first token.
    `segment_ids` (int32) number the documents within the window from 0. `loss_mask` (bool) is False where the target is
    not trained.

    `eot` is the id that ends every document. A document begins in training as it does when text is generated: its first
    token is predicted from `eot`. So `eot` as an input belongs to the next document, and `eot` as a target belongs to
    the document that it ends. There is one exception: if the next document begins with the id `bos`, then `eot` is the
    last input of the document that it ends, and the target of this input, `bos`, is not trained.

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
    """Return an endless iterator of batches. A batch of this process has B // process_count examples, stacked.

    Every epoch uses every example once, in a new order that depends on `seed`. If the batches of all processes are
    concatenated in the order of process_index, the result is the batch of B examples that a single process would have.

    `get_state()` of the iterator returns a small JSON value, which is the same in every process. `set_state()` with
    this value continues at once with the next batch, bit for bit, with any process_count.

    Args:
      source: the examples, with random access.
      B: the number of examples in a batch, over all processes.
      seed: the seed of the order of the examples.
      process_index: the index of this process, from 0.
      process_count: the number of processes.
      transform: a function that is applied to each batch.
      first: examples that come before the first epoch, in their own order.

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
        raise ValueError(f"there are no examples for a batch of B={B}")
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
    """Return an endless iterator of training batches from a text (see `batches`), for process `process_index`.

    A batch is a dictionary of arrays [B // process_count, T] (see `make_batch`). T, B and the seed of the order come
    from `config`.

    Raises ValueError if the text has fewer than T + 1 tokens, or if B is not a multiple of process_count.

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
    """Return an endless iterator of batches from a synthetic task (see `batches`), for process `process_index`.

    `task` is a key of `stickjax.data.tasks.TASKS`. The function `examples(part, T=config.T, **options)` of the task
    makes the examples. `config.seed` decides the order of the examples; the option `seed` decides their content.

    Raises ValueError for an unknown task, and for the same reasons as `examples` and `batches`.

    >>> batch = next(task_loader("recall", DataConfig(T=8, B=4), keys=2))
    >>> {name: array.shape for name, array in batch.items()}
    {'loss_mask': (4, 8), 'segment_ids': (4, 8), 'targets': (4, 8), 'tokens': (4, 8)}
    """
    one_of("task", task, TASKS)
    source = TASKS[task].examples(part, T=config.T, **options)
    return batches(source, config.B, config.seed, process_index=process_index, process_count=process_count)


class TrainingData(NamedTuple):
    """The training data of a run.

    `loader(index, count)`: returns the iterator of batches for process `index` of `count`.
    `ids`: the sizes that a model needs, {field of the model config: number}; "V" is the number of ids.
    `hash`: 16 hex digits that identify the data; a resumed run needs the same hash.
    `source`: the name of the data in messages. `summary`: a line for the training banner.
    `files`: {name: content} of the files that a run folder keeps besides the files of the tokenizer.
    """

    loader: Callable[[int, int], grain.DatasetIterator]
    ids: dict[str, int]
    hash: str
    source: str
    summary: str
    tokenizer: Tokenizer | None = None  # only for a text and for labelled rows
    heldout_source: str | None = None  # only for a text and for labelled rows
    heldout_hash: str | None = None  # only for a text and for labelled rows
    files: Mapping[str, bytes] = {}


def text_data(config: Config) -> TrainingData:
    """Load the text of a config as training data.

    Raises ValueError if the config has a field that a text does not support, such as a curriculum, or if the source
    cannot be read.
    """
    d = config.data
    if d.curriculum:
        raise ValueError(f"curriculum={d.curriculum} orders examples by their length; this model reads a text")
    if d.split is not None:
        raise ValueError(f"split={d.split!r} divides examples; this model reads a text")
    if d.valid_every:
        raise ValueError(f"valid_every={d.valid_every} divides examples; this model reads a text")
    if d.source == "labelled":
        raise ValueError("source='labelled' needs a classifier; this model reads a text")
    corpus, heldout = load_corpus(d)
    loader = lambda index, count: train_loader(corpus, d, process_index=index, process_count=count)  # noqa: E731
    held = f"{heldout.documents:,} documents ({len(heldout.tokens):,} tokens) are held out"
    summary = f"{corpus.summary()}; {held}"
    return TrainingData(
        loader, {"V": corpus.tokenizer.vocab_size}, corpus.hash, corpus.source, summary, corpus.tokenizer,
        heldout.source, heldout.hash,
    )  # fmt: skip
