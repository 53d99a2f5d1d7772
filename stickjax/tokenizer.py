"""Text to token ids and back: bytes, or a Hugging Face tokenizer.json.

A tokenizer has `name`, `vocab_size`, `eot` (the end-of-text id), `encode(text)`, `decode(ids)` and
`count_bytes(ids)`. The end of text has no text of its own: it decodes to nothing and counts no bytes.
"""

import codecs
import hashlib
from pathlib import Path

import numpy as np

# The names under which published tokenizers keep their end of text, in the order they are tried.
END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian unsigned type that holds every id of a vocabulary.

    >>> token_dtype(257)
    dtype('uint16')
    """
    return np.dtype("u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


class ByteTokenizer:
    """UTF-8 bytes: ids 0..255 are bytes, 256 is the end of text.

    >>> ByteTokenizer().encode("né")
    array([110, 195, 169], dtype=uint8)
    >>> ByteTokenizer().decode([110, 195, 169, 256])
    'né'
    """

    name = "byte"
    vocab_size = 257
    eot = 256

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, without the end of text: [n], n its length in bytes."""
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids) -> str:
        """The text of ids [n]; bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")

    def count_bytes(self, ids) -> int:
        """How many bytes of text the ids [n] stand for."""
        return int(np.count_nonzero(np.asarray(ids) < 256))


class HuggingFaceTokenizer:
    """A tokenizer.json, read by the optional `tokenizers` package.

    The spelling of a special token inside a text is encoded as ordinary text, so that no document
    can forge its own end. `vocab_size` is the largest id plus one, for ids may have gaps.
    """

    def __init__(self, path: str):
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError(f"data.tokenizer={path!r} needs tokenizers: pip install 'stickjax[hf]'") from error
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(
                f"data.tokenizer={path!r} is neither 'byte' nor a readable tokenizer.json: {error.strerror}"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"data.tokenizer={path!r} is not a tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        ends = [vocabulary[token] for token in END_OF_TEXT if token in vocabulary]
        if not ends:
            raise ValueError(f"data.tokenizer={path!r} has no end of text: none of {', '.join(END_OF_TEXT)}")
        # A path means nothing on another machine; the content does.
        self.name = "hf:" + hashlib.sha256(content).hexdigest()[:16]
        self.vocab_size = max(vocabulary.values()) + 1
        self.eot = ends[0]

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, without special tokens: [n]."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, token_dtype(self.vocab_size))

    def decode(self, ids) -> str:
        """The text of ids [n]; pieces of characters become U+FFFD."""
        return self._tokenizer.decode([int(i) for i in np.asarray(ids) if i != self.eot], skip_special_tokens=True)

    def count_bytes(self, ids) -> int:
        """How many bytes of text the ids [n] stand for; a character cut at either end counts as U+FFFD."""
        return len(self.decode(ids).encode())


Tokenizer = ByteTokenizer | HuggingFaceTokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: 'byte', or the path of a tokenizer.json.

    Raises ValueError when the file cannot be read, has no end of text, or the package is missing.

    >>> load_tokenizer("byte").vocab_size
    257
    """
    return ByteTokenizer() if name == "byte" else HuggingFaceTokenizer(name)


class StreamDecoder:
    """Text from ids that arrive one at a time; a character is held back until it is whole.

    >>> stream = StreamDecoder(ByteTokenizer())
    >>> [stream.feed(i) for i in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.name == "byte" else None
        # A subword may be written differently at the start of a text (a leading space is dropped), so the
        # ids of the last emission, `_ids[:_seen]`, are decoded again in front of the new ones.
        self._ids: list[int] = []
        self._seen = 0

    def feed(self, token: int) -> str:
        """The text that became certain with this id; '' while a character is incomplete."""
        token = int(token)
        if token == self._tokenizer.eot or token >= self._tokenizer.vocab_size:  # a padded vocabulary has ids to spare
            return ""
        if self._bytes:
            return self._bytes.decode(bytes([token]))
        self._ids.append(token)
        # No character takes more than four ids; what is still broken by then stays broken.
        held = self._tokenizer.decode(self._ids).endswith("\ufffd") and len(self._ids) - self._seen < 4
        return "" if held else self._emit()

    def flush(self) -> str:
        """What is still held back, at the end of the stream."""
        return self._bytes.decode(b"", final=True) if self._bytes else self._emit()

    def _emit(self) -> str:
        shown = self._tokenizer.decode(self._ids[: self._seen])
        text = self._tokenizer.decode(self._ids)[len(shown) :]
        self._ids = self._ids[self._seen :]
        self._seen = len(self._ids)
        return text
