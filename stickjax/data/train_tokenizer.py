"""Train a byte-level BPE tokenizer on a text, and write it as a tokenizer.json."""

from pathlib import Path

from stickjax.data import special_tokens
from stickjax.data.encoding import with_progress
from stickjax.data.sources import text_documents
from stickjax.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from stickjax.system.disk import write_file
from stickjax.system.text import printable

SMALLEST, LARGEST = 256 + 1, 2**20  # the 256 bytes and the end of text; the largest vocabulary that is accepted
_MIN_COUNT = 2  # a pair of tokens becomes a new token only if it occurs at least this many times


def train_tokenizer(
    source: str, folder: str = ".", vocab: int = 8192, text_field: str = "text", name: str = "source"
) -> Tokenizer:
    """Train a byte-level BPE tokenizer on a text, write it to FOLDER/tokenizer.json, and return it.

    The training begins with 257 tokens: the end of text `<|endoftext|>`, which has id 0, and the 256 bytes. So the
    tokenizer can encode every text, and decoding returns the same text. Then the most frequent pair of neighboring
    tokens becomes a new token, again and again, until there are `vocab` tokens. A token never extends over the border
    of a word. Words are split as in GPT-2. The same text and `vocab` give the same file.

    Args:
      source: a text file, a .jsonl, .parquet or .arrow file, or a folder of such files.
      folder: the folder of the new tokenizer.json, which must exist.
      vocab: the number of tokens, from 257 to 1048576.
      text_field: the name of the field in which a JSON object has its text, or of the column of a table.
      name: the name of the argument that has the source, for messages.

    Raises ValueError if the text cannot be read or is too small for `vocab` tokens, if `vocab` is out of range, if the
    folder does not exist, if it has a tokenizer.json or files of another tokenizer or model, or if the package
    `tokenizers` is missing. Raises OSError if the file cannot be written.

    Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016, arXiv:1508.07909.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "text.txt").write_text("low lower lowest " * 10)
    ...     tokenizer = train_tokenizer(folder + "/text.txt", folder, vocab=260)
    >>> tokenizer.encode("low lower").tolist(), tokenizer.decode(tokenizer.encode("low lower"))
    ([258, 259, 69, 82], 'low lower')
    """
    path = Path(folder) / "tokenizer.json"
    if not SMALLEST <= vocab <= LARGEST:
        raise ValueError(
            f"vocab={vocab} must be in {SMALLEST}..{LARGEST}; the 256 bytes and the end of text are {SMALLEST} tokens"
        )
    _check_folder(path)
    try:
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ValueError("training a tokenizer needs the package tokenizers: pip install 'stickjax[hf]'") from error
    fast = Fast(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, min_frequency=_MIN_COUNT, special_tokens=[END_OF_TEXT[0]], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    fast.train_from_iterator(with_progress(text_documents(source, text_field, name), "read"), trainer)
    if (found := fast.get_vocab_size()) < vocab:
        raise ValueError(
            f"{name}={source!r} is too small for vocab={vocab}: it gives only {found} tokens, because a new token "
            f"must occur at least {_MIN_COUNT} times; give more text, or set vocab to {found} or less"
        )
    _check_folder(path)  # again, because the training may have taken long
    write_file(path, fast.to_str(pretty=True) + "\n")
    return load_tokenizer(str(path))


def _check_folder(path: Path) -> None:
    """Raise ValueError unless a new tokenizer.json can be written to `path`.

    The folder of `path` must exist. It must have no tokenizer.json, and no other file of a tokenizer or model, such as
    tokenizer_config.json. Such a file could name an end of text that the new tokenizer does not have.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{printable(path.parent)} is not a folder; make it first")
    if path.exists() or path.is_symlink():
        raise ValueError(f"{printable(path)} exists and is not overwritten; remove it or use another folder")
    if found := special_tokens.read_files(path.parent):
        # `read_files` returns the ids in a config.json under the name token_ids.json.
        names = ", ".join(name if (path.parent / name).exists() else "config.json" for name in found)
        raise ValueError(
            f"{printable(path.parent)} has files of another tokenizer or model ({names}); use another folder"
        )
