"""A folder of tokenized texts: a text that was tokenized before, with the same tokenizer, is read from this folder."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stickjax.data.tokenizer import HuggingFaceTokenizer, Tokenizer, token_dtype
from stickjax.system.disk import write_file
from stickjax.system.text import printable

log = logging.getLogger(__name__)

_FORMAT = b"stickjax-token-cache-1"
_DIGEST = 32  # bytes of a sha256


class TokenCache:
    """The tokens of batches of documents, as files in a folder. The folder is created when the first file is written.

    The name of a file is the sha256 of the tokenizer, of the version of the package `tokenizers` if the tokenizer uses
    it, and of all texts of the batch. So a changed text or another tokenizer has another file, and nobody has to clear
    the folder. Old files may be deleted at any time.

    A file has the sha256 of the rest of the file (32 bytes), the position after the last token of each document
    (int64), and the tokens of all documents. A file is written completely or not at all, so several processes may use
    the folder at the same time. If the sha256 of a file is wrong, a warning is logged, and the file is made again. If
    the folder cannot be written, a warning is logged, and the texts are tokenized without it.

    >>> import tempfile
    >>> from stickjax.data.tokenizer import ByteTokenizer
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = TokenCache(folder, ByteTokenizer())
    ...     made, read = cache.documents(["a", "é"]), cache.documents(["a", "é"])
    ...     len(list(Path(folder).iterdir())), [ids.tolist() for ids in read]
    (1, [[97, 256], [195, 169, 256]])
    """

    def __init__(self, folder: str, tokenizer: Tokenizer):
        self._folder, self._tokenizer, self._writable = Path(folder), tokenizer, True
        self._dtype = token_dtype(tokenizer.vocab_size)
        about = [tokenizer.name, str((tokenizer.vocab_size, tokenizer.eot, tokenizer.prefix))]
        if isinstance(tokenizer, HuggingFaceTokenizer):
            import tokenizers

            about.append(tokenizers.__version__)  # another version may encode a text in another way
        content = [part for name, data in sorted(tokenizer.files.items()) for part in (name.encode(), data)]
        self._identity = _digest([_FORMAT, *(text.encode() for text in about), *content])

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids [n] of each document, as `Tokenizer.documents` does. The arrays may be read-only."""
        file = self._folder / f"{_digest([self._identity, *(text.encode() for text in texts)]).hex()}.tokens"
        if (found := self._read(file, len(texts))) is None:
            found = self._tokenizer.documents(texts)
            self._write(file, found)
        return found

    def _read(self, file: Path, count: int) -> list[np.ndarray] | None:
        """Return the token ids of the `count` documents of a file; None if there is no such file, or it is damaged."""
        try:
            content = memoryview(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            reason = error.strerror
            log.warning("data.cache: cannot read %s, so its text is tokenized again: %s", printable(file), reason)
            return None
        rest = content[_DIGEST:]
        if hashlib.sha256(rest).digest() != content[:_DIGEST]:
            log.warning("data.cache: %s is damaged, so its text is tokenized again", printable(file))
            return None
        ends = np.frombuffer(rest, "<i8", count)
        return np.split(np.frombuffer(rest, self._dtype, offset=ends.nbytes), ends[:-1])

    def _write(self, file: Path, documents: list[np.ndarray]) -> None:
        if not self._writable or not documents:
            return
        ends = np.cumsum([len(ids) for ids in documents], dtype="<i8")
        rest = ends.tobytes() + np.concatenate(documents, dtype=self._dtype).tobytes()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(file, hashlib.sha256(rest).digest() + rest)
        except OSError as error:
            self._writable = False
            reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
            log.warning("data.cache=%r is not used, because it cannot be written: %s", str(self._folder), reason)


def _digest(parts: Sequence[bytes]) -> bytes:
    """Return the sha256 of several byte strings. Their lengths count too, so ["ab", "c"] differs from ["a", "bc"]."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
