"""Test text sources: which files and folders are read as text, and errors for token files with wrong content."""

import json
import os
import re
import socket

import pytest

from stickjax.config import Config, DataConfig
from stickjax.data import token_files
from stickjax.data.__main__ import main
from stickjax.data.corpus import load_corpus
from stickjax.data.readers import training_data
from stickjax.data.sources import text_documents
from stickjax.data.token_files import tokenize, verify

LINE = b'{"text": "one"}\n'


def read(path, **options) -> list[str]:
    return list(text_documents(str(path), **options))


@pytest.mark.parametrize(
    "name, content, documents",
    [
        ("x.JSONL", LINE, ["one"]),
        ("x.ndjson", LINE, ["one"]),
        ("x.NdJson", LINE * 2, ["one", "one"]),
        ("x.json", LINE, ["one"]),
        ("x.json", LINE + b"\r\n\n" + LINE, ["one", "one"]),
        ("x.json", '{"text": "a\u2028b"}\n{"text": "c\x85d"}'.encode(), ["a\u2028b", "c\x85d"]),
        ("x.json", b'[{"text": "one"},\n {"text": ""}, {"text": "two"}]', ["one", "two"]),
        ("x.Json", b'{"text": "one",\n "id": 3}', ["one"]),
        ("x.txt", b"\xef\xbb\xbfone", ["one"]),
        ("x.jsonl", b"\xef\xbb\xbf\r\n\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n"), ["one"]),
        ("x.json", b"\xef\xbb\xbf" + LINE, ["one"]),
        ("lines\nin a name \udcff.txt", b"one", ["one"]),
        ("x.txt", b"a line of a megabyte " * 50_000, ["a line of a megabyte " * 50_000]),
    ],
)
def test_a_file_is_read_as_what_it_is(tmp_path, name, content, documents, caplog):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == read(tmp_path) == documents
    assert not caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b'{"name": "a package"}',
        b'[{"name": 1}, {"text": "one"}]',
        b"[1, 2]",
        b"[]",
        b"not JSON",
        b'"text"',
        b"[" * 9**6,
    ],
)
def test_json_without_records_is_read_as_it_stands_and_that_is_said(tmp_path, content, caplog):
    (tmp_path / "x.json").write_bytes(content)
    assert read(tmp_path) == [content.decode()]
    assert ".json file without a field 'text' is read as one document (1: " in caplog.text


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "x.jsonl",
            LINE + b'{"text": "one", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
            "x.jsonl:2: .* nested too deep",
        ),
        ("x.json", LINE + b"\n" + b"[" * 10**5, "x.json:3: .* nested too deep"),
        (
            "x.json",
            b'[{"text": "one"}, {"body": "two"}]',
            "x.json: record 2: no text in .*; the fields of this object are 'body'",
        ),
        ("x.json", LINE + b"[]", "x.json:2: no text in the field"),
        ("a\nb.jsonl", b"{", r"a\\nb.jsonl:1: this line is not JSON"),
        ("x.txt", "one".encode("utf-16"), "x.txt' is UTF-16 or UTF-32, not UTF-8 text: convert it"),
        ("x.jsonl", LINE.decode().encode("utf-32"), "x.jsonl' is UTF-16 or UTF-32, not UTF-8 text: convert it"),
        ("x.txt", "one".encode("utf-16-le"), "x.txt' is not UTF-8 text: it has NUL bytes \\(0x00\\), as UTF-16 has"),
        ("x.txt.xz", b"\xfd7zXZ\x00", "is compressed: unpack it first"),
        ("x.tar.gz", b"\x1f\x8b\x08\x08", "is compressed: unpack it first"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_links_are_followed_once(tmp_path, caplog):
    for name in ("texts/own/deep", "elsewhere/deep"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("texts/own/deep/b.txt", "elsewhere/c.txt", "elsewhere/deep/d.txt", "alone.txt"):
        (tmp_path / name).write_text(name)
    texts = tmp_path / "texts"
    for link, target in {
        "a": "own",  # a second name of the folder, sorted before the first
        "z": "../elsewhere",
        "own/up": "../../texts",
        "own/deep/again": "../../../elsewhere/deep",
        "file.txt": "../alone.txt",
        "same.txt": "own/deep/b.txt",
    }.items():
        os.symlink(target, texts / link)
    os.symlink("../elsewhere", tmp_path / "elsewhere/self")
    expected = ["alone.txt", "elsewhere/deep/d.txt", "texts/own/deep/b.txt", "elsewhere/c.txt"]
    assert sorted(read(texts)) == sorted(expected) and not caplog.text
    os.symlink(texts, tmp_path / "whole")
    assert read(tmp_path / "whole") == read(texts)


def test_what_is_no_file_is_left_out_and_counted(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "x.xz").write_bytes(b"\xfd7zXZ\x00")
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "t.json")  # next to t.bin
    (tmp_path / "t.bin").write_text("two")
    os.symlink(tmp_path / "none", tmp_path / "gone")
    os.symlink("loop", tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert read(tmp_path) == ["one", "two"]
    assert "left out 6 files: " in caplog.text
    for kind in ("a broken link (2: ", "a pipe, socket or device (3: ", "compressed (1: "):
        assert kind in caplog.text
    for name, kind in (("pipe.jsonl", "a pipe"), ("gone", "a broken link"), ("loop", "a broken link")):
        with pytest.raises(ValueError, match=f"data.path='.*{name}' is {kind}"):
            read(tmp_path / name)


def test_a_folder_that_cannot_be_entered_is_not_left_out_in_silence(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="cannot read the folder .*locked: Permission denied"):
        read(tmp_path)


@pytest.mark.parametrize("tokenizer", ["byte", "bytes of one"])
def test_tokenizing_into_the_folder_that_is_read(tmp_path, monkeypatch, tokenizer, caplog):
    if tokenizer != "byte":  # if ids have one byte, the token file itself is UTF-8 text
        small = type("Small", (token_files.load_tokenizer("byte").__class__,), dict(vocab_size=256, eot=10))
        monkeypatch.setattr(token_files, "load_tokenizer", lambda *_: small())
    (tmp_path / "a.txt").write_text("one")
    first = tokenize(str(tmp_path), str(tmp_path / "tokens"))
    assert tokenize(str(tmp_path), str(tmp_path / "tokens")) == first and first["num_tokens"] == 4
    assert "left out 2 files: a token file (2: " in caplog.text
    with pytest.raises(ValueError, match="is a token file: set data.source='tokens' to read it"):
        read(tmp_path / "tokens.bin")


@pytest.mark.parametrize("out", ["/", ".", "no/folder"])
def test_a_token_file_needs_a_name(tmp_path, out, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    assert main(["tokenize", "a.txt", out]) == 1
    said = "error: ('.*' is not the path of a token file|no is not a folder; make it first)"
    assert re.match(said, capsys.readouterr().err)
    assert os.listdir() == ["a.txt"]


@pytest.fixture
def tokens(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(LINE * 9)
    tokenize(str(tmp_path / "x.jsonl"), str(tmp_path / "t"))
    return tmp_path / "t"


@pytest.mark.parametrize("key", token_files._TYPES)
def test_a_token_file_whose_json_has_other_types(tokens, key):
    file = tokens.with_suffix(".json")
    meta = json.loads(file.read_text())
    for value in (3, -1, 2.5, None, True, "x", [], {}, 10**30):
        if type(value) is int and value > 0 and key in ("num_documents", "num_bytes"):
            continue  # the correct value
        file.write_text(json.dumps(meta | {key: value}))
        with pytest.raises(ValueError, match=r"data.path='.*t'") as error:
            load_corpus(DataConfig(source="tokens", path=str(tokens)))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    file.write_text("[" * 10**5)
    with pytest.raises(ValueError, match="does not describe a token file"):
        load_corpus(DataConfig(source="tokens", path=str(tokens)))


def test_a_token_file_that_is_not_its_sha256(tokens, monkeypatch, caplog, capsys):
    config = DataConfig(source="tokens", path=str(tokens))
    load_corpus(config)
    file = tokens.with_suffix(".bin")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="t.bin is damaged or was replaced: its sha256 is"):
        load_corpus(config)
    monkeypatch.setattr(token_files, "_VERIFIED", len(content) - 1)
    load_corpus(config)
    assert "not verified; python -m stickjax.data verify" in caplog.text, "training on a large file must print a notice"
    assert main(["verify", str(tokens)]) == 1
    assert re.match("error: OUT=.* is damaged or was replaced", capsys.readouterr().err)
    content[0] ^= 1
    file.write_bytes(content)
    main(["verify", str(file)])
    assert "9 documents, 36 tokens" in capsys.readouterr().out
    assert verify(str(tokens))["num_documents"] == 9


def test_the_line_about_the_data_says_what_is_held_out(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(LINE * 9)
    changes = {"data.source": "text", "data.path": str(tmp_path / "x.jsonl"), "data.T": 4, "data.heldout_every": 4}
    summary = training_data(Config().replace(changes)).summary
    assert ": 6 documents, 24 tokens, " in summary and summary.endswith("; 3 documents (12 tokens) are held out")
