"""Convert many documents to token ids, several at a time, and show the progress."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from stickjax.data.token_cache import TokenCache
from stickjax.data.tokenizer import Tokenizer

_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 2**21, 4096  # a batch of documents ends when it reaches one of the two


def encode_documents(
    texts: Iterable[str], tokenizer: Tokenizer, cache: str | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """For every document in `texts`, in order, yield (token ids [n], number of bytes of the text).

    The ids are the same as from `tokenizer.document(text)`. Documents are encoded in batches, because a
    `HuggingFaceTokenizer` encodes the documents of a batch in parallel, on all CPU cores. A batch ends as soon as it
    has about two million characters or 4096 documents. Only one batch is in memory.

    `cache` is the folder of a `TokenCache`: a batch that was encoded before is read from there.

    Raises ValueError if the tokenizer cannot encode a document.

    >>> from stickjax.data.tokenizer import ByteTokenizer
    >>> [(ids.tolist(), size) for ids, size in encode_documents(["a", "é"], ByteTokenizer())]
    [([97, 256], 1), ([195, 169, 256], 2)]
    """
    encode = tokenizer.documents if cache is None else TokenCache(cache, tokenizer).documents
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield from _encoded(batch, encode)
            batch, characters = [], 0
    yield from _encoded(batch, encode)


def _encoded(batch: list[str], encode: Callable[[list[str]], list[np.ndarray]]) -> Iterator[tuple[np.ndarray, int]]:
    for text, ids in zip(batch, encode(batch), strict=True):
        yield ids, len(text.encode())


def with_progress(texts: Iterable[str], verb: str) -> Iterator[str]:
    """Yield all `texts`, and write the progress on stderr: the number of documents so far, and the speed.

    In a terminal, the progress is one line, which changes twice a second and disappears at the end. In a file or a
    pipe, a new line is written every minute. `verb` is the first word of the line, such as "tokenize".

    >>> list(with_progress(["a", "b"], "read"))
    ['a', 'b']
    """
    terminal = sys.stderr.isatty()
    interval = 0.5 if terminal else 60
    start = last = time.monotonic()
    documents = characters = 0
    try:
        for text in texts:
            documents += 1
            characters += len(text)
            if (now := time.monotonic()) - last >= interval:
                last = now
                millions = characters / 1e6
                line = f"{verb}: {documents:,} documents, {millions:,.1f} million characters"
                line += f", {millions / (now - start):,.2f} million per second"
                # In a terminal the cursor returns to the start of the line, so that the next output replaces the line.
                print(
                    f"{line}\x1b[K\r" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True
                )
            yield text
    finally:
        if terminal:
            print("\x1b[K", end="", file=sys.stderr, flush=True)
