"""Test the exit codes and messages of the commands, and the command `stickjax`, which contains all others."""

import os
import signal
import subprocess
import sys
import time

import pytest

from stickjax import __main__, __version__, train
from stickjax.config.command import SEED_TYPE, Parser, UsageError, command, number
from stickjax.storage.checkpoints import DamagedCheckpoint

ENDS = [
    (None, 0, ""),
    (SystemExit(0), 0, ""),
    (ValueError("T=0\n  must be 1"), 1, "error: T=0 must be 1\n"),
    (DamagedCheckpoint("the checksum differs"), 1, "error: the checksum differs\n"),
    (FileNotFoundError(2, "No such file or directory", "a.py"), 1, "error: a.py: No such file or directory\n"),
    (FileNotFoundError(2, "No such file or directory", "a\nb"), 1, "error: a\\nb: No such file or directory\n"),
    (OSError("disk full"), 1, "error: disk full\n"),
    (FloatingPointError("step 3"), 1, "error: step 3\n"),
    (MemoryError(), 1, "error: MemoryError\n"),
    (UsageError("--foo"), 2, "error: --foo\n"),
    (
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes."),
        1,
        "error: Out of memory allocating 4 bytes.\n",
    ),
    (KeyboardInterrupt(), 130, "interrupted\n"),
]


@pytest.mark.parametrize("error, code, said", ENDS, ids=lambda x: type(x).__name__)
def test_a_command_ends_with_a_line_and_an_exit_code(capsys, error, code, said):
    @command
    def main(argv):
        if error is not None:
            raise error

    assert main([]) == code
    assert capsys.readouterr() == ("", said)


def test_what_is_a_bug_is_raised():
    @command
    def main(argv):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        main([])


def test_an_option_that_does_not_exist_has_a_nearest_name():
    parser = Parser(prog="x")
    parser.add_argument("--temperature", type=float)
    with pytest.raises(UsageError, match="unrecognized arguments: --temprature=1 .did you mean '--temperature'"):
        parser.parse_args(["--temprature=1"])
    with pytest.raises(UsageError, match="invalid float value: 'hot'"):
        parser.parse_args(["--temperature=hot"])


def test_numbers_of_a_command_line_have_bounds():
    parser = Parser(prog="x")
    parser.add_argument("--tokens", type=number(int, at_least=1))
    parser.add_argument("--seed", type=SEED_TYPE)
    assert parser.parse_args(["--tokens=5e9", "--seed", "0"]).tokens == 5_000_000_000
    refused = {
        "--tokens=0": "must be at least 1", "--tokens=1.5": "a whole number", "--tokens=inf": "a whole number",
        "--seed=-1": "at least 0 and at most 2147483647", "--seed=1e10": "at most 2147483647",
    }  # fmt: skip
    for word, said in refused.items():
        with pytest.raises(UsageError, match=f"argument {word.partition('=')[0]}: value=.*{said}"):
            parser.parse_args([word])


SUGGESTED = {
    "--lr": "optim.peak_lr", "--learning-rate": "optim.peak_lr", "--batch-size": "data.B", "--seq-len": "data.T",
    "--epochs": "train.steps", "--data": "data.path", "--model": "CONFIG", "--rnu": "--run", "--out": "--run",
    "--peak-lr": "optim.peak_lr", "--steps": "train.steps", "--experts": "model.experts.E", "--init": "--init-from",
}  # fmt: skip


@pytest.mark.parametrize("word, meant", SUGGESTED.items())
def test_words_that_a_person_tries_are_answered(word, meant, capsys):
    for words in ([word, "3", "tiny"], ["tiny", f"{word}=3"]):
        assert train.main(words) == 2
        typed = f"--{meant}=VALUE" if "." in meant else repr(meant)
        assert capsys.readouterr().err == f"error: unknown option {word} (did you mean {typed}?)\n"


def test_values_follow_their_field_wherever_they_stand(capsys):
    """The word after an option such as `--model.D` is its value, whether the config's name comes before or after it.

    In `--model.D 64 tiny`, 64 is the value of D and `tiny` is the config.
    """
    assert train.main(["--model.D", "-5", "tiny"]) == train.main(["tiny", "--model.D", "-5"]) == 1
    assert capsys.readouterr().err == "error: D=-5 must be at least 1\n" * 2


@pytest.mark.parametrize(
    "words, said",
    [
        (["tiny", "--run", ""], "--run is empty"),
        ([""], "'' does not exist"),
        (["tiny", "--run", "a", "--from", "b", "--init-from", "c"], "--from continues a checkpoint"),
    ],
)
def test_an_empty_name_or_two_beginnings_are_refused(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(words) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}") and not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_a_run_also_with_an_at_sign(tmp_path):
    (tmp_path / "me@host").mkdir()
    folder = str(tmp_path / "me@host")
    assert train.split_branch(folder) == (folder, None)
    assert train.split_branch(f"{folder}@7") == (folder, 7)
    for step in ("", "x", "-1", "²"):
        with pytest.raises(ValueError, match="there is no such folder, and .* is not the number of a step"):
            train.split_branch(f"{folder}@{step}")


def test_the_program_without_a_command_is_its_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stickjax"])
    assert __main__.main() == 0
    assert capsys.readouterr() == (__main__.HELP + "\n", "")


def test_the_command_of_commands(capsys, tmp_path):
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out == f"stickjax {__version__}\n"
    assert __main__.main([]) == __main__.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in __main__.COMMANDS)
    assert __main__.main(["trian"]) == 2
    assert "unknown command 'trian' (did you mean 'train'?)" in capsys.readouterr().err
    for name in (*__main__.COMMANDS, "sweeps"):
        assert __main__.main([name, "--help"]) == 0
        assert "usage: " in capsys.readouterr().out
    assert __main__.main(["generate", str(tmp_path)]) == 1
    assert "is neither a run folder, a Hugging Face folder, nor a model on the hub" in capsys.readouterr().err


PROGRAM = """
import sys
sys.argv = ["-m"]; sys.orig_argv = ["python", "-m", "stickjax.train"]
import stickjax, signal
assert not {"jax", "numpy"} & set(sys.modules), "the package is light until a command is chosen"
from stickjax.config.command import command
print("importing", flush=True)
if sys.stdin.read(1) == "c":
    @command
    def main(argv):
        print("running", flush=True)
        try:
            sys.stdin.read(1)
        finally:
            print("cleaned up", flush=True)
    sys.exit(main([]))
"""


@pytest.mark.parametrize("phase", ["importing", "running"])
def test_ctrl_c_is_one_line_from_the_first_import_on(phase):
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", PROGRAM], **options) as process:
        assert process.stdout.readline() == "importing\n"
        if phase == "running":
            process.stdin.write("c")
            process.stdin.flush()
            assert process.stdout.readline() == "running\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert out == ("cleaned up\n" if phase == "running" else "")


def test_nobody_reads():
    """A command prints nothing about a broken pipe if the reader of its output has ended, as in `stickjax | head -0`.

    This holds while the command writes and also when Python exits.
    """
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "stickjax", "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
