"""Test the data pipeline: text sources, token files, the held-out split, batches, resuming, and bad input."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stickjax.config import DataConfig
from stickjax.data.__main__ import main
from stickjax.data.batches import batches, make_batch, train_loader
from stickjax.data.corpus import Corpus, load_corpus
from stickjax.data.sources import text_documents
from stickjax.data.token_files import tokenize
from stickjax.data.tokenizer import ByteTokenizer, StreamDecoder, load_tokenizer, token_dtype

EOT = 256


def counting(n: int) -> Corpus:
    """Return a corpus of n tokens in which token i is 1000 + i, so that a token shows its position."""
    return Corpus(np.arange(n, dtype=np.uint32) + 1000, ByteTokenizer(), "memory", 1, n, "0" * 16)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    (root / "sub" / ".hidden").mkdir(parents=True)
    (root / "b.txt").write_bytes(b"second\r\n")
    (root / "a.md").write_text("first é", encoding="utf-8")
    (root / "c.jsonl").write_text('{"text": "third"}\n\n{"text": ""}\n{"text": "fourth", "x": 1}\n')
    (root / "sub" / "d.py").write_text("fifth")
    (root / "empty.txt").touch()
    (root / "image.png").write_bytes(b"\x89PNG\xff")
    (root / "tokens.bin").write_bytes(b"a\0b\0")
    (root / ".secret").write_text("hidden")
    (root / "sub" / ".hidden" / "e.txt").write_text("hidden")
    return root


# Tokenizers


@settings(deadline=None)
@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, EOT]) == text
    assert tokenizer.count_bytes([*ids, EOT]) == len(text.encode())


@given(st.lists(st.integers(0, 300)))
def test_streamed_bytes_are_the_decoded_text(ids):
    stream = StreamDecoder(ByteTokenizer())
    assert "".join(map(stream.feed, ids)) + stream.flush() == ByteTokenizer().decode(ids)


@pytest.mark.parametrize("text", ["the stick", "né 漢字 🙂 end", "", "<|endoftext|> is written out"])
def test_huggingface_round_trip(bpe, text):
    tokenizer = load_tokenizer(bpe)
    ids = tokenizer.encode(text)
    assert tokenizer.vocab_size > 256 and ids.dtype == np.uint16
    assert tokenizer.eot not in ids, "text must not be encoded as the end-of-text token"
    assert tokenizer.decode([*ids, tokenizer.eot]) == text
    assert tokenizer.count_bytes(ids) == len(text.encode())
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.feed, ids)) + stream.flush() == text


def test_a_broken_character_is_streamed_in_the_end(bpe):
    tokenizer = load_tokenizer(bpe)
    stream = StreamDecoder(tokenizer)
    assert [stream.feed(i) for i in tokenizer.encode("🙂")[:2]] == ["", ""]
    assert "\ufffd" in stream.flush()


def test_token_dtype():
    assert [token_dtype(v).itemsize for v in (256, 257, 2**16, 2**16 + 1)] == [1, 2, 2, 4]


def test_missing_tokenizers_package_names_the_extra(bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # an import of it then fails
    with pytest.raises(ValueError, match=r"stickjax\[hf\]"):
        load_tokenizer(bpe)


def test_bad_tokenizer_files(tmp_path, bpe):
    with pytest.raises(ValueError, match="neither 'byte' nor a readable"):
        load_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "bad.json"))
    with open(bpe) as file:
        (tmp_path / "endless.json").write_text(file.read().replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(ValueError, match="no end of text"):
        load_tokenizer(str(tmp_path / "endless.json"))


# Sources


def test_folder_is_read_in_order_without_hidden_and_binary_files(folder, caplog):
    assert list(text_documents(str(folder))) == ["first é", "second\r\n", "third", "fourth", "fifth"]
    assert "left out 2 files" in caplog.text


def test_stdlib_split():
    train, heldout = load_corpus(DataConfig(heldout_every=10))
    again, _ = load_corpus(DataConfig(heldout_every=10))
    assert train.hash == again.hash != heldout.hash and len(train.hash) == 16
    assert train.tokens.dtype == np.uint16 and train.tokens[-1] == EOT
    assert train.bytes + train.documents == len(train.tokens)
    assert train.documents == (train.tokens == EOT).sum() > 8 * heldout.documents
    assert heldout.summary().startswith("stdlib: ") and "\n" not in heldout.summary()
    text = train.tokenizer.decode(train.tokens) + heldout.tokenizer.decode(heldout.tokens)
    assert "class OrderedDict(" in text and "class JSONDecoder(" in text
    for absent in ("build_time_vars = {", "please don't muck it up", "class CommonTest(", "GB18030"):
        assert absent not in text, f"{absent} is not the source of a library"


def documents_of(corpus: Corpus) -> list[str]:
    ends = np.flatnonzero(corpus.tokens == EOT)
    return [corpus.tokenizer.decode(part) for part in np.split(corpus.tokens, ends + 1) if len(part)]


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(2, 12))
def test_held_out_documents_are_disjoint_and_nothing_is_lost(tmp_path_factory, documents, every):
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(documents)))
    tokenize(str(path), str(path.with_name("t")))
    for source, name in (("text", "x.jsonl"), ("tokens", "t")):
        parts = load_corpus(DataConfig(source=source, path=str(path.with_name(name)), heldout_every=every))
        train, heldout = map(documents_of, parts)
        assert train and heldout
        assert sorted(train + heldout) == sorted(f"document {i}" for i in range(documents))
        assert [c.documents for c in parts] == [len(train), len(heldout)]
        if source == "text":
            assert heldout == [f"document {i}" for i in range(0, documents, every)]


def test_one_document_is_cut_in_two(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("x" * 99)
    tokenize(str(path), str(tmp_path / "one"))
    for source, name in (("text", "one.txt"), ("tokens", "one")):
        train, heldout = load_corpus(DataConfig(source=source, path=str(tmp_path / name), heldout_every=4))
        assert (len(train.tokens), len(heldout.tokens)) == (75, 25)
        assert train.documents == heldout.documents == 1 and train.hash != heldout.hash


def test_heldout_path(folder, tmp_path):
    (tmp_path / "held.txt").write_text("held")
    train, heldout = load_corpus(DataConfig(source="text", path=str(folder), heldout_path=str(tmp_path / "held.txt")))
    assert train.documents == 5 and documents_of(heldout) == ["held"] and heldout.bytes == 4


# Token files


def test_token_file_equals_the_text(folder, tmp_path, capsys):
    out = str(tmp_path / "t")
    main(["tokenize", str(folder), out])
    assert "5 documents" in capsys.readouterr().out
    for path in (out, out + ".bin", out + ".json"):
        train, heldout = load_corpus(DataConfig(source="tokens", path=path, heldout_path=path))
        assert isinstance(train.tokens, np.memmap)
    text, _ = load_corpus(DataConfig(source="text", path=str(folder), heldout_path=str(folder)))
    assert np.array_equal(train.tokens, text.tokens)
    assert (train.hash, train.documents, train.bytes) == (text.hash, text.documents, text.bytes)
    part, _ = load_corpus(DataConfig(source="tokens", path=out))
    assert np.shares_memory(part.tokens, part.tokens.base), "the parts stay views of the file"
    assert sorted(os.listdir(tmp_path)) == ["t.bin", "t.json", "texts"]


def test_token_file_of_a_huggingface_tokenizer(bpe, folder, tmp_path):
    meta = tokenize(str(folder), str(tmp_path / "t"), bpe)
    assert meta["tokenizer"].startswith("hf:")
    train, heldout = load_corpus(DataConfig(source="tokens", path=str(tmp_path / "t"), tokenizer=bpe, heldout_every=5))
    assert train.tokenizer.decode(heldout.tokens) == "fifth"
    with pytest.raises(ValueError, match="was made by tokenizer 'hf:.*data.tokenizer is 'byte'"):
        load_corpus(DataConfig(source="tokens", path=str(tmp_path / "t")))


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    (tmp_path / "long.txt").write_text("x" * 100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # a larger file fails as on a full disk
    try:
        with pytest.raises(ValueError, match="cannot write .*t.bin: the file exceeds the size limit"):
            tokenize(str(tmp_path / "long.txt"), str(tmp_path / "t"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["long.txt"]


def test_the_command_prints_one_line_for_bad_input(tmp_path, capsys):
    command = [sys.executable, "-m", "stickjax.data", "tokenize", str(tmp_path / "none"), str(tmp_path / "t")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"error: SOURCE={str(tmp_path / 'none')!r} does not exist\n"
    assert main(["tokenize", __file__, str(tmp_path / "no" / "folder")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'no'} is not a folder; make it first\n"


def spoil(meta=None, **changes):
    """Return a function that damages the token file `t` in a folder: it writes a new t.json.

    The new text is `meta` if it is given, otherwise the old JSON in which `changes` replace entries.
    """
    return lambda folder: (folder / "t.json").write_text(
        meta or json.dumps(json.loads((folder / "t.json").read_text()) | changes)
    )


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda folder: os.truncate(folder / "t.bin", 7), "has 7 bytes instead of num_tokens=22 times 2"),
        (lambda folder: (folder / "t.json").unlink(), "there is no .*t.json; make it with"),
        (lambda folder: (folder / "t.bin").write_bytes(b"\xff" * 44), "token id 65535 must be below vocab_size=257"),
        (spoil("{"), "does not describe a token file"),
        (spoil("[]"), "does not describe a token file"),
        (spoil(version=9), "version 9"),
        (spoil(dtype="<u4"), "dtype <u4 does not fit vocab_size=257"),
        (spoil(vocab_size=300), "with vocab_size=300"),
    ],
)
def test_bad_token_files(tmp_path, edit, message):
    (tmp_path / "x.jsonl").write_text('{"text": "one two tri"}\n{"text": "four five"}')
    tokenize(str(tmp_path / "x.jsonl"), str(tmp_path / "t"))
    edit(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_corpus(DataConfig(source="tokens", path=str(tmp_path / "t")))
    assert "data.path=" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "data.path='.*none.txt' does not exist"),
        ("empty.txt", b"", "data.path=.* contains no text"),
        ("latin.txt", "né".encode("latin-1"), "latin.txt' is not UTF-8 text: .* at byte 1"),
        ("x.jsonl", b'{"text": "a"}\n\n{"body": "b"}', r"x.jsonl:3: no .* 'text' .data.text_field or --text-field.;"),
        ("x.jsonl", b'{"text": 3}', "x.jsonl:1: no text"),
        ("x.jsonl", b'["text"]', "x.jsonl:1: no text"),
        ("x.jsonl", b'{"text": "a"}\n{"text"', "x.jsonl:2: this line is not JSON"),
        ("x.jsonl", b'{"text": "\xff"}', "x.jsonl:1: this line is not JSON"),
        ("x.jsonl", b'{"text": "\\ud800"}', "x.jsonl:1: the field 'text' contains half of a surrogate pair"),
    ],
)
def test_bad_text(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_corpus(DataConfig(source="text", path=str(tmp_path / name)))
    assert "\n" not in str(error.value)


def test_empty_folders_and_unreadable_files(tmp_path, folder, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data.path=.* contains no text"):
        load_corpus(DataConfig(source="text", path=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="data.heldout_path='no' does not exist"):
        load_corpus(DataConfig(source="text", path=str(folder), heldout_path="no"))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "open", refuse)
    with pytest.raises(ValueError, match="cannot read .*a.md: Permission denied"):
        load_corpus(DataConfig(source="text", path=str(folder)))


# Batches


@given(st.lists(st.lists(st.integers(0, 255), max_size=9), min_size=1, max_size=20), st.integers(1, 12))
def test_batch_properties(documents, T):
    stream = np.array([token for d in documents for token in [*d, EOT]])
    stream = stream[: (len(stream) - 1) // T * T + 1]
    if len(stream) <= T:
        return
    windows = np.stack([stream[i : i + T + 1] for i in range(0, len(stream) - T, T)])
    batch = make_batch(windows, EOT)
    assert all(a.shape == (len(windows), T) for a in batch.values())
    assert [str(a.dtype) for a in batch.values()] == ["int32", "int32", "int32", "bool"]
    assert np.array_equal(batch["tokens"].ravel(), stream[:-1])
    assert np.array_equal(batch["targets"].ravel(), stream[1:])
    assert batch["loss_mask"].all(), "every token is a target, the first token of a document after the end of text"
    steps = np.diff(batch["segment_ids"], axis=1)
    assert (batch["segment_ids"][:, 0] == 0).all()
    assert np.array_equal(steps == 1, batch["tokens"][:, 1:] == EOT) and ((steps == 0) | (steps == 1)).all()


@given(st.lists(st.lists(st.integers(0, 254), max_size=9), min_size=2, max_size=20))
def test_a_batch_of_documents_with_a_beginning_of_their_own(documents):
    BOS = 255
    stream = np.array([token for d in documents for token in [BOS, *d, EOT]])
    batch = {name: array[0] for name, array in make_batch(stream[None], EOT, BOS).items()}
    number = np.cumsum(stream == BOS)[:-1] - 1
    assert np.array_equal(batch["segment_ids"], number), "every document is one segment"
    assert np.array_equal(batch["loss_mask"], batch["targets"] != BOS)
    plain = np.array([token for d in documents for token in [*d, EOT]])  # a stream without begin tokens
    same, without = (make_batch(plain[None], EOT, bos) for bos in (BOS, None))
    assert all(np.array_equal(same[name], without[name]) for name in same)


CONFIG = DataConfig(T=8, B=4, seed=3)


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def assert_same(here, there):
    assert len(here) == len(there)
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def starts(batches):
    return np.concatenate([batch["tokens"][:, 0] for batch in batches])


def test_every_epoch_is_a_new_order_of_all_windows():
    corpus = counting(8 * 20 + 5)  # 20 windows: an epoch has 5 steps
    first, second = np.split(starts(take(train_loader(corpus, CONFIG), 10)), 2)
    assert sorted(first) == sorted(second) == list(range(1000, 1160, 8))
    assert not np.array_equal(first, second)
    assert_same(take(train_loader(corpus, CONFIG), 10), take(train_loader(corpus, CONFIG), 10))
    neighbour = starts(take(train_loader(corpus, DataConfig(T=8, B=4, seed=4)), 5))
    assert not np.array_equal(neighbour, first) and not np.array_equal(neighbour, second)


def test_an_epoch_need_not_be_a_multiple_of_the_batch():
    drawn = starts(take(train_loader(counting(8 * 7 + 1), CONFIG), 7))  # 28 windows: 4 epochs of 7
    assert all(sorted(epoch) == list(range(1000, 1056, 8)) for epoch in np.split(drawn, 4))


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batch(process_count):
    corpus = counting(8 * 23 + 1)
    whole = take(train_loader(corpus, CONFIG), 15)
    shares = [
        take(train_loader(corpus, CONFIG, process_index=p, process_count=process_count), 15)
        for p in range(process_count)
    ]
    joined = [{k: np.concatenate([share[k] for share in step]) for k in step[0]} for step in zip(*shares, strict=True)]
    assert_same(whole, joined)


def test_resume_is_exact_and_does_not_depend_on_the_number_of_processes():
    corpus = counting(8 * 23 + 1)
    iterator = train_loader(corpus, CONFIG)
    take(iterator, 5)
    state = json.dumps(iterator.get_state())
    assert len(state) < 100
    rest = take(iterator, 5)
    resumed = train_loader(corpus, CONFIG)
    resumed.set_state(json.loads(state))
    assert_same(take(resumed, 5), rest)
    assert resumed.get_state() == iterator.get_state()
    second = train_loader(corpus, CONFIG, process_index=1, process_count=2)
    second.set_state(json.loads(state))
    assert_same(take(second, 5), [{k: a[2:] for k, a in batch.items()} for batch in rest])


def test_resume_reads_nothing_it_skips():
    class Counting(np.ndarray):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return np.asarray(self).__getitem__(index)

    corpus = counting(8 * 23 + 1)
    object.__setattr__(corpus, "tokens", corpus.tokens.view(Counting))
    iterator = train_loader(corpus, CONFIG)
    iterator.set_state({"next_index": 10**9})
    next(iterator)
    assert Counting.reads <= 4 * (1 + 2), "only one batch and the prefetched batches are read"


def test_loader_reads_a_token_file(tmp_path):
    tokenize(__file__, str(tmp_path / "t"))
    train, _ = load_corpus(DataConfig(source="tokens", path=str(tmp_path / "t")))
    batch = next(train_loader(train, DataConfig(T=32, B=2)))
    assert train.tokenizer.decode(batch["tokens"][0]) in Path(__file__).read_text()


def test_bad_loaders():
    with pytest.raises(ValueError, match="T=8 needs at least 9 tokens, but the training part of memory has 8"):
        train_loader(counting(8), CONFIG)
    with pytest.raises(ValueError, match="B=4 sequences must be a multiple of process_count=3"):
        train_loader(counting(99), CONFIG, process_count=3)
    with pytest.raises(ValueError, match="process_index=2 must be in 0..1"):
        train_loader(counting(99), CONFIG, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="no example can be used: the data is empty"):
        batches([], B=4, seed=0)
