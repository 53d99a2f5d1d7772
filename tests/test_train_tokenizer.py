"""Test the training of a tokenizer, documents encoded in batches, and the progress of long conversions."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from stickjax.data import encoding
from stickjax.data.__main__ import main
from stickjax.data.encoding import encode_documents, with_progress
from stickjax.data.sources import stdlib_documents
from stickjax.data.token_files import tokenize
from stickjax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer, token_dtype
from stickjax.data.train_tokenizer import train_tokenizer

WORDS = "the stick is broken, and the rest of the stick is left. "


@pytest.fixture
def text(tmp_path):
    """Return the path of a .jsonl file: the beginnings of 8 Python files, and a document with rare characters."""
    files = itertools.islice(stdlib_documents(), 8)
    documents = [*(file[:10_000] for file in files), "né \U0001f600 日本 <|endoftext|> \0\r\n\t"]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


def test_a_trained_tokenizer_encodes_every_text_with_fewer_tokens(text, tmp_path, capsys):
    assert not main(["tokenizer", text, "--vocab", "600", "--out", str(tmp_path)])
    path = str(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(path)
    assert capsys.readouterr().out == f"{path}: 600 tokens, {tokenizer.name}\n"
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.prefix) == (600, 0, ())
    assert tokenizer.special_id("<|endoftext|>") == 0
    with open(text) as file:
        documents = [json.loads(line)["text"] for line in file]
    for document in documents:
        ids = tokenizer.encode(document)
        assert tokenizer.decode(ids) == document and 0 not in ids
    sizes = sum(len(tokenizer.encode(document)) for document in documents), sum(map(len, documents))
    assert sizes[0] < 0.6 * sizes[1]
    assert set(range(600)) == set(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"].values())
    # A token file that is made with this tokenizer decodes to the text.
    meta = tokenize(text, str(tmp_path / "t"), path)
    tokens = np.fromfile(tmp_path / "t.bin", meta["dtype"])
    assert tokenizer.decode(tokens) == "".join(documents) and (tokens == 0).sum() == len(documents)


def test_the_same_text_gives_the_same_file(text, tmp_path):
    """The file depends neither on the order of hash tables, which differs between processes, nor on threads."""
    for name in ("here", "alone"):
        (tmp_path / name).mkdir()
    here = train_tokenizer(text, str(tmp_path / "here"), 500)
    command = [sys.executable, "-m", "stickjax.data", "tokenizer", text, "--vocab", "500"]
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, cwd=tmp_path / "alone", env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout == f"tokenizer.json: 500 tokens, {here.name}\n"
    assert (tmp_path / "alone" / "tokenizer.json").read_bytes() == here.files["tokenizer.json"]


def test_the_most_frequent_pairs_become_tokens(tmp_path):
    (tmp_path / "x.txt").write_text("ab ab ab ab cd cd")
    tokenizer = train_tokenizer(str(tmp_path / "x.txt"), str(tmp_path), 260)
    merged = [tokenizer.decode([i]) for i in range(257, 260)]
    assert merged == ["ab", " ab", "cd"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--vocab", "256"], "vocab=256 must be in 257..1048576"),
        (["--vocab", "1000000000000"], "vocab=1000000000000 must be in 257..1048576"),
        (["--vocab", "9000"], r"PATH='.*x.txt' is too small for vocab=9000: it gives only 2\d\d tokens"),
        (["--out", "none"], "none is not a folder; make it first"),
        (["--out", "full"], "full/tokenizer.json exists and is not overwritten"),
        (["--out", "model"], r"model has files of another tokenizer or model \(tokenizer_config.json\)"),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text(WORDS)
    for name in ("full", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "tokenizer.json").write_text("old")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    assert main(["tokenizer", str(tmp_path / "x.txt"), *options]) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert re.search(message, err)
    assert sorted(os.listdir(tmp_path)) == ["full", "model", "x.txt"]
    assert (tmp_path / "full" / "tokenizer.json").read_text() == "old"
    assert os.listdir(tmp_path / "model") == ["tokenizer_config.json"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "PATH='.*none.txt' does not exist"),
        ("empty.txt", b"", "PATH='.*empty.txt' contains no text"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "x.jsonl:2: no text in the field 'text'"),
        ("x.txt", b"\xff\xff", "x.txt' is not UTF-8 text"),
    ],
)
def test_bad_text_is_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        train_tokenizer(str(tmp_path / name), str(tmp_path), name="PATH")
    assert "\n" not in str(error.value) and not (tmp_path / "tokenizer.json").exists()


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # an import of it then fails
    with pytest.raises(ValueError, match=r"needs the package tokenizers: pip install 'stickjax\[hf\]'"):
        train_tokenizer(__file__, str(tmp_path))


# Documents in batches


@pytest.mark.parametrize("name", ["byte", "tokenizer.json"])
def test_batches_give_the_ids_of_single_documents(text, bpe, tmp_path, monkeypatch, name):
    tokenizer = load_tokenizer("byte" if name == "byte" else bpe)
    with open(text) as file:
        documents = [json.loads(line)["text"] for line in file]
    dtype = token_dtype(tokenizer.vocab_size)
    expected = [np.append(tokenizer.encode(document), tokenizer.eot).astype(dtype) for document in documents]
    for characters, count in ((1, 4096), (10_000, 4096), (2**21, 3), (2**21, 4096)):
        monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", characters)
        monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", count)
        found = list(encode_documents(documents, tokenizer))
        assert [size for _, size in found] == [len(document.encode()) for document in documents]
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for (a, _), b in zip(found, expected, strict=True))
        meta = tokenize(text, str(tmp_path / "t"), "byte" if name == "byte" else bpe)
        assert meta["sha256"] == hashlib.sha256(np.concatenate(expected).tobytes()).hexdigest()
        assert meta["num_documents"] == len(documents)


def test_a_tokenizer_json_encodes_a_batch_in_one_call(bpe, monkeypatch):
    """The package tokenizers encodes the texts of one call in parallel. Calls for single texts would use one core."""
    tokenizer, calls = load_tokenizer(bpe), []

    def single(self, text, special):
        calls.append(text)
        raise AssertionError("documents are encoded one by one")

    monkeypatch.setattr(HuggingFaceTokenizer, "_encode", single)
    assert len(list(encode_documents(["a", "b"] * 50, tokenizer))) == 100 and not calls


def test_an_error_in_a_batch_names_the_text(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"known": 0}, unk_token="<none>"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.documents(["known"])[0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="the tokenizer cannot encode 'strange': "):
        list(encode_documents(["known", "strange", "known"], loaded))


def test_a_document_is_read_only_when_its_batch_begins(monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_DOCUMENTS", 2)
    read = []

    def documents():
        for n in range(6):
            read.append(n)
            yield str(n)

    found = encode_documents(documents(), ByteTokenizer())
    next(found)
    assert read == [0, 1]


# Progress


class Terminal:
    def __init__(self, terminal: bool):
        self.terminal, self.text = terminal, ""

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("terminal, lines", [(True, 6), (False, 3)])
def test_progress_is_written_now_and_then(monkeypatch, terminal, lines):
    """Each document takes 30 s here. A terminal shows progress after every document, and a file after every minute."""
    clock, stream = itertools.count(0, 30), Terminal(terminal)
    monkeypatch.setattr(encoding.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(with_progress(["x" * 3_000_000] * 6, "tokenize")) == ["x" * 3_000_000] * 6
    assert stream.text.count("tokenize: ") == lines
    assert "tokenize: 2 documents, 6.0 million characters, 0.10 million per second" in stream.text
    assert stream.text.endswith("\x1b[K" if terminal else "per second\n")
    assert ("\n" in stream.text) is not terminal


def test_a_short_conversion_is_silent_in_a_file(text, tmp_path, capsys):
    tokenize(text, str(tmp_path / "t"))
    assert not capsys.readouterr().err
