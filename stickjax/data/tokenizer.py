"""Tokenizers, which convert text to token ids and back: for bytes, for words, and for a Hugging Face tokenizer.json."""

import abc
import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from stickjax.data import special_tokens

# The end-of-text tokens of published tokenizers. If no file names the end of text of a tokenizer, the first of these
# tokens that is among the added tokens of the tokenizer is used.
END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]")

WORDS_FILE = "words.json"  # the file of a `WordTokenizer`
_WORDS_FORMAT = "stickjax-words"  # the value of "format" in a words.json
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned integer type that can store the ids 0 to vocab_size - 1. It is little-endian.

    >>> token_dtype(257)
    dtype('uint16')
    """
    return np.dtype("u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


class Tokenizer(abc.ABC):
    """The interface of every tokenizer.

    Special tokens, such as the end of text, decode to the empty text. If a text contains the spelling of a special
    token, such as "<|endoftext|>", the spelling is encoded as ordinary text. Only `encode` with special=True encodes
    it as the special token.

    Attributes:
      name: 'byte', 'words:HASH', 'hf:HASH' or 'hf:HASH+PREFIX' (see `HuggingFaceTokenizer`). HASH is the first 16 hex
        digits of the sha256 of the tokenizer's file. The name is stored with a trained model.
      vocab_size: the largest token id plus one; some smaller ids may be unused.
      eot: the id of the end of text, which ends a document in training.
      ends: the ids that end a generated text, including `eot`.
      prefix: the ids that `encode` puts in front of every text, such as a begin-of-text id.
      files: {name: content} of the files that define the tokenizer. A run folder gets a copy of them.
    """

    name: str
    vocab_size: int
    eot: int
    ends: frozenset[int]
    prefix: tuple[int, ...] = ()
    files: dict[str, bytes] = {}

    def encode(self, text: str, *, special: bool = False, prefix: bool = True) -> np.ndarray:
        """Return the token ids [n] of a text, with the ids of `prefix` in front unless the argument `prefix` is False.

        With `special`, a part of the text that spells a special token is encoded as this token. The ids of `prefix` are
        not added if the ids of the text already begin with them.
        """
        ids, prefix = self._encode(text, special).tolist(), list(self.prefix if prefix else ())
        return np.array(ids if ids[: len(prefix)] == prefix else prefix + ids, token_dtype(self.vocab_size))

    @abc.abstractmethod
    def _encode(self, text: str, special: bool) -> np.ndarray:
        """Return the token ids [n] of a text, without the ids of `prefix` in front.

        With `special`, a part of the text that spells a special token is encoded as this token.
        """

    @abc.abstractmethod
    def decode(self, ids) -> str:
        """Return the text of the token ids [n]. If the bytes of a character are incomplete, the character is U+FFFD."""

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token whose spelling is `text`; None if there is no such token."""
        return None

    def count_bytes(self, ids) -> int:
        """Return the number of UTF-8 bytes in the text of the token ids [n], to compute a loss per byte.

        If the first or the last character is incomplete, it is counted as U+FFFD, which has 3 bytes. A
        `ByteTokenizer` counts the real bytes of such a character instead.
        """
        return len(self.decode(ids).encode())

    @property
    def bos(self) -> int | None:
        """The id of the token that begins a document in training; None if there is no such token, or if it is `eot`."""
        return next((i for i in self.prefix if i != self.eot), None)

    def document(self, text: str) -> np.ndarray:
        """Return the ids [n] of a document in training: first `prefix` (but no `eot`), then the text, then `eot`."""
        return self.documents([text])[0]

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids [n] of each document. A `HuggingFaceTokenizer` encodes them in parallel."""
        dtype = token_dtype(self.vocab_size)
        begin, end = np.array([i for i in self.prefix if i != self.eot], dtype), np.array([self.eot], dtype)
        return [np.concatenate([begin, ids, end], dtype=dtype) for ids in self._encode_all(texts)]

    def _encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text, False) for text in texts]

    def prompt(self, text: str, **options) -> np.ndarray:
        """Return the token ids [n] of a prompt: the ids of `encode(text, **options)`, or `eot` if there are none.

        A prompt needs at least one id. If it is empty, `eot` is used: in training, a new document begins after `eot`.
        """
        ids = self.encode(text, **options)
        return ids if len(ids) else np.array([self.eot], token_dtype(self.vocab_size))

    def save(self, folder: Path) -> None:
        """Write the files of the tokenizer into a folder, for `load_tokenizer`. A `ByteTokenizer` has no files."""
        special_tokens.write_files(self.files, folder)


class ByteTokenizer(Tokenizer):
    """A tokenizer whose tokens are the UTF-8 bytes of the text: ids 0..255 are bytes, id 256 is the end of text.

    >>> ByteTokenizer().encode("né")
    array([110, 195, 169], dtype=uint16)
    >>> ByteTokenizer().decode([110, 195, 169, 256])
    'né'
    """

    name = "byte"
    vocab_size = 257
    eot = 256
    ends = frozenset([256])

    def _encode(self, text: str, special: bool) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")

    def count_bytes(self, ids) -> int:
        return int(np.count_nonzero(np.asarray(ids) < 256))


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words and single punctuation marks. A word may contain apostrophes.

    >>> words_of("The dog didn't bark, did it?")
    ['the', 'dog', "didn't", 'bark', ',', 'did', 'it', '?']
    """
    return _WORD.findall(text.lower())


class WordTokenizer(Tokenizer):
    """A tokenizer of words. Id 0 is the end of text, id 1 is `<unknown>`, and the ids from 2 are `words`, in order.

    `words_of` splits a text. Words that are not in `words` become `<unknown>`. The file of the tokenizer is words.json.

    >>> tokenizer = WordTokenizer.made_of(["a dog", "A dog, a cat"], min_count=2)
    >>> tokenizer.words, tokenizer.encode("a cat").tolist(), tokenizer.decode([2, 1])
    (('a', 'dog'), [2, 1], 'a <unknown>')
    """

    eot = 0
    ends = frozenset([0])

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self._ids = {word: i for i, word in enumerate(self.words, 2)}
        content = (
            json.dumps({"format": _WORDS_FORMAT, "words": self.words}, ensure_ascii=False, indent=0).encode() + b"\n"
        )
        self.files = {WORDS_FILE: content}
        self.name = "words:" + hashlib.sha256(content).hexdigest()[:16]
        self.vocab_size = 2 + len(self.words)

    @classmethod
    def made_of(cls, texts: Iterable[str], min_count: int = 1) -> "WordTokenizer":
        """Return a tokenizer of the words that occur at least `min_count` times in `texts`, the most frequent first."""
        count = Counter(word for text in texts for word in words_of(text))
        return cls(sorted((word for word, n in count.items() if n >= min_count), key=lambda word: (-count[word], word)))

    @classmethod
    def read(cls, path: str | Path) -> "WordTokenizer":
        """Load a tokenizer from the file words.json at `path`, which `save` has written.

        Raises ValueError if the file cannot be read, or has another format than `save` writes.
        """
        where = f"data.tokenizer={str(path)!r}"
        try:
            tree = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not a valid words.json: {error}") from error
        words = tree.get("words") if isinstance(tree, dict) else None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{where} is not a valid words.json: it has no list of words")
        if tree.get("format") != _WORDS_FORMAT:
            raise ValueError(f'{where} is not a valid words.json: its "format" must be {_WORDS_FORMAT!r}')
        if len(set(words)) < len(words):
            twice = Counter(words).most_common(1)[0][0]
            raise ValueError(f"{where} is not a valid words.json: the word {twice!r} occurs more than once")
        return cls(words)

    def _encode(self, text: str, special: bool) -> np.ndarray:
        return np.array([self._ids.get(word, 1) for word in words_of(text)], token_dtype(self.vocab_size))

    def decode(self, ids) -> str:
        return " ".join("<unknown>" if i == 1 else self.words[i - 2] for i in map(int, np.asarray(ids)) if i)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer from a file tokenizer.json at `path`, which the optional package `tokenizers` reads.

    The end of text is `eot`, the text of an added token of the file. If `eot` is None, `special_tokens.named` finds the
    end of text in other files of the same folder. These files may name no end of text. Then the texts of the list
    `END_OF_TEXT`, such as "<|endoftext|>", are tried in order, and the first one that is an added token is used.
    `special_tokens.prefix_of` computes the `prefix` from the tokenizer.json and the other files. If this differs from
    the prefix in the tokenizer.json, the name of the tokenizer ends in "+" and the list of the ids in `prefix`.

    Raises ValueError if the package is missing, if a file cannot be read, or if no end of text is found.
    """

    def __init__(self, path: str | Path, eot: str | None = None):
        path, where = Path(path), f"data.tokenizer={str(path)!r}"
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError as error:
            raise ValueError(f"{where} needs the package tokenizers: pip install 'stickjax[hf]'") from error
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{where} is neither 'byte' nor a readable tokenizer.json: {error.strerror}") from error
        files = special_tokens.read_files(path.parent)
        try:
            tree = special_tokens.read_object(content, path)
            entries = tree.get("added_tokens") or []
            added = {entry["content"]: int(entry["id"]) for entry in entries}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{where} is not a tokenizer.json: {type(error).__name__}: {error}") from error
        if eot is not None and eot not in added:
            raise ValueError(f"data.eot={eot!r} is not an added token of {where}; its added tokens: {_listed(added)}")
        ends, special, problem = special_tokens.named(files, added, path.parent)
        is_named = eot is not None or ends or problem
        first = eot if is_named else next((token for token in END_OF_TEXT if token in added), None)
        if first is not None and ends[:1] != (added[first],):
            ends = (added[first], *(i for i in ends if i != added[first]))
            files = special_tokens.with_end(files, ends, first, path.parent)
        special |= set(ends) & set(added.values())
        ordinary = [entry for entry in entries if not entry.get("special")]
        for entry in ordinary:  # the package must also treat the tokens in `special`, from other files, as special
            entry["special"] = entry["id"] in special
        try:
            self._tokenizer = Fast.from_str(json.dumps(tree))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            own = self._prefix(next(iter(added), ""))
        # The package raises an Exception. If its Rust code panics, it raises a class that is not derived from
        # Exception.
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ValueError(f"{where} is not a tokenizer.json: {error}") from error
        for text, i in added.items():
            if (other := self._tokenizer.token_to_id(text)) != i:
                raise ValueError(
                    f"{where}: the added token {text!r} has id {i} in this file, but the package tokenizers gives it "
                    f"id {other}; correct the ids of the added tokens"
                )
        if not ends:
            problem = problem or f"{where} has no end of text: no file in its folder names one"
            raise ValueError(f"{problem}; set data.eot to one of its added tokens: {_listed(added)}")
        self._tokenizer.encode_special_tokens = True  # text that spells a special token is encoded as ordinary text
        # The name comes from the content, because a path means nothing on another machine.
        self.name = "hf:" + hashlib.sha256(content).hexdigest()[:16]
        self.prefix = special_tokens.prefix_of(own, files, added, path.parent)
        self.name += "" if self.prefix == own else f"+{list(self.prefix)}"
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eot, self.ends = ends[0], frozenset(ends)
        self.files = {"tokenizer.json": content} | files
        self._special = {entry["content"]: entry["id"] for entry in entries if entry["special"]}
        unknown = self._special.get(tree["model"].get("unk_token"), tree["model"].get("unk_id"))
        self._forbidden = np.array(sorted({*self._special.values()} - ({unknown} - self.ends)), int)

    def _prefix(self, text: str) -> tuple[int, ...]:
        """Return the special token ids that the post-processor of the tokenizer puts in front of `text`.

        `text` should be an added token, because every tokenizer can encode an added token.
        """
        encoding = self._tokenizer.encode(text)
        return tuple(encoding.ids[: (encoding.special_tokens_mask + [0]).index(0)])

    def _encode(self, text: str, special: bool) -> np.ndarray:
        self._tokenizer.encode_special_tokens = not special
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            return np.array(ids, token_dtype(self.vocab_size)) if special else self._ordinary(ids)
        except Exception as error:  # raised for a model without an unknown token
            raise ValueError(f"the tokenizer cannot encode {text[:40]!r}: {error}") from error
        finally:
            self._tokenizer.encode_special_tokens = True

    def _encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [self._ordinary(encoding.ids) for encoding in found]
        except Exception:  # the error does not say which text it is about; the error of `_encode` does
            return super()._encode_all(texts)

    def _ordinary(self, ids: list[int]) -> np.ndarray:
        """Return the token ids [n] with each special token replaced by the ids of its spelling.

        The model of the tokenizer, such as BPE, may encode ordinary text as a special token of its vocabulary.
        """
        if np.isin(ids, self._forbidden).any():
            ids = [i for token in ids for i in (self._spelling(token) if token in self._forbidden else [token])]
        return np.array(ids, token_dtype(self.vocab_size))

    def _spelling(self, token: int) -> list[int]:
        """Return the ids that encode the spelling of a special token as ordinary text, letter by letter.

        `token` is the id of the special token.
        """
        model = self._tokenizer.model
        ids = [piece.id for letter in self._tokenizer.id_to_token(token) for piece in model.tokenize(letter)]
        return [i for i in ids if i not in self._forbidden]

    def decode(self, ids) -> str:
        return self._tokenizer.decode([int(i) for i in np.asarray(ids)], skip_special_tokens=True)

    def special_id(self, text: str) -> int | None:
        return self._special.get(text)


def _listed(tokens: Iterable[str], most: int = 12) -> str:
    tokens = list(tokens)
    return ", ".join(map(repr, tokens[:most])) + (", ..." if len(tokens) > most else "") or "there are none"


def load_tokenizer(name: str, eot: str | None = None) -> Tokenizer:
    """Load a tokenizer. `name` is 'byte' or the path of a tokenizer.json or a words.json, as in `data.tokenizer`.

    `eot` is used for a tokenizer.json only. It is the text of the added token that ends a document, as in the config
    field `data.eot`. If it is None, the end of text is found in the files of the tokenizer.

    Raises ValueError if the file cannot be read or has no end of text, or if the package `tokenizers` is missing.

    >>> load_tokenizer("byte").vocab_size
    257
    """
    if name == "byte":
        return ByteTokenizer()
    return WordTokenizer.read(name) if Path(name).name == WORDS_FILE else HuggingFaceTokenizer(name, eot)


class StreamDecoder:
    """A decoder for generated token ids, which arrive one at a time. Several ids may be parts of one character.

    `feed` returns a character when all its ids have arrived. The returned texts, joined, are the text that the
    generated ids add to the prompt. `prompt` has the token ids of the prompt. If it is None, the text "a" is the
    prompt: without a prompt, a tokenizer may drop a space at the start of the generated text.

    >>> stream = StreamDecoder(ByteTokenizer())
    >>> [stream.feed(i) for i in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] | None = None):
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.name == "byte" else None
        # A token may decode differently at the start of a text (a leading space is dropped). So the ids whose text was
        # already returned, `_ids[:_seen]`, are decoded again in front of the new ids.
        self._ids = [int(i) for i in (tokenizer.encode("a") if prompt is None else prompt)]
        self._seen = len(self._ids)

    def feed(self, token: int) -> str:
        """Add the next token id, and return the text that it completes: '' while a character is incomplete."""
        token = int(token)
        if token == self._tokenizer.eot or token >= self._tokenizer.vocab_size:  # V may be padded with unused ids
            return ""
        if self._bytes:
            return self._bytes.decode(bytes([token]))
        self._ids.append(token)
        # A character has at most four ids. If it is incomplete after four ids, it will stay incomplete.
        held = self._tokenizer.decode(self._ids).endswith("\ufffd") and len(self._ids) - self._seen < 4
        return "" if held else self._emit()

    def flush(self) -> str:
        """End the decoding. Return the text of the ids that `feed` has held back; an incomplete character is U+FFFD."""
        return self._bytes.decode(b"", final=True) if self._bytes else self._emit()

    def _emit(self) -> str:
        shown = self._tokenizer.decode(self._ids[: self._seen])
        text = self._tokenizer.decode(self._ids)[len(shown) :]
        if text:  # otherwise the old ids are kept, so that the next ids are not decoded as the start of a text
            self._ids = self._ids[self._seen :]
        self._seen = len(self._ids)
        return text
