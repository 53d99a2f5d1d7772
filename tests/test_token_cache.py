"""Test the cache of tokenized text: what is read from it, what is tokenized again, and damaged files."""

import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from stickjax.config import Config, DataConfig
from stickjax.data import encoding
from stickjax.data.corpus import load_corpora, load_corpus
from stickjax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for n in range(12):
        (tmp_path / "texts" / f"{n:02}.txt").write_text(f"Document {n} é 漢 <|endoftext|>" * n + "x")
    return tmp_path / "texts"


@pytest.fixture
def tokenized(monkeypatch):
    """Return a list to which every text is added when it is tokenized."""
    seen = []
    for kind in (ByteTokenizer, HuggingFaceTokenizer):
        encode_all = kind._encode_all

        def spy(self, texts, encode_all=encode_all):
            seen.extend(texts)
            return encode_all(self, texts)

        monkeypatch.setattr(kind, "_encode_all", spy)
    return seen


def config(texts, **options) -> DataConfig:
    return DataConfig(source="text", path=texts, cache=texts.parent / "cache", **options)


def files(texts) -> list:
    return sorted((texts.parent / "cache").iterdir())


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens.dtype == theirs.tokens.dtype and np.array_equal(ours.tokens, theirs.tokens)
        assert (ours.hash, ours.documents, ours.bytes) == (theirs.hash, theirs.documents, theirs.bytes)


def test_the_same_text_is_tokenized_once(texts, bpe, tokenized, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", 5)  # so that the text has three batches
    for tokenizer in ("byte", str(bpe)):
        expected = load_corpus(DataConfig(source="text", path=texts, tokenizer=tokenizer))
        tokenized.clear()
        assert_same(load_corpus(config(texts, tokenizer=tokenizer)), expected)
        assert len(tokenized) == 12
        tokenized.clear()
        assert_same(load_corpus(config(texts, tokenizer=tokenizer)), expected)
        assert load_corpus(config(texts, tokenizer=tokenizer, heldout_every=3))[1].documents == 4
        assert tokenized == []
    assert len(files(texts)) == 6, "three batches of two tokenizers"


def test_only_what_has_changed_is_tokenized_again(texts, tokenized, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", 5)
    load_corpus(config(texts))
    tokenized.clear()
    (texts / "07.txt").write_text("changed")
    found = load_corpus(config(texts))
    assert len(tokenized) == 5 and tokenized[2] == "changed" and len(files(texts)) == 4
    assert_same(found, load_corpus(DataConfig(source="text", path=texts)))
    (texts / "07.txt").unlink()
    assert_same(load_corpus(config(texts)), load_corpus(DataConfig(source="text", path=texts)))


def test_another_end_of_text_is_another_entry(texts, bpe, tokenized):
    """Two runs that differ only in `data.eot` have different tokens, so they need two files in the cache."""
    fast = Tokenizer.from_file(bpe)
    fast.add_special_tokens(["<|other|>"])
    fast.save(str(texts.parent / "tokenizer.json"))
    for eot in ("<|endoftext|>", "<|other|>"):
        options = dict(tokenizer=texts.parent / "tokenizer.json", eot=eot)
        found = load_corpus(config(texts, **options))
        assert_same(found, load_corpus(DataConfig(source="text", path=texts, **options)))
    assert len(files(texts)) == 2


def test_another_version_of_the_package_is_another_entry(texts, bpe, tokenized, monkeypatch):
    for version in ("1.0", "1.0", "1.1"):
        monkeypatch.setattr("tokenizers.__version__", version)
        load_corpus(config(texts, tokenizer=bpe))
    assert len(files(texts)) == 2 and len(tokenized) == 24


@pytest.mark.parametrize("place", [0, 31, 32, 45, 130, -1, "cut", "empty", "longer"])
def test_a_damaged_entry_is_made_again(texts, tokenized, caplog, place):
    expected = load_corpus(config(texts))
    tokenized.clear()
    (file,) = files(texts)
    good = file.read_bytes()
    bad = bytearray(good)
    if isinstance(place, int):
        bad[place] ^= 1
    else:
        bad = {"cut": good[:-3], "empty": b"", "longer": good + b"\0"}[place]
    file.write_bytes(bad)
    assert_same(load_corpus(config(texts)), expected)
    assert len(tokenized) == 12
    assert f"data.cache: {file} is damaged, so its text is tokenized again" in caplog.text
    assert file.read_bytes() == good


def test_a_folder_that_cannot_be_written_is_not_used(texts, monkeypatch, caplog):
    monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", 5)
    (texts.parent / "cache").write_text("a file")
    assert_same(load_corpus(config(texts)), load_corpus(DataConfig(source="text", path=texts)))
    assert [record.message for record in caplog.records] == [
        f"data.cache={str(texts.parent / 'cache')!r} is not used, because it cannot be written: it is not a folder"
    ]


def test_several_processes_use_one_folder(texts):
    program = (
        "import sys\nfrom stickjax.data import load_corpus\nfrom stickjax.config import DataConfig\n"
        "print(load_corpus(DataConfig(source='text', path=sys.argv[1], cache=sys.argv[2]))[0].hash)"
    )
    command = [sys.executable, "-c", program, str(texts), str(texts.parent / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = {process.communicate()[0].strip() for process in running}
    assert found == {load_corpus(DataConfig(source="text", path=texts))[0].hash}
    assert len(files(texts)) == 1, "no temporary file is left"


def test_a_mixture_uses_the_folder(texts, tokenized):
    data = DataConfig(mixture=[("text", texts, 2), ("logic", None, 1)], examples=200, cache=texts.parent / "cache")
    first = load_corpora(data)
    assert tokenized
    tokenized.clear()
    assert_same(load_corpora(data)[0], first[0])
    assert tokenized == [] and Config(data=data).data.cache == str(texts.parent / "cache")
