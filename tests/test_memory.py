"""A model that does not fit into memory gives one error line, before memory is allocated.

A model that fits is never refused.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stickjax.config import Config, DataConfig, ModelConfig, TrainConfig
from stickjax.storage import run_folder as run
from stickjax.system import memory
from stickjax.system.memory import (
    Free,
    check_fits,
    check_program,
    free_memory,
    gib,
    host_memory,
    local_bytes,
    state_parts,
)
from stickjax.train import main
from stickjax.training.step import init_state

CONFIG = Config(
    ModelConfig(V=257, D=16, L=1, N=2, K=1, H=8, F=16),
    DataConfig(source="text", path=__file__, T=16, B=4),
    train=TrainConfig(steps=2),
)
GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function of {path: text} that replaces /proc and /sys/fs/cgroup by a folder with these files.

    All other memory limits of the process are removed.
    """
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (memory.resource.RLIM_INFINITY,) * 2)

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


MEMINFO = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {8 * GIB // 1024} kB\nSwapFree: {GIB // 1024} kB\n"}
MACHINE, GROUP = "available on this machine", "left by the limit of the control group"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, Free(9 * GIB, MACHINE)),
        (MEMINFO | {"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "max\n"}, Free(9 * GIB, MACHINE)),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/jobs/7\n",
                "cgroup/jobs/7/memory.max": "max\n",
                "cgroup/jobs/memory.max": f"{4 * GIB}\n",
                "cgroup/jobs/memory.current": f"{3 * GIB}\n",
                "cgroup/jobs/memory.stat": f"anon 5\nactive_file {GIB // 4}\ninactive_file {GIB // 4}\n",
            },
            Free(2 * GIB + GIB // 2, GROUP),  # GiB: 4 - 3 of the group, 1/2 of cached files, 1 of swap
        ),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "9:cpu:/\n4:memory:/not/mounted/here\n",
                "cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n",
                "cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
                "cgroup/memory/memory.stat": f"total_inactive_file {GIB}\ninactive_file 7\n",
            },
            Free(3 * GIB, GROUP),
        ),
    ],
    ids=["unknown", "machine", "no limit", "group around it", "version 1 in a container"],
)
def test_the_least_that_a_limit_leaves(machine, files, expected):
    machine(files)
    assert host_memory() == expected


def test_the_address_space(machine, monkeypatch):
    page = memory.os.sysconf("SC_PAGE_SIZE")
    machine(MEMINFO | {"proc/self/statm": f"{2 * GIB // page} 5 5 5\n"})
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (5 * GIB, 5 * GIB))
    assert host_memory() == Free(3 * GIB, "left by the limit of the address space, ulimit -v")


def test_this_machine_has_memory():
    assert host_memory().bytes > 2**20
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    assert free_memory(mesh).bytes <= host_memory().bytes // len(jax.devices()) * 1.1  # CPU devices share memory


def test_a_device_with_memory_of_its_own(monkeypatch):
    stats = {"bytes_limit": 100, "bytes_in_use": 30}
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert free_memory() == Free(70, "free on NVIDIA H200")
    stats.clear()
    assert free_memory() is None  # if a device does not report its memory, nothing is refused


def test_parts_of_a_state_by_hand():
    model = ModelConfig(V=257, D=16, L=1, N=2, K=1, H=8, F=16, param_dtype="bfloat16")
    state = jax.eval_shape(lambda: init_state(Config(model), jax.random.key(0)))
    n = sum(x.size for x in jax.tree.leaves(state.params))
    counters = 4 + 4 + 4 + 4  # Adam's count, the tokens (two words), the learning rate
    assert state_parts(state) == {"parameters": 2 * n, "float32 masters": 4 * n, "moments": 8 * n + counters}
    assert local_bytes({"key": jax.random.key(0), "w": jnp.zeros((3, 2), jnp.bool_)}) == 8 + 6


def test_what_fits_exactly_is_not_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda mesh: Free(100, "of a test"))
    check_fits({"parameters": 60, "moments": 40})
    with pytest.raises(
        ValueError, match=r"memory: parameters 60 B, moments 41 B, together 101 B, but .* 100 B are free"
    ):
        check_fits({"parameters": 60, "moments": 41})
    program = jax.jit(lambda x: x.T @ x).lower(np.zeros((4, 4), np.float32)).compile()
    check_program(program, "a product")
    monkeypatch.setattr(memory, "free_memory", lambda mesh: Free(63, "of a test"))
    with pytest.raises(
        ValueError, match="a product does NOT fit into memory: .* 64 B of arguments, but only 63 B are free"
    ):
        check_program(program, "a product")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model.D=1e12", "NOT fit into memory: parameters 1.3 PiB, moments 2.5 PiB, a batch of B=4 x T=16"),
        ("--model.L=1e9", "the model does NOT fit into memory: parameters 5.7 TiB, moments"),
        ("--data.B=1e12", "a batch of B=1000000000000 x T=16 189.2 TiB, together 189.2 TiB, but only"),
    ],
)
def test_a_model_that_cannot_fit_is_one_line(tmp_path, capsys, change, message):
    """A model or batch that cannot fit gives one error line before compilation, and no run folder."""
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    assert main([str(tmp_path / "config.json"), "--run", str(tmp_path / "run"), change]) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_a_step_that_does_not_fit_is_one_line(tmp_path, capsys, monkeypatch):
    """If the state fits but the temporaries of the compiled step do not, the command prints one error line.

    No run folder is made.
    """
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    sizes = iter([GIB, GIB, 2000])  # before the state is made, after its program, after the step
    monkeypatch.setattr(memory, "free_memory", lambda mesh: Free(next(sizes), "of a test"))
    assert main([str(tmp_path / "config.json"), "--run", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert "error: the step does NOT fit into memory: its results and temporaries need" in err, err
    assert err.count("\n") == 1, err
    assert not (tmp_path / "run").exists(), "the corrected command may use the same folder"


def test_a_model_is_not_read_where_it_does_not_fit(tmp_path, monkeypatch):
    run.save(tmp_path / "run", jax.jit(lambda: init_state(CONFIG, jax.random.key(0)).params)(), CONFIG)
    monkeypatch.setattr(memory, "free_memory", lambda mesh: Free(1000, "of a test"))
    with pytest.raises(ValueError, match="NOT fit into memory: parameters 2[0-9].. KiB, together .* only 1000 B"):
        run.load(tmp_path / "run")


def test_bytes_in_words():
    assert [gib(size) for size in (0, 1023, 2**20, 3 * 2**50, 5000 * 2**60)] == [
        "0 B", "1023 B", "1.0 MiB", "3.0 PiB", "5,000.0 EiB"
    ]  # fmt: skip
