"""Processes that train together: how they find one another, share values, and end when one of them is lost.

Every process has its own devices and reads its own rows of a batch; process 0 alone writes. Process 0 runs JAX's
coordination service. When a process is lost, the service tells all others within
`HEARTBEAT_SECONDS`, and they end.
"""

import contextlib
import functools
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stickjax.parallel import pmi

# After HEARTBEAT_SECONDS without a sign of life a process is lost. After JOIN_SECONDS a process that has not joined is
# missing. At the end the other processes wait at most SHUTDOWN_SECONDS for process 0 to finish writing.
HEARTBEAT_SECONDS, JOIN_SECONDS, SHUTDOWN_SECONDS = 20, 300, 1800
ERROR_GRACE_SECONDS = 1  # after an error, the other processes wait this long, so that process 0 reports it first
_WAIT_MILLISECONDS = 24 * 3600 * 1000  # milliseconds: a lost process is found by its heartbeat, not by waiting
# Exit codes: this process has printed its error; another process has printed one, or was lost.
EXIT_ERROR_PRINTED, EXIT_PEER_LOST = 3, 4

# Exit codes of a process that saved and stopped, because of a signal or a closed output pipe.
EXIT_STOPPED = tuple(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGTERM))

RESUME_HINT = "the same command goes on from the last checkpoint"

# Environment variables of schedulers: the number of processes, the index of this one among all, and its index on this
# machine. The fourth variable of SLURM is missing in a shell that SLURM has only allocated machines to.
_SCHEDULERS = (
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
PMI = ("PMI_SIZE", "PMI_RANK")  # of MPICH and Intel MPI; the rank on this machine is MPI_LOCALRANKID
# Rank and number of processes from launchers that give no coordinator; PMIx does not give the number either.
_UNKNOWN = (("PMIX_RANK", ""), ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"), ("RANK", "WORLD_SIZE"))
# What XLA raises when another process is gone.
_PEER_GONE = re.compile(r"Gloo|NCCL|coordination service|CoordinationService|[Cc]onnection (closed|reset|refused)")


def initialize(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Join the other processes; do nothing if there are none. Must be called before JAX does anything else.

    Without arguments, the environment of SLURM, Open MPI, MPICH or Intel MPI says who the others are; each process then
    takes the one device of its machine that has its rank there. If that environment does not name the coordinator,
    JAX_COORDINATOR_ADDRESS may.

    Args:
      coordinator: HOST:PORT, a free port of the machine of process 0.
      count: how many processes there are.
      index: which of them this is, from 0.

    Raises:
      ValueError: only some of the three, one out of range, a port that is in use, or an environment of several
        processes that does not say how they find one another.
      RuntimeError: JAX cannot find the coordinator in the environment.
    """
    rank = _find(coordinator, count, index)
    if rank is None:
        return
    coordinator, count, index = rank.coordinator, rank.count, rank.index
    if not 0 <= index < count:
        raise ValueError(f"process {index} of {count}: processes are counted from 0 to {count - 1}")
    if count == 1:
        return
    if coordinator is not None:
        _, port = check_address(coordinator)
        if index == 0:
            _check_free(port, coordinator)
    _join(rank)
    if jax.process_count() != count:  # otherwise every process would write
        found = f"process {index} of {count} has found {jax.process_count() - 1} of the other {count - 1}"
        raise ValueError(f"{found}; check --coordinator, --processes and --process of all of them")
    if index:
        logging.getLogger("stickjax").setLevel(logging.ERROR)  # process 0 warns for all


class _Rank(NamedTuple):
    """`local`: the device of this process on its machine; `method`: how JAX finds the other processes."""

    coordinator: str | None
    count: int
    index: int
    local: int | None
    method: str | None


def _find(coordinator: str | None, count: int | None, index: int | None) -> "_Rank | None":
    """Who this process is, by the arguments or by the environment; None if it is alone."""
    local, method = None, None
    if count is None and index is None:
        names = next((n for n in (*_SCHEDULERS, PMI) if all(name in os.environ for name in n)), None)
        if names is None:
            if coordinator is not None:
                raise ValueError(f"--coordinator {coordinator} needs --processes N and --process I")
            _check_alone()
            return None
        count, index, *local = map(_number, names[:3])
        local = local[0] if local else _number("MPI_LOCALRANKID")
        if names == PMI and 0 <= index < count > 1:
            method = "deactivate"
            coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or _agree(count, index)
        local = None if "JAX_LOCAL_DEVICE_IDS" in os.environ else local
    else:
        method = "deactivate"  # the numbers are given, so the environment of SLURM or Open MPI must not count
        if coordinator is None or count is None or index is None:
            raise ValueError("--coordinator HOST:PORT, --processes N and --process I belong together")
    return _Rank(coordinator, count, index, local, method)


def _join(rank: _Rank) -> None:
    """Join the other processes, or end with a line that says who is missing."""
    coordinator, count, index, local, method = rank
    # When time is up, JAX aborts with a stack trace. A little earlier this timer says who is missing.
    missing = f"process 0{f' at {coordinator}' if coordinator else ''}" if index else "the others"
    late = f"error: process {index} of {count} has waited {JOIN_SECONDS} s for {missing}"
    end = lambda: (print(late, file=sys.stderr, flush=True), os._exit(EXIT_ERROR_PRINTED))  # noqa: E731
    timer = threading.Timer(JOIN_SECONDS - 2, end)
    timer.daemon = True
    timer.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM, which the training handles
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            local_device_ids=local,
            cluster_detection_method=method,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    finally:
        timer.cancel()


def _number(name: str) -> int | None:
    """A whole number from the environment; None if it is not there."""
    text = os.environ.get(name)
    try:
        return None if text is None else int(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r} in the environment must be a whole number; set or unset it") from error


def _check_alone() -> None:
    """Raise ValueError if the environment says that this is one of several processes."""
    for rank, size in _UNKNOWN:
        if rank in os.environ and (not size or (_number(size) or 1) > 1):
            raise ValueError(
                f"{rank}={os.environ[rank]}: this may be one of several processes, and nothing says where the others "
                f"are; give --coordinator HOST:PORT --processes N --process I, or unset {rank}"
            )


def _agree(count: int, index: int) -> str:
    """HOST:PORT with a free port of process 0, shared through the process manager."""
    if "PMI_FD" not in os.environ:
        raise ValueError(
            f"PMI_RANK={index} of PMI_SIZE={count}: nothing says where process 0 listens; give --coordinator HOST:PORT"
        )
    here = "localhost" if _number("MPI_LOCALNRANKS") == count else os.environ.get("PMI_HOSTNAME", socket.gethostname())
    return pmi.share(int(os.environ["PMI_FD"]), None if index else f"{here}:{free_port()}")


def check_address(address: str) -> tuple[str, int]:
    """HOST:PORT as (host, port); ValueError for anything else.

    >>> check_address("localhost:1234")
    ('localhost', 1234)
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator {address}: expected HOST:PORT")
    return host, int(port)


def free_port() -> int:
    """A free port of this machine."""
    with socket.create_server(("", 0)) as one:
        return one.getsockname()[1]


def _check_free(port: int, coordinator: str) -> None:
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:  # JAX would crash
        raise ValueError(f"--coordinator {coordinator}: {error.strerror}") from error


def is_writer() -> bool:
    """Whether this is process 0. It alone writes files and prints.

    >>> is_writer()
    True
    """
    return jax.process_index() == 0


def _client():
    from jax._src import distributed  # JAX offers its key-value store to Python only here

    return distributed.global_state.client


def _several() -> bool:
    return jax.process_count() > 1


def joined() -> bool:
    """Whether this process has joined others, by `initialize`."""
    return jax.distributed.is_initialized()


_turn = {"shared": 0, "barrier": 0}


def _name(kind: str) -> str:
    """A new name, the same in all processes as long as they call in the same order."""
    _turn[kind] += 1
    return f"stickjax/{kind}/{_turn[kind]}"


def shared(function: Callable, raises: type[Exception] = ()):
    """`function()` of process 0, in all processes. All must call this, in the same order.

    Args:
      function: called in process 0 alone; its value must be JSON.
      raises: exceptions that are then raised in all processes. Any other exception must end process 0.

    >>> shared(lambda: [1, "two"])
    [1, 'two']
    """
    if not _several():
        return function()
    name = _name("shared")
    if not is_writer():
        found = json.loads(_client().blocking_key_value_get(name, _WAIT_MILLISECONDS))
        if "error" in found:
            raise raises(found["error"])
        return found["value"]
    try:
        value = function()
    except raises as error:
        _client().key_value_set(name, json.dumps({"error": str(error)}))
        raise
    _client().key_value_set(name, json.dumps({"value": value}))
    return value


def check_same(facts: dict) -> None:
    """Wait for all processes; ValueError in a process where some of these facts (JSON) differ from process 0.

    >>> check_same({"text": "914b8a1bc21f6cbc", "data.T": 256})
    """
    first = shared(lambda: facts)
    other = [f"{name}: {first[name]!r} -> {facts[name]!r}" for name in facts if first[name] != facts[name]]
    if other:
        raise ValueError(f"this is not what process 0 is about to train ({'; '.join(other)})")
    if _several():
        _client().wait_at_barrier(_name("barrier"), _WAIT_MILLISECONDS)


@functools.cache
def _any(mesh: Mesh) -> tuple[Callable, NamedSharding]:
    whole = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(lambda flags, after: jnp.max(flags), out_shardings=whole, keep_unused=True)
    return program, NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def any_process(mesh: Mesh | None, flag: int, after=0):
    """The largest `flag` of all processes: the same answer in all, which must all call this.

    Args:
      mesh: the devices of all processes; None: there is one process.
      flag: the flag of this process, not negative.
      after: an array on the mesh. Programs that communicate must run in the same order in all processes; this one runs
        after the program that makes `after`.

    Returns an array that may still be under way; `int` waits for it.

    >>> any_process(None, 15)
    15
    """
    if not _several():
        return flag
    program, sharding = _any(mesh)
    flags = jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.array([flag], np.int32))
    return program(flags, after)


def orphaned() -> bool:
    """Whether the launcher of this process is gone. Then nobody would end it when another process is lost."""
    return os.environ.get("STICKJAX_LAUNCHER", str(os.getppid())) != str(os.getppid())


def fail(message: str, error: BaseException | None = None) -> int:
    """Print an error and return the exit code. Of several processes, one prints it, and this one exits here.

    The first process to fail prints its error: the others fail in the same way, or because it is gone. Without this
    exit, Python would wait for the other processes at its end.
    """
    if not jax.distributed.is_initialized():
        print(message, file=sys.stderr)
        return 1
    index, count, code = jax.process_index(), jax.process_count(), EXIT_ERROR_PRINTED
    if _lost_another(error):
        reason = " ".join(str(error).split())[:200]
        message = f"error: {lost(index, count)} ({reason})"
        code = EXIT_PEER_LOST
    else:
        if index:  # process 0 reports an error that all have
            message = message.replace("error:", f"error: process {index}:", 1)
            time.sleep(ERROR_GRACE_SECONDS)
        try:
            _client().key_value_set("stickjax/failed", message)
        except Exception:  # another process has failed first, or process 0 with the store is gone
            message, code = "", EXIT_PEER_LOST
    with contextlib.suppress(OSError):  # the terminal may be gone as well
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    if is_writer():
        time.sleep(2 * ERROR_GRACE_SECONDS)  # the store ends with this process; the others must read it first
    os._exit(code)


def lost(index: int, count: int) -> str:
    """The message of a process that ends because another process has ended."""
    return f"process {index} of {count} has lost another one; {RESUME_HINT}"


def _lost_another(error: BaseException | None) -> bool:
    """Whether XLA raised this error, or one that caused it, because a process is gone."""
    return error is not None and (bool(_PEER_GONE.search(str(error))) or _lost_another(error.__cause__))
