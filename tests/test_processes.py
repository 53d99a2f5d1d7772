"""Several processes on one or more machines train like one process, end together, and resume exactly."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import wait_for_step

from stickjax import evaluate, generate, launch, train
from stickjax.config import Config
from stickjax.parallel import pmi
from stickjax.parallel.processes import free_port
from stickjax.storage.checkpoints import Checkpoints, named_leaves
from stickjax.train import fit
from stickjax.training.metrics import read_metrics
from stickjax.training.step import init_state

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "stickjax.launch"]
STEPS = 30
SMALL = Config().replace(
    {
        "model.V": 257, "model.D": 16, "model.L": 1, "model.N": 2, "model.K": 1, "model.H": 8, "model.F": 16,
        "data.T": 32, "data.B": 8, "data.source": "text", "data.path": __file__,
        "train.steps": STEPS, "train.log_every": 1, "train.checkpoint_every": 10, "optim.peak_lr": 0.01,
        "mesh.data": -1, "mesh.fsdp": 2,
    }
)  # fmt: skip
ALONE = SMALL.replace({"mesh.data": 1, "mesh.fsdp": 1})
# Each process has one device, unless a test sets XLA_FLAGS.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
# Every process compiles the step. `test_processes_are_numbered_over_all_machines` also has two processes per machine.
EXHAUSTIVE = {"test_they_train_as_one_whatever_their_number": lambda processes: processes == 2}
pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def start(command, **environment) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(list(map(str, command)), **pipes, env=ENVIRONMENT | environment, cwd=ROOT)


def losses(run) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def children(process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(SMALL.to_json())
    return path


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Train two steps in one process with eight devices; return the run folder."""
    run = tmp_path_factory.mktemp("eight") / "run"
    fit(SMALL.replace({"train.steps": 2}), str(run), quiet=True)
    return run


@pytest.fixture(scope="module")
def two(eight, config, tmp_path_factory):
    """Train a copy of the run folder `eight` to its end in two processes; return the copy.

    The processes find each other by the environment variables of SLURM.
    """
    run = tmp_path_factory.mktemp("two") / "run"
    shutil.copytree(eight, run)
    slurm = dict(SLURM_JOB_ID="7", SLURM_NTASKS="2", SLURM_STEP_NODELIST="localhost")
    slurm["JAX_COORDINATOR_PORT"] = str(free_port())
    command = [sys.executable, "-m", "stickjax.train", config, "--run", run]
    ranks = [dict(SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    processes = [start(command, **slurm, **rank) for rank in ranks]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "resuming" in said[0][0] and f"step {STEPS}/{STEPS}" in said[0][0]
    assert not any(line.startswith("step") for line in said[1][0].splitlines())  # only process 0 prints
    return run


@pytest.mark.parametrize("processes", [1, 2])
def test_they_train_as_one_whatever_their_number(eight, two, config, tmp_path, capsys, processes):
    """The losses do not depend on the number of processes.

    Three trainings have the same losses as a training on one device: one process with eight devices, two processes, and
    two machines with the given number of processes each. With the mesh of the machines, two processes have halves of
    the same sequences.
    """
    both, alone = shutil.copytree(two, tmp_path / "both"), shutil.copytree(eight, tmp_path / "alone")
    mesh = ["--mesh.data=1", f"--mesh.fsdp={processes}", "--mesh.context=2"]
    (tmp_path / "hosts").write_text("localhost\n" * 2)
    (tmp_path / "ssh").write_text('#!/bin/sh\nshift 2\nexec sh -c "$1"\n')  # ssh to this machine under two names
    (tmp_path / "ssh").chmod(0o755)
    command = [ROOT / "launch" / "hosts.sh", tmp_path / "hosts", "--processes", processes, config]
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = start(
        [*command, "--run", both, "--train.steps=100000", *mesh],
        PATH=path,
        PORT=str(free_port()),
        PYTHON=sys.executable,
    )
    wait_for_step(both, STEPS + 3, process)
    process.send_signal(signal.SIGTERM)  # reaches the processes at different steps
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and not err, (out, err)
    (*_, saved) = Checkpoints(both).steps()
    assert f"stopped at step {saved}, saved at {saved}; run the same command again" in out
    fit(ALONE.replace({"train.steps": saved}), str(alone), quiet=True)
    assert losses(both)[:STEPS] == losses(two)
    np.testing.assert_allclose(losses(both), losses(alone), rtol=1e-5)
    assert generate.main([str(both), "--prompt", "def ", "--max-new-tokens", "3"]) == 0
    assert evaluate.main([str(both), "--max-tokens", "256", "--lengths", "1,2"]) == 0
    assert "held-out bits per byte" in capsys.readouterr().out


@pytest.mark.slow
def test_when_one_is_lost_all_end_and_the_same_command_goes_on(eight, two, config, tmp_path):
    run = shutil.copytree(eight, tmp_path / "run")
    command = [*LAUNCH, "--processes", 2, config, "--run", run]
    for lost, step in ((1, 12), (0, 22)):
        process = start(command)
        wait_for_step(run, step, process)
        pids = children(process)
        os.kill(pids[lost], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGKILL
        hint = "run the same command again to continue from the last checkpoint"
        assert err == f"error: process {lost} of 2 was ended by SIGKILL; {hint}\n"
        assert not any(map(is_running, pids))
        assert Checkpoints(run).steps()
    process = start(command)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "resuming" in out and not err, (out, err)
    assert losses(run) == losses(two)
    states = [Checkpoints(r).restore(jax.eval_shape(lambda: init_state(SMALL, jax.random.key(0)))) for r in (run, two)]
    ours, theirs = (named_leaves(restored.state.params) for restored in states)
    assert states[0].step == STEPS
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


ONE_FAILS = """
import json, jax
from stickjax import Config
def get_config():
    config = Config.from_dict(json.load(open({path!r})))
    return config.replace({{"data.path": "not-on-this-machine"}}) if jax.process_index() == 1 else config
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--data.B=9", "error: B / accumulate = 9 sequences must be a multiple of the mesh size fsdp=2"),
        (None, "error: process 1: data.path='not-on-this-machine' does not exist"),
    ],
    ids=["all", "one"],
)
def test_what_fails_is_said_once_and_nothing_is_written(config, tmp_path, change, message):
    (tmp_path / "config.py").write_text(ONE_FAILS.format(path=str(config)))
    words = [config, change] if change else [tmp_path / "config.py"]
    process = start([*LAUNCH, "--processes", 2, *words, "--run", tmp_path / "run"])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and not out
    assert err.startswith(message) and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_processes_are_numbered_over_all_machines(config, monkeypatch):
    started = []

    def start_nothing(*arguments):
        started.append(arguments)
        raise ValueError("nothing was started")

    monkeypatch.setattr(launch, "Processes", start_nothing)
    words = ["--hosts", "2", "--host", "1", "--processes", "2", "--coordinator", "localhost:1234", str(config)]
    assert launch.main(words) == 1
    ((commands, environments),) = started
    for i, (command, environment) in enumerate(zip(commands, environments, strict=True)):
        join = ["--coordinator", "localhost:1234", "--processes", "4", "--process", str(2 + i)]
        assert command[-7:] == [str(config), *join] and environment["JAX_LOCAL_DEVICE_IDS"] == str(i)
    assert len(commands) == 2


def bad_commands():
    yield ["--processes", "0"], "--processes 0 must be at least 1"
    yield ["--processes", "two"], "invalid int value: 'two'"
    yield ["--hosts", "2"], "--hosts 2 needs --coordinator HOST:PORT"
    yield ["--hosts", "2", "--host", "2"], "--host 2 must be at least 0 and below --hosts 2"
    yield ["--coordinator", "here"], "--coordinator here: expected HOST:PORT"
    yield ["--process", "2"], "unrecognized arguments: --process"


def test_bad_commands_are_one_clear_line(capsys, config, monkeypatch):
    def refused(main, argv, message):
        assert main(argv) in (1, 2)
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err, (argv, err)

    for argv, message in bad_commands():
        refused(launch.main, [*argv, str(config)], message)
    with socket.create_server(("", 0)) as listener:
        address = f"localhost:{listener.getsockname()[1]}"
        first = [str(config), "--coordinator", address, "--processes", "2", "--process", "0"]
        refused(train.main, first, f"{address}: Address already in use")
    alone = [str(config), "--coordinator", "localhost:1234"]
    refused(train.main, alone, "needs --processes N and --process I")
    refused(train.main, [*alone, "--processes", "2"], "belong together")
    refused(train.main, [*alone, "--processes", "2", "--process", "2"], "from 0 to 1 (with 2 processes), got 2")
    for name in ("SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", "3")
    refused(train.main, [str(config)], "from 0 to 2 (with 3 processes), got 3")
    for name in ("SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(f"OMPI_COMM_WORLD_{name}")
    for environment, message in (
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_RANK=1 of PMI_SIZE=2: the address of process 0 is unknown"),
        ({"PMI_SIZE": "2", "PMI_RANK": "2"}, "from 0 to 1 (with 2 processes), got 2"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK=0 in the environment: this may be one of several processes"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "RANK=0 in the environment: this may be one of several processes"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two' in the environment must be a whole number"),
    ):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            refused(train.main, [str(config)], message)


def test_the_process_manager_of_mpich_shares_an_address():
    """With MPICH's process manager, all processes receive the coordinator's address, which the first process stores.

    The test answers the requests of the processes as the process manager does (PMI version 1).
    """
    ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
    store, barrier = {}, threading.Barrier(2)

    def answer(connection):
        for line in connection.makefile("r"):
            words = dict(word.split("=", 1) for word in line.split())
            if words["cmd"] == "put":
                store[words["key"]] = words["value"]
            if words["cmd"] == "barrier_in":
                barrier.wait(10)
            replies = {
                "init": "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0",
                "get_my_kvsname": "cmd=my_kvsname kvsname=kvs_7",
                "put": "cmd=put_result rc=0",
                "barrier_in": "cmd=barrier_out",
                "get": f"cmd=get_result rc=0 value={store.get(words.get('key'))}",
                "finalize": "cmd=finalize_ack",
            }
            connection.sendall(f"{replies[words['cmd']]}\n".encode())

    with ThreadPoolExecutor(4) as threads:
        managers = [threads.submit(answer, end) for end in theirs]
        found = [threads.submit(pmi.share, ours[i].fileno(), ("host:1234", None)[i]) for i in range(2)]
        assert [one.result() for one in found] == ["host:1234"] * 2
        for end in ours:
            end.close()
        for manager in managers:
            manager.result()
    for end in theirs:
        end.close()
    with pytest.raises(ValueError, match="gives no address"):
        pmi.share(os.open(os.devnull, os.O_RDWR), None)
