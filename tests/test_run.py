"""A run folder can be moved or copied.

It contains its tokenizer, and it recognises its training text by a hash and not by a path.
"""

import json
import shutil
from pathlib import Path

import jax
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stickjax import convert, evaluate, generate
from stickjax.config import Config
from stickjax.storage.checkpoints import Checkpoints
from stickjax.storage.run_config import read_config
from stickjax.surgery.__main__ import main as modules_main
from stickjax.train import fit, main
from stickjax.training.metrics import read_metrics
from stickjax.training.step import init_state

SMALL = Config().replace(
    {
        "model.V": 257, "model.D": 16, "model.L": 1, "model.N": 2, "model.K": 1, "model.H": 8, "model.F": 16,
        "model.attention": "softmax", "data.T": 16, "data.B": 2, "data.source": "text", "data.path": "text",
        "data.tokenizer": "tokenizer.json", "train.steps": 2, "train.checkpoint_every": 1, "train.log_every": 1,
    }
)  # fmt: skip


MOVED = "lr[0.1] :x: 100%"  # it looks like a glob pattern, a terminal style, and an emoji code


def write_tokenizer(path: Path, reverse=False) -> None:
    """Write a tokenizer.json in which each byte is a token; with `reverse`, the bytes have other ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Make a project folder with text and a tokenizer, train a run of two steps in it, and return the folder."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "text").mkdir()
    for i in range(3):
        (folder / f"text/{i}.txt").write_text(Path(__file__).read_text()[:2000])
    write_tokenizer(folder / "tokenizer.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit(SMALL, "run", quiet=True)
    return folder


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    """Copy the project folder `trained`, make the copy the current folder of the test, and return it.

    In run/config.json of the copy, the paths of files in `trained` are replaced by the paths of their copies.
    """
    folder = shutil.copytree(trained, tmp_path / "project")
    tree = json.loads((folder / "run/config.json").read_text().replace(str(trained), str(folder)))
    (folder / "run/config.json").write_text(json.dumps(tree))
    monkeypatch.chdir(folder)
    return folder


def said(capsys, main, *argv) -> str:
    assert main([*map(str, argv)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, main, *argv) -> str:
    assert main([*map(str, argv)]) == 1
    error = capsys.readouterr().err
    *progress, error = error.splitlines()
    assert error.startswith("error: ") and all(line.endswith(": reading the parameters") for line in progress)
    return error


def test_a_run_is_used_from_any_folder_and_after_a_move(project, tmp_path, monkeypatch, capsys):
    words = ("--prompt", "def", "--max-new-tokens", 8, "--temperature", 0)
    expected = said(capsys, generate.main, "run", *words)
    bits = said(capsys, evaluate.main, "run", "--max-tokens", 64)
    moved = shutil.move(project / "run", tmp_path / "moved")
    write_tokenizer(project / "tokenizer.json", reverse=True)  # another tokenizer at the old path
    for folder in (project, tmp_path):
        monkeypatch.chdir(folder)
        assert said(capsys, generate.main, moved, *words) == expected
    assert said(capsys, evaluate.main, moved, "--max-tokens", 64).count("0.") == bits.count("0.")
    said(capsys, convert.main, moved, "theirs", "--type=granite")
    said(capsys, modules_main, "freeze", moved, "frozen", "embed")
    shutil.rmtree(moved)
    for folder in ("theirs", "frozen"):
        assert said(capsys, generate.main, folder, *words) == expected


def test_another_tokenizer_is_refused_by_its_hash(project, capsys):
    write_tokenizer(project / "other.json", reverse=True)
    (project / "small.json").write_text(SMALL.to_json())
    again = (main, "small.json", "--run", "run", "--train.steps=3")
    assert "data.tokenizer='other.json' differs from" in refused(capsys, *again, "--data.tokenizer=other.json")
    assert "data.tokenizer: " in refused(capsys, *again, "--data.tokenizer=byte")
    shutil.copy(project / "other.json", project / "run/tokenizer.json")
    for argv in ((generate.main, "run", "--prompt", "x"), (evaluate.main, "run"), (convert.main, "run", "out")):
        assert "but run@2 was trained with hf:" in refused(capsys, *argv)
    assert "differs from" in refused(capsys, *again)
    (project / "tokenizer.json").unlink()
    assert "run@2 was trained with hf:" in refused(capsys, *again)
    branch = (main, "small.json", "--from", "run@1", "--run", "new", "--data.tokenizer=other.json")
    assert "run@1 was trained with hf:" in refused(capsys, *branch)
    assert not Path("new").exists() and not Path("out").exists()


def test_a_run_goes_on_where_its_text_lies_now(project, tmp_path, monkeypatch, capsys):
    shutil.move(project / "run", tmp_path / MOVED)
    shutil.move(project / "text", tmp_path / "texts")
    (project / "tokenizer.json").unlink()
    monkeypatch.chdir(tmp_path)
    words = (f"{MOVED}/config.json", "--run", MOVED, "--train.steps=4")
    assert "does not exist; give the right path by --data.path=PATH" in refused(capsys, main, *words)
    assert "--data.path=PATH" in refused(capsys, evaluate.main, MOVED)
    assert f"resuming {tmp_path}/{MOVED}@2\n" in said(capsys, main, *words, "--data.path=texts")
    assert [row["step"] for row in read_metrics(MOVED)] == [1, 2, 3, 4]
    assert read_config(MOVED).data.path == str(tmp_path / "texts")
    said(capsys, main, "--from", f"{MOVED}@3", "--run", "new", "--train.steps=5")
    assert (tmp_path / "new/tokenizer.json").read_bytes() == (tmp_path / MOVED / "tokenizer.json").read_bytes()
    (tmp_path / "texts/1.txt").write_text("another text")
    assert "the text has changed" in refused(capsys, main, *words, "--data.path=texts")


def test_a_run_of_before_is_read(project, capsys):
    """A run of an earlier version can be used and trained further.

    Its folder has no tokenizer.json, and its checkpoint does not name the tokenizer. Training adds the tokenizer.json.
    """
    abstract = jax.eval_shape(lambda: init_state(SMALL, jax.random.key(0)))
    _, state, extra = Checkpoints("run").restore(abstract)
    del extra["tokenizer"]
    shutil.rmtree("run/checkpoints")
    Path("run/tokenizer.json").unlink()
    (project / "run/config.json").write_text(SMALL.to_json())
    with Checkpoints("run") as checkpoints:
        checkpoints.save(2, state, extra)
    said(capsys, generate.main, "run", "--prompt", "x", "--max-new-tokens", 2)
    said(capsys, main, "run/config.json", "--run", "run", "--train.steps=3")
    assert Path("run/tokenizer.json").exists()
