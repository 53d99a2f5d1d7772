"""The folder of compiled programs: a second start compiles nothing, and wrong folders are reported or left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from stickjax import Config
from stickjax.storage.run_config import check_config, read_config, write_config
from stickjax.storage.run_folder import load
from stickjax.system import compiled
from stickjax.system.compiled import keep_compiled, remove_old
from stickjax.training.metrics import read_metrics

FIELDS = (
    "--model.D=16 --model.L=1 --model.N=2 --model.K=1 --model.H=8 --model.F=32 --model.attention=softmax "
    "--model.experts.E=0 --model.experts.k=0 --data.source=recall "
    "--data.examples=100 --data.T=32 --data.B=2 --train.steps=3 --train.log_every=1 "
    "--optim.warmup_tokens=0 --optim.decay_tokens=0"
)


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Set the cache folder of the user to a temporary folder, and JAX to its default settings until the test ends."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled.compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compiled.compilation_cache.reset_cache()


def start(run, cache) -> subprocess.Popen:
    """Start a training in the run folder `run`. `cache` is the cache folder of the user, which has the programs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERS"))}
    command = [sys.executable, "-m", "stickjax.train", "--run", str(run), "tiny", *FIELDS.split()]
    return subprocess.Popen(
        command, env=kept | {"XDG_CACHE_HOME": str(cache)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def names(cache) -> set[str]:
    """Return the names of the programs in the cache folder `cache`."""
    return {path.name for path in (cache / "stickjax" / "compiled").rglob("*-cache")}


def test_a_second_start_compiles_nothing_new(tmp_path):
    """Two trainings at the same time fill the folder. A third one adds no program, and has the same losses."""
    cache, runs = tmp_path / "cache", [tmp_path / name for name in ("one", "two", "three")]
    for group in (runs[:2], runs[2:]):
        found = names(cache)
        for process in [start(run, cache) for run in group]:
            err = process.communicate()[1]
            assert process.returncode == 0, err
    assert found and names(cache) == found
    losses = [[row["loss"] for row in read_metrics(str(run))] for run in runs]
    assert len(losses[0]) == 3 and losses[0] == losses[1] == losses[2]


def test_the_default_folder_is_in_the_cache_of_the_user(settings, tmp_path):
    keep_compiled(Config().train.compilation_cache)
    folder = jax.config.jax_compilation_cache_dir
    assert folder.startswith(str(tmp_path / "cache" / "stickjax" / "compiled")) and os.path.isdir(folder)


def test_a_folder_that_jax_has_is_kept(settings, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    for folder in ("auto", None):
        keep_compiled(folder)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    keep_compiled(str(tmp_path / "other"))  # a named folder decides
    assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "other"))


def test_none_changes_nothing(settings):
    keep_compiled(None)
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_written(settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"train.compilation_cache='.*/file/x' cannot be used: Not a directory; name"):
        keep_compiled(str(tmp_path / "file" / "x"))
    with pytest.raises(ValueError, match="='~nobody-here/x' cannot be used: Could not determine"):
        keep_compiled("~nobody-here/x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled("auto")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_default_folder_that_others_can_write_is_not_used(settings):
    compiled.default_folder().mkdir(parents=True)
    compiled.default_folder().chmod(0o777)
    keep_compiled("auto")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_run_does_not_record_a_named_folder(settings, tmp_path):
    """A config that somebody else wrote must not choose a folder whose programs are executed."""
    config = Config().replace({"train.compilation_cache": str(tmp_path / "named")})
    write_config(tmp_path / "run", config)
    assert read_config(tmp_path / "run").train.compilation_cache == "auto"
    check_config(tmp_path / "run", config)  # the run continues with every value of the field
    stored = tmp_path / "run" / "config.json"
    stored.write_text(stored.read_text().replace('"auto"', json.dumps(str(tmp_path / "foreign"))))
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        load(tmp_path / "run", changes={"model.V": 258})
    assert str(tmp_path / "cache") in jax.config.jax_compilation_cache_dir and not (tmp_path / "foreign").exists()


def test_another_cpu_or_another_number_of_cores_has_another_folder(settings, monkeypatch, tmp_path):
    found = []
    for flags, cores in (("avx2", 2), ("avx2 avx512f", 2), ("avx2 avx512f", 64)):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nprocessor\t: 1\nflags\t\t: {flags}\n")
        monkeypatch.setattr(compiled, "_CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: range(n), raising=False)
        keep_compiled(str(tmp_path / "named"))
        found.append(jax.config.jax_compilation_cache_dir)
    assert len(set(found)) == 3 and all(folder.startswith(str(tmp_path / "named")) for folder in found)


def test_only_programs_are_removed(settings, tmp_path, monkeypatch):
    keep_compiled("auto")
    folder = Path(jax.config.jax_compilation_cache_dir)
    for name in ("one-cache", "text.txt"):
        (folder / name).write_bytes(bytes(100))
    monkeypatch.setattr(compiled, "LARGEST", 50)
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled("auto")
    assert [path.name for path in folder.iterdir()] == ["text.txt"]


def test_the_programs_that_were_used_last_are_kept(tmp_path):
    for age, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    remove_old(tmp_path.iterdir(), 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
