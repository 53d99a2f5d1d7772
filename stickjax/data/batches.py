"""Batches for training: windows of T + 1 tokens from a token stream, or examples of a task.

    source -> Corpus (training part) -> train_loader: batches for training
    source -> Corpus (held-out part) -> stickjax.data.heldout: windows for evaluation
    stickjax.data.tasks -> task_loader: batches of examples, without a token stream

A source is a text, such as a folder of files. A Corpus is one token stream, made from a source.
`stickjax.data.readers` chooses the training data of a model. If a text does not fit into memory, convert it to a token
file by `python -m stickjax.data tokenize SOURCE OUT`, and use the token file as the source.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from stickjax.config import Config, DataConfig
from stickjax.config.fields import one_of
from stickjax.config.mixture import names_of
from stickjax.data.corpus import Corpus, load_corpora
from stickjax.data.mixture import Mixture
from stickjax.data.tasks import TASKS
from stickjax.data.tokenizer import Tokenizer


class _Windows:
    """Random access to windows of T + 1 tokens in the token stream `tokens` [n], for `grain.MapDataset.source`.

    Window i begins at token i * T, so the last token of a window is also the first token of the next window. The
    targets of a window are its last T tokens, so no token is a target twice. Tokens after the last full window are left
    out.
    """

    def __init__(self, tokens: np.ndarray, T: int):
        self.tokens, self.T = tokens, T

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.T

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self.tokens[index * self.T : (index + 1) * self.T + 1], np.int32)


def make_batch(windows: np.ndarray, eot: int, bos: int | None = None) -> dict[str, np.ndarray]:
    """Convert B windows of tokens [B, T + 1] into a training batch: a dictionary of four arrays [B, T].

    `tokens`: int32, the inputs of the model: each window without its last token.
    `targets`: int32, the next token after each input.
    `segment_ids`: int32, the index of the document of each input. The first document of a window has index 0.
    `loss_mask`: bool, False where the target is left out of the loss.

    `eot` is the id of the token that ends every document. If every document begins with a special token, `bos` is the
    id of this token. Without `bos`, the model predicts the first token of a document from the `eot` in front of it, as
    in text generation. So an input `eot` is in the segment of the next document. With `bos`, an input `eot` in front of
    a `bos` stays in the segment of the document that it ends, and its target `bos` is left out of the loss.

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
    """Return an endless iterator over the batches of one process. A batch has B // process_count stacked examples.

    An epoch uses every example once, in an order that depends on `seed` and on the index of the epoch. The batches of
    all processes, concatenated in the order of process_index, are the batch of B examples that a single process would
    get.

    The method `get_state()` of the iterator returns its position as a small JSON value, which is the same in every
    process. After `set_state(value)`, a new iterator continues at this position. All processes together then get the
    same examples as without the interruption, even if process_count has changed.

    Args:
      source: the examples, with random access; or a `Mixture` of several sources, each with its own epochs.
      B: the number of examples in a batch, over all processes.
      seed: the seed of the order of the examples.
      process_index: the index of this process, from 0.
      process_count: the number of processes.
      transform: a function from a batch to a batch, which is applied to each batch.
      first: examples that come before the first epoch, in the order of this sequence; not for a `Mixture`.

    Raises ValueError if `source` is empty, if B is not a multiple of process_count, or if process_index is not in
    0..process_count - 1.

    >>> loader = batches(range(6), B=3, seed=0)
    >>> np.sort(np.concatenate([next(loader), next(loader)]))
    array([0, 1, 2, 3, 4, 5])
    """
    if B % process_count:
        raise ValueError(
            f"B={B} sequences must be a multiple of process_count={process_count}, the number of processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be in 0..{process_count - 1}")
    if not len(source):
        raise ValueError(
            "no example can be used: the data is empty, or all examples have more than T tokens; use other data or a "
            "larger T"
        )
    examples = source.dataset(seed) if isinstance(source, Mixture) else _in_epochs(source, seed, first)
    dataset = examples.batch(B // process_count, drop_remainder=True).slice(slice(process_index, None, process_count))
    if transform is not None:
        dataset = dataset.map(transform)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def _in_epochs(source: Sequence, seed: int, first: Sequence) -> grain.MapDataset:
    """Return an endless sequence: the examples in `first`, then the examples in `source`, epoch after epoch."""
    # Grain shuffles epoch e with the seed `seed` + e. Without this hash of `seed`, epoch 1 of a run with seed 0 would
    # have the same order as epoch 0 of a run with seed 1.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    epochs = grain.MapDataset.source(source).shuffle(seed=seed)
    if len(first):  # Grain concatenates only finite datasets. So `first` is repeated, but only after 10,000 epochs.
        epochs = grain.MapDataset.concatenate([grain.MapDataset.source(first), epochs.repeat(10_000)])
    return epochs.repeat()


def _windows(corpora: Sequence[Corpus], T: int) -> list[_Windows]:
    """Return the windows of each token stream. Raise ValueError if a stream has fewer than T + 1 tokens."""
    for corpus in corpora:
        if len(corpus.tokens) <= T:
            raise ValueError(
                f"T={T} needs at least {T + 1} tokens, but the training part of {corpus.source} has "
                f"{len(corpus.tokens)}"
            )
    return [_Windows(corpus.tokens, T) for corpus in corpora]


def train_loader(
    corpus: Corpus | Sequence[Corpus], config: DataConfig, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Return an endless iterator over the training batches of one process, made from the token stream `corpus`.

    An example is a window of T + 1 tokens. A batch is a dictionary of arrays [B // process_count, T]; the function
    `make_batch` explains the arrays. `config` has T, B and the seed of the order of the windows. The function `batches`
    explains the order, and how to save the position of the iterator.

    Args:
      corpus: the token stream; for a mixture, the token streams of its sources, as from `load_corpora`.
      config: the data section of a config.
      process_index: the index of this process, from 0.
      process_count: the number of processes, which divide the batch of B examples.

    Raises ValueError if a text has fewer than T + 1 tokens, or if B is not a multiple of process_count.

    >>> config = DataConfig(T=8, B=4)
    >>> next(train_loader(load_corpora(config)[0], config))["tokens"].shape
    (4, 8)
    """
    corpora = [corpus] if isinstance(corpus, Corpus) else corpus
    eot, bos, windows = corpora[0].tokenizer.eot, corpora[0].tokenizer.bos, _windows(corpora, config.T)
    source = windows[0] if len(windows) == 1 else Mixture(windows, [row.weight for row in config.mixture])
    share = dict(process_index=process_index, process_count=process_count)
    return batches(source, config.B, config.seed, **share, transform=lambda windows: make_batch(windows, eot, bos))


def task_loader(
    task: str, config: DataConfig, part: str = "train", *, process_index: int = 0, process_count: int = 1, **options
) -> grain.DatasetIterator:
    """Return an endless iterator over the batches of one process, made from the examples of a synthetic task.

    A batch is a dictionary {name: array [B // process_count, ...]}. The function `batches` explains the order of the
    examples, and how to save the position of the iterator.

    Args:
      task: a key of `stickjax.data.tasks.TASKS`, such as "recall".
      config: the data section of a config; T, B and `seed` are used. `seed` decides the order of the examples.
      part: "train", "test", or another part that the function `examples` of the task explains.
      process_index: the index of this process, from 0.
      process_count: the number of processes, which divide the batch of B examples.
      options: arguments for the function `examples` of the task. The option `seed` is not `config.seed`: it decides the
        content of the examples.

    Raises ValueError for an unknown task, and for the same reasons as `examples` and `batches`.

    >>> batch = next(task_loader("recall", DataConfig(T=8, B=4), keys=2))
    >>> {name: array.shape for name, array in batch.items()}
    {'loss_mask': (4, 8), 'segment_ids': (4, 8), 'targets': (4, 8), 'tokens': (4, 8)}
    """
    one_of("task", task, TASKS)
    source = TASKS[task].examples(part, T=config.T, **options)
    return batches(source, config.B, config.seed, process_index=process_index, process_count=process_count)


class TrainingData(NamedTuple):
    """The training data of a run: a loader of batches, and what a run records and prints about the data.

    `loader`: a function from (process_index, process_count) to an endless iterator over the batches of this process.
    `ids`: the sizes of the data, {field of the model config: number}, such as {"V": 257}; V is the number of token ids.
    `hash`: 16 hex digits that identify the data; a run can be resumed only with data of the same hash.
    `source`: the name of the data in messages.
    `summary`: a line about the data, which training prints at its start.
    `tokenizer`, `heldout_source`, `heldout_hash`: the tokenizer, and the name and the hash of the held-out data. They
      are None if the data are neither a text nor labelled rows.
    `files`: {name: content} of the files that a run folder keeps besides the files of the tokenizer.
    `heldout`: the token stream of the held-out text; None if the data are not a text.
    `metrics`: a function from a state of the iterator (`get_state()`) to metrics of the data, {name: number}.
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
    heldout: Corpus | None = None  # only for a text
    metrics: Callable[[dict], dict[str, float]] = lambda state: {}


def text_data(config: Config) -> TrainingData:
    """Load the text that `config.data` names, and return it as training data for a language model.

    Raises ValueError if the text cannot be read, or if the config has a field that needs examples instead of a text,
    such as a curriculum.
    """
    d = config.data
    if d.curriculum:
        raise ValueError(
            f"curriculum={d.curriculum} is for examples, such as pairs of sentences, but this model reads a text; "
            "set data.curriculum=0"
        )
    if d.split is not None:
        raise ValueError(f"split={d.split!r} is for examples, but this model reads a text; leave data.split out")
    if d.valid_every:
        raise ValueError(
            f"valid_every={d.valid_every} is for examples, but this model reads a text; set data.valid_every=0"
        )
    if d.source == "labelled":
        raise ValueError(
            "source='labelled' needs a classifier; this model reads a text: use a config such as sut_logic or "
            "om_logic, or set data.source=text"
        )
    corpora, heldout = load_corpora(d)
    loader = lambda index, count: train_loader(corpora, d, process_index=index, process_count=count)  # noqa: E731
    about = dict(hash=corpora[0].hash, source=corpora[0].source, summary=corpora[0].summary())
    if d.mixture is not None:
        about = _about_mixture(corpora, d)
    noun, verb = ("document", "is") if heldout.documents == 1 else ("documents", "are")
    about["summary"] += f"; {heldout.documents:,} {noun} ({len(heldout.tokens):,} tokens) {verb} held out"
    return TrainingData(
        loader, {"V": heldout.tokenizer.vocab_size}, **about, tokenizer=heldout.tokenizer,
        heldout_source=heldout.source, heldout_hash=heldout.hash, heldout=heldout,
    )  # fmt: skip


def _about_mixture(corpora: Sequence[Corpus], config: DataConfig) -> dict:
    """Return the fields hash, source, summary and metrics of `TrainingData` for the sources of a mixture."""
    weights = [row.weight for row in config.mixture]
    digest = ",".join(f"{weight!r}:{corpus.hash}" for weight, corpus in zip(weights, corpora, strict=True))
    rows = [f"{weight:g} x {corpus.summary()}" for weight, corpus in zip(weights, corpora, strict=True)]
    names = names_of(config.mixture)

    def metrics(state: dict) -> dict[str, float]:
        n, mixture = state["next_index"] * config.B, Mixture(_windows(corpora, config.T), weights)
        shares = {f"share/{name}": count / max(n, 1) for name, count in zip(names, mixture.counts(n), strict=True)}
        return shares | {f"epoch/{name}": epoch for name, epoch in zip(names, mixture.epochs(n), strict=True)}

    return dict(
        hash=hashlib.sha256(digest.encode()).hexdigest()[:16], source=config.mixture_text,
        summary="\n  + ".join(rows), metrics=metrics,
    )  # fmt: skip
