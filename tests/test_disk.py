"""If the disk is full, a command prints one error line with the path, and leaves no incomplete file."""

import errno
import os
import resource
import signal
from pathlib import Path

import jax
import pytest

import stickjax
from stickjax import convert
from stickjax.config import Config, ExpertsConfig, ModelConfig
from stickjax.evaluation import plots
from stickjax.models.transformer import init
from stickjax.storage.run_folder import Loaded, save
from stickjax.surgery.__main__ import main as modules_main
from stickjax.system.disk import write_file, writing
from stickjax.system.lock import Lock, complete_folder
from stickjax.system.profiling import stop_trace
from stickjax.training.metrics import MetricsLog, read_metrics


@pytest.fixture
def limit():
    """Return a function of n that forbids this process to write a file of more than n bytes, as if the disk were full.

    The limit ends with the test.
    """
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    # The compilation cache writes files too. Once it is in use, JAX ignores the option that disables it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    signal.signal(signal.SIGXFSZ, handler)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_is_complete_or_as_it_was(tmp_path, limit):
    path = tmp_path / "config.json"
    write_file(path, "before")
    limit(100)
    with pytest.raises(OSError, match="the file exceeds the size limit, such as ulimit -f: '.*/config.json'"):
        write_file(path, "x" * 101)
    with pytest.raises(OSError, match="No such file or directory: '.*/none/config.json'"):
        write_file(tmp_path / "none" / "config.json", b"")
    assert path.read_text() == "before" and names(tmp_path) == ["config.json"]


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    path, sync = tmp_path / "evaluation.json", os.fsync

    def write_another(number):
        monkeypatch.setattr(os, "fsync", sync)
        write_file(path, "of another process")

    monkeypatch.setattr(os, "fsync", write_another)  # another process writes the file before this one renames its own
    write_file(path, "the last one")
    assert path.read_text() == "the last one" and names(tmp_path) == ["evaluation.json"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.tmp"), "the disk is full: 'x'"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up: 'x'"),
        (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only: 'x'"),
        (OSError("7 requested and 3 written"), "7 requested and 3 written: 'x'"),
        (RuntimeError("INTERNAL: x.pb; No space left on device"), "the disk is full: 'x'"),
    ],
)
def test_what_the_disk_says(error, said):
    with pytest.raises(OSError, match=said), writing("x"):
        raise error
    with pytest.raises(RuntimeError, match="a bug"), writing("x"):
        raise RuntimeError("a bug")


def test_metrics_say_what_is_full(tmp_path, limit):
    log = MetricsLog(tmp_path, after_step=0)
    row = {"step": 1, "tokens": 8, "loss": 2.5, "learning_rate": 0.1}
    log.write(row)
    limit((tmp_path / "metrics.jsonl").stat().st_size + 8)
    with pytest.raises(OSError, match="the file exceeds the size limit, such as ulimit -f: '.*/metrics.jsonl'"):
        log.write(row | {"step": 2})
    log.close()
    limit(resource.RLIM_INFINITY)
    MetricsLog(tmp_path, after_step=5).close()
    assert read_metrics(tmp_path) == [row] and names(tmp_path) == ["metrics.jsonl"]


def test_models_are_written_whole_or_not(tmp_path, limit, capsys):
    config = Config(
        ModelConfig(V=257, D=8, L=2, N=2, K=1, H=4, F=16, experts=ExpertsConfig(E=4, k=2), attention="softmax")
    )
    model = init(config.model, jax.random.key(0))
    stickjax.export(Loaded(model, config, None, 0), tmp_path / "theirs", type="granitemoe")
    save(tmp_path / "run", model, config)
    before = names(tmp_path)
    limit(4096)
    said = "model.safetensors: the file exceeds the size limit, such as ulimit -f"
    for main, argv in (
        (convert.main, [tmp_path / "theirs", tmp_path / "out/new"]),
        (convert.main, [tmp_path / "run", tmp_path / "out/new", "--type=granitemoe"]),
        (modules_main, ["extend", tmp_path / "run", tmp_path / "out/new", "--experts=2"]),
    ):
        assert main([*map(str, argv)]) == 1
        assert capsys.readouterr().err == f"error: {tmp_path}/out/new/{said}\n"
        assert names(tmp_path) == before, argv


def test_two_do_not_write_one_folder_at_once(tmp_path):
    (tmp_path / "new.tmp/left").mkdir(parents=True)  # left by a killed process
    with complete_folder(tmp_path / "new") as folder:
        assert names(folder) == ["lock"]
        (folder / "own").write_text("")
        with pytest.raises(ValueError, match="new.tmp is being written by process"), complete_folder(tmp_path / "new"):
            raise AssertionError("complete_folder must raise before this line")
    assert names(tmp_path) == ["new", "new/own"]
    lock = Lock(tmp_path / "other.tmp")
    with pytest.raises(ValueError, match="other.tmp is being written"), complete_folder(tmp_path / "other"):
        raise AssertionError("complete_folder must raise before this line")
    lock.release()


def test_a_trace_that_does_not_fit_is_not_left(tmp_path, monkeypatch):
    (tmp_path / "of another day").mkdir()

    def stop():
        (tmp_path / "plugins/profile").mkdir(parents=True)
        (tmp_path / "plugins/profile/half.xplane.pb").write_text("")
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: half.xplane.pb; No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    with pytest.raises(OSError, match="the disk is full"):
        stop_trace(tmp_path)
    assert names(tmp_path) == ["of another day"]


def test_a_picture_is_complete_or_as_it_was(tmp_path, limit):
    page, _ = plots.figure("x", "y")
    limit(1000)
    with pytest.raises(OSError, match="exceeds the size limit, such as ulimit -f: '.*/a.png'"):
        plots.save(page, tmp_path / "a.png")
    assert names(tmp_path) == []
