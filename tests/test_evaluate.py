"""Test the evaluation on held-out text: how the text is cut into windows, and how several runs are compared.

The compared runs may have the same name, different T, or different folders.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stickjax import evaluate
from stickjax.config import Config
from stickjax.data.corpus import Corpus
from stickjax.data.heldout import heldout_windows
from stickjax.data.tokenizer import ByteTokenizer, load_tokenizer
from stickjax.evaluate import main, names
from stickjax.evaluation import plots
from stickjax.system.tables import print_table
from stickjax.train import fit

EOT = 256


def corpus_of(*lengths: int) -> Corpus:
    """Return a corpus in which document i has lengths[i] tokens.

    The last token of a document is the end of text. All others are the byte i % 256.
    """
    tokens = np.concatenate([np.append(np.full(n - 1, i % 256), EOT) for i, n in enumerate(lengths)])
    return Corpus(tokens.astype(np.uint16), ByteTokenizer(), "memory", len(lengths), int(sum(lengths)), "0" * 16)


def test_windows_stay_inside_documents_and_share_their_targets():
    corpus = corpus_of(10, 33, 100, 16, 17, 64)  # full windows of 16 targets: 0, 2, 6, 1, 1, 4
    windows = heldout_windows(corpus, 4, lengths=(1, 2, 4), max_tokens=14 * 16)
    assert windows.tokens.shape == (14, 17) and windows.tokens.dtype == np.int32
    assert (windows.targets == 16).all() and windows.lengths == (1, 2, 4)
    assert (windows.tokens[:, 1:-1] != EOT).all() and (np.ptp(windows.tokens[:, 1:-1], axis=1) == 0).all()
    assert (windows.tokens[:, 0] == EOT).sum() == 5, "a document begins after an end of text, as in training"
    for m in (1, 2, 4):
        pieces, real = windows.pieces(m)
        assert pieces.shape == (14 * 4 // m, 4 * m + 1) and real.all() and real.shape == (14 * 4 // m, 4 * m)
        assert np.array_equal(pieces[:, 1:].ravel(), windows.tokens[:, 1:].ravel())
    assert windows.bytes == (windows.tokens[:, 1:] != EOT).sum() == 14 * 16 - 2


def test_windows_are_spread_over_documents():
    corpus = corpus_of(100, 100, 10, 100, 17)
    windows = heldout_windows(corpus, 4, lengths=(4,), max_tokens=6 * 16)
    assert windows.tokens.shape == (6, 17) and (windows.targets == 16).all()
    per_document = np.bincount(windows.tokens[:, 1], minlength=5)
    assert per_document[[2, 4]].tolist() == [0, 1] and sorted(per_document[[0, 1, 3]]) == [1, 2, 2]
    assert np.array_equal(windows.tokens, heldout_windows(corpus, 4, lengths=(4,), max_tokens=6 * 16).tokens)
    assert len(heldout_windows(corpus, 4, lengths=(4,), max_tokens=1).tokens) == 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.sampled_from([1, 3, 4]), st.booleans())
def test_every_token_of_a_small_corpus_is_one_target_at_every_length(sizes, T, begins):
    corpus = corpus_of(*sizes)
    if begins:  # every document begins with a begin token
        corpus = with_bos(corpus)
    windows = heldout_windows(corpus, T, lengths=(1, 2, 4, 8))
    longest = max(sizes)
    assert windows.lengths == tuple(m for m in (1, 2, 4, 8) if m == 1 or m * T <= longest)
    expected = np.sort(corpus.tokens[corpus.tokens != 255] if begins else corpus.tokens)
    assert windows.bytes == (expected != EOT).sum()
    for m in windows.lengths:
        pieces, real = windows.pieces(m)
        assert real.shape[1] == min(m * T, 64) and np.array_equal(np.sort(pieces[:, 1:][real]), expected)
        before = pieces[:, :-1][real]
        first = np.flatnonzero(before == (255 if begins else EOT))
        assert len(first) == len(sizes), "no target follows the end of a document, and every target has its context"


def with_bos(corpus: Corpus) -> Corpus:
    tokenizer = type("Begins", (ByteTokenizer,), dict(prefix=(255,)))()
    starts = np.append(0, np.flatnonzero(corpus.tokens == EOT)[:-1] + 1)
    return dataclasses.replace(corpus, tokens=np.insert(corpus.tokens, starts, 255), tokenizer=tokenizer)


def test_lengths_that_no_document_reaches_are_left_out_and_said(caplog):
    windows = heldout_windows(corpus_of(9, 20), 4)
    assert windows.lengths == (1, 2, 4)
    assert (
        "longest held-out document of memory has 20 tokens: contexts of 8 times T=4 tokens are left out" in caplog.text
    )
    windows = heldout_windows(corpus_of(9, 20), 512, lengths=(1, 2))
    pieces, real = windows.pieces(1)
    assert windows.lengths == (1,) and pieces.shape == (2, 65) and real.sum() == 29, "padding is not computed"


def test_bytes_of_subword_targets(bpe):
    tokenizer = load_tokenizer(bpe)
    text = "the stick is left "
    tokens = tokenizer.document(text * 4)
    corpus = Corpus(tokens, tokenizer, "memory", 1, 0, "0" * 16)
    assert heldout_windows(corpus, len(tokens), lengths=(1,)).bytes == len(text * 4)
    half = heldout_windows(corpus, len(tokens) // 2, lengths=(1,), max_tokens=len(tokens) // 2)
    assert half.bytes == len(tokenizer.decode(tokens[: len(tokens) // 2]))


def test_bad_windows():
    with pytest.raises(ValueError, match=r"lengths=\(3, 8\): every length must divide the largest length, 8, not 3"):
        heldout_windows(corpus_of(99), 4, lengths=(3, 8))
    for few in (0, -1):
        with pytest.raises(ValueError, match=f"max_tokens={few} must be at least 1"):
            heldout_windows(corpus_of(99), 4, max_tokens=few)


# Evaluating


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with three runs on documents of 9 to 39 bytes.

    `x/run` and `y/run` have the same name and T=8; `half` has T=4.
    """
    folder = tmp_path_factory.mktemp("runs")
    lines = ({"text": f"{'stick ' * (i % 6 + 1)}{i:03}"} for i in range(60))
    (folder / "short.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = dict(V=257, D=8, L=1, N=1, K=1, H=8, F=8)
    small = {f"model.{name}": size for name, size in sizes.items()}
    small |= {"data.source": "text", "data.path": str(folder / "short.jsonl"), "data.T": 8, "data.B": 2}
    small |= {"train.steps": 2, "train.log_every": 1, "optim.schedule": "constant", "data.heldout_every": 4}
    fit(Config().replace(small), str(folder / "x/run"), quiet=True)
    for copy in ("y/run", "half"):
        shutil.copytree(folder / "x/run", folder / copy)
    (folder / "half/config.json").write_text(Config().replace(small | {"data.T": 4}).to_json())
    return folder


def strict(path: Path):
    """Read a file as strict JSON. NaN and Infinity raise a ValueError."""

    def refuse(word):
        raise ValueError(word)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_short_documents_of_several_runs(runs, capsys, monkeypatch, caplog):
    monkeypatch.chdir(runs)
    assert main(["x/run", "y/run", "half", "x/../x/run"]) == 0
    said = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.out.splitlines() if line.startswith("│")]
    records = {name: strict(runs / name / "evaluation.json")["lengths"] for name in ("x/run", "y/run", "half")}
    assert [row[0] for row in rows] == ["x/run", "y/run", "half"] and "curves: x/run/length.png" in said.out
    for row, (name, of) in zip(rows, records.items(), strict=True):
        T = 4 if name == "half" else 8
        assert [r["context"] for r in of] == [T * m for m in (1, 2, 4, 8) if T * m <= 40], "there are other contexts"
        # Only one run reaches 8 times its T, so its context is in the heading instead of the cell.
        cells = [f"{r['bits_per_byte']:.3f}" + ("" if r["multiple"] == 8 else f" ({r['context']})") for r in of]
        assert row[1:] == cells + ["-"] * (4 - len(cells))
        # 15 whole documents, each with 3 digits, 1 to 6 times "stick ", and the end of text.
        assert {r["bytes"] for r in of} == {sum(3 + 6 * (i % 6 + 1) for i in range(0, 60, 4))}
        assert {r["tokens"] - r["bytes"] for r in of} == {15}
    assert "34 tokens: contexts of 8 times T=8 tokens are left out" in caplog.text
    for line in ("x/run: reading the parameters", "half: 2x (context 8): compiling, then scoring"):
        assert line in said.err, "progress lines are printed"
    for picture in ("length.png", "training.png"):
        assert (runs / "x/run" / picture).stat().st_size > 10_000


def test_a_run_has_the_name_of_its_folder(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs / "half")
    assert main([".", "--lengths=1,2", "--max-tokens=64"]) == 0
    out = capsys.readouterr().out
    assert "│ half │" in out and "1x (4)" in out and "2x (8)" in out and "4x" not in out
    assert strict(runs / "half/evaluation.json")["run"] == "half"
    assert list(names([".", "../x/run", "../y/run", str(runs / "half")])) == ["half", "x/run", "y/run"]
    assert list(names(["/run", "/x/run", "/y/x/run"])) == ["/run", "/x/run", "y/x/run"]


def test_a_run_that_cannot_be_written_is_evaluated(runs, capsys, monkeypatch, tmp_path):
    run = runs / "y/run"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    before = {file: file.stat().st_mtime_ns for file in run.iterdir()}
    for more in ([], [f"--plot={tmp_path / 'p.png'}"]):
        assert main([str(run), "--max-tokens=64", "--lengths=1", *more]) == 0
        said = capsys.readouterr()
        assert "1x (8)" in said.out and "nothing is written into it" in said.err
    assert {file: file.stat().st_mtime_ns for file in run.iterdir()} == before
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "words, message",
    [
        (["--max-tokens=0"], "max_tokens=0 must be at least 1"),
        (["--max-tokens=-3"], "max_tokens=-3 must be at least 1"),
        (["--lengths=1,x"], "--lengths=1,x must be whole numbers"),
        (["--lengths="], "--lengths= must be whole numbers"),
        (["--lengths=0"], "--lengths=0 must be whole numbers"),
        (["--lengths=2,3"], "lengths=(2, 3): every length must divide the largest length, 3, not 2"),
        (["--part=valid"], "--part=valid: runs that read text have only the held-out text; leave --part out"),
        (["--plot=no/folder/p.png"], "--plot=no/folder/p.png: no/folder is not a folder"),
    ],
)
def test_bad_words_are_one_line(runs, capsys, words, message):
    assert main([str(runs / "half"), *words]) == 1
    error = capsys.readouterr().err
    assert f"error: {message}" in error.splitlines()[-1]
    assert "max-tokens" in words[0] or "reading the parameters" not in error


def test_rows_of_different_texts_are_named(runs, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("another text " * 20)
    words = ["--max-tokens=64", "--lengths=1", str(runs / "x/run"), str(runs / "half")]
    assert main(words) == 0 and "cannot be compared" not in capsys.readouterr().err
    other = shutil.copytree(runs / "half", tmp_path / "other")
    tree = json.loads((other / "config.json").read_text())
    tree["data"]["path"] = str(tmp_path / "other.txt")
    (other / "config.json").write_text(json.dumps(tree))
    assert main([*words, str(other)]) == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("the held-out texts differ, so the rows cannot be compared (run: text ")
    assert f"; other: text {tmp_path / 'other.txt'} " in said and said.endswith("--data.source=text --data.path=FOLDER")
    assert main([*words, str(other), f"--data.path={tmp_path / 'other.txt'}"]) == 0
    assert "cannot be compared" not in capsys.readouterr().err


@pytest.mark.parametrize("columns", [0, 1, 20, 40, 200])
def test_a_narrow_terminal_loses_no_number(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    record = dict(multiple=1, context=256, bits_per_byte=2.13579, depth=3.25)
    print_table(evaluate.table({"lr[1e-3]": [record], "a:smile:": [record | {"context": 128}]}))
    out = capsys.readouterr().out
    for text in ("lr[1e-3]", "a:smile:", "2.136", "3.25", "256", "128", "held-out" if columns != 1 else ""):
        assert text in out


def test_names_in_a_picture_are_text(tmp_path):
    record = dict(multiple=1, context=256, bits_per_byte=2.0)
    runs = {"_lr$1$": [record], "a$\\frac": [record], "50%": [record]}
    plots.plot_length_curves(runs, tmp_path / "p.png")
    assert os.path.getsize(tmp_path / "p.png") > 10_000
