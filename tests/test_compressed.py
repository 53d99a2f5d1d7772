"""Test text that is compressed by gzip or zstd: it is read like the plain text, and damaged data are an error."""

import builtins
import gzip
import json
import random
import sys
import types

import pytest

from stickjax.config import DataConfig
from stickjax.data import compressed
from stickjax.data.__main__ import main
from stickjax.data.corpus import load_corpus
from stickjax.data.sources import text_documents

DOCUMENTS = ["one", "é" * 300_000, "three\nlines\n", *(str(n) for n in range(50))]
LINES = "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS).encode()
RANDOM = random.Random(0).randbytes(200_000).hex().encode()  # more than one chunk, also when it is compressed


def zstd(data: bytes) -> bytes:
    try:
        from compression.zstd import CompressionParameter, compress
    except ImportError:
        return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)
    return compress(data, options={CompressionParameter.checksum_flag: 1})  # as the command zstd does


COMPRESSORS = {".gz": gzip.compress, ".zst": zstd}


def read(path) -> list[str]:
    return list(text_documents(str(path)))


@pytest.fixture(params=COMPRESSORS)
def ending(request):
    COMPRESSORS[request.param](b"")  # skips the test if there is no zstd
    return request.param


@pytest.mark.parametrize(
    "name, content, documents",
    [
        ("x.jsonl", LINES, DOCUMENTS),
        ("x.NDJSON", LINES, DOCUMENTS),
        ("x.json", b'[{"text": "one"}, {"text": "two"}]', ["one", "two"]),
        ("x.txt", b"\xef\xbb\xbfone\r\n", ["one\r\n"]),
        ("x.py", RANDOM, [RANDOM.decode()]),
        ("x", b"no ending", ["no ending"]),
    ],
)
def test_a_compressed_file_is_read_like_its_content(tmp_path, ending, name, content, documents, caplog):
    (tmp_path / (name + ending)).write_bytes(COMPRESSORS[ending](content))
    assert read(tmp_path / (name + ending)) == documents and not caplog.text


@pytest.mark.parametrize("size", [1, 2, 1000, len(LINES) - 1])
def test_a_file_may_have_several_parts(tmp_path, ending, size):
    """Parallel compressors, and `cat a.gz b.gz`, write files of several parts. A part may end inside a line."""
    parts = [b"\xef", b"\xbb", b"\xbf", LINES[:size], b"", LINES[size:]]
    file = tmp_path / ("x.jsonl" + ending.upper())
    file.write_bytes(b"".join(COMPRESSORS[ending](part) for part in parts))
    assert read(file) == DOCUMENTS


def test_a_compressed_folder_gives_the_stream_of_the_plain_one(tmp_path, ending):
    for folder, compress, added in (("plain", bytes, ""), ("packed", COMPRESSORS[ending], ending)):
        (tmp_path / folder).mkdir()
        for name, content in (("a.txt", b"one"), ("b.jsonl", LINES), ("c.txt", RANDOM)):
            (tmp_path / folder / (name + added)).write_bytes(compress(content))
    plain, packed = (load_corpus(DataConfig(source="text", path=str(tmp_path / name))) for name in ("plain", "packed"))
    assert [part.hash for part in plain] == [part.hash for part in packed]
    assert not main(["tokenize", str(tmp_path / "packed"), str(tmp_path / "t")])
    whole, _ = load_corpus(DataConfig(source="tokens", path=str(tmp_path / "t"), heldout_path=str(tmp_path / "t")))
    text, _ = load_corpus(DataConfig(source="text", path=str(tmp_path / "plain"), heldout_path=str(tmp_path / "plain")))
    assert whole.hash == text.hash


@pytest.mark.parametrize(
    "name, damage",
    [
        *((name, damage) for name in ("x.jsonl", "x.txt") for damage in ("cut", "short", "more behind", "plain")),
        ("x.txt", "changed"),  # a changed line of jsonl is found before the changed checksum
    ],
)
def test_damaged_data_are_one_line(tmp_path, ending, name, damage):
    whole = COMPRESSORS[ending](b"".join(b'{"text": "%d"}\n' % n for n in range(3_000)))
    middle = len(whole) // 2
    content = {
        "cut": whole[:-1],
        "short": whole[:5],
        "more behind": whole + b"more behind",
        "plain": b"a plain text",
        "changed": whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 200]) + whole[middle + 200 :],
    }[damage]
    file = tmp_path / (name + ending)
    file.write_bytes(content)
    for path in (file, tmp_path):  # in a folder, a damaged file is not left out in silence
        with pytest.raises(
            ValueError, match=r"cannot read .*x\.(jsonl|txt)\.\w+: its \w+ data are damaged or"
        ) as error:
            read(path)
        assert "\n" not in str(error.value)
    assert main(["tokenize", str(file), str(tmp_path / "t")]) == 1
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"x.jsonl.\w+:2: no text in the field 'text'"),
        ("x.txt", b"\xff\xff", r"x.txt.\w+' is not UTF-8 text: invalid start byte at byte 0"),
        ("x.txt", "one".encode("utf-16"), r"x.txt.\w+' is UTF-16 or UTF-32"),
        ("x.tar", b"one", r"x.tar.\w+' is compressed: unpack it first"),
        ("x.txt", b"", r"x.txt.\w+' contains no text"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path, ending, name, content, message):
    file = tmp_path / (name + ending)
    file.write_bytes(COMPRESSORS[ending](content))
    with pytest.raises(ValueError, match=message) as error:
        read(file)
    assert "\n" not in str(error.value)


def test_without_the_package_its_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **options):
        if name.partition(".")[0] in ("compression", "zstandard"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    (tmp_path / "x.txt.zst").write_bytes(b"any")
    for path in (tmp_path / "x.txt.zst", tmp_path):
        with pytest.raises(ValueError, match=r"x.txt.zst needs the package zstandard: pip install 'stickjax\[zstd\]'"):
            read(path)


def test_the_module_of_python_3_14_is_used_first(tmp_path, monkeypatch):
    """The module `compression.zstd` is replaced by one that reads gzip, so that this test runs on every Python."""
    module = types.ModuleType("compression.zstd")
    module.open, module.ZstdError = gzip.open, type("ZstdError", (Exception,), {})
    package = types.ModuleType("compression")
    package.zstd = module
    monkeypatch.setitem(sys.modules, "compression", package)
    monkeypatch.setitem(sys.modules, "compression.zstd", module)
    (tmp_path / "x.jsonl.zst").write_bytes(gzip.compress(LINES))
    assert read(tmp_path / "x.jsonl.zst") == DOCUMENTS
    (tmp_path / "x.jsonl.zst").write_bytes(gzip.compress(LINES)[:-9])
    with pytest.raises(ValueError, match="its zstd data are damaged or cut off"):
        read(tmp_path / "x.jsonl.zst")


def test_only_a_part_is_in_memory(tmp_path, monkeypatch):
    """The first document is returned when only a small part of the file has been read."""
    file, taken = tmp_path / "x.jsonl.gz", []
    file.write_bytes(gzip.compress(b'{"text": "abcdefgh"}\n' * 500_000))
    original = compressed._Checked.readinto

    def counted(self, buffer):
        taken.append(len(buffer))
        return original(self, buffer)

    monkeypatch.setattr(compressed._Checked, "readinto", counted)
    documents = text_documents(str(file))
    assert next(documents) == "abcdefgh" and sum(taken) <= 2**18
    documents.close()
