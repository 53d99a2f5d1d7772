"""Processes that train one model together: they find one another, share values, and end when one of them is lost.

Every process has its own devices. Only process 0 writes files. Process 0 also runs JAX's coordination service. If a
process has ended or has sent no heartbeat for `HEARTBEAT_SECONDS`, the service tells all other processes, and they end.
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

# A process is lost after HEARTBEAT_SECONDS without a heartbeat. At the start, every process waits JOIN_SECONDS for the
# others to join. At the end, the others wait at most SHUTDOWN_SECONDS until process 0 has finished writing.
HEARTBEAT_SECONDS, JOIN_SECONDS, SHUTDOWN_SECONDS = 20, 300, 1800
ERROR_GRACE_SECONDS = 1  # after an error, the other processes wait this long, so that process 0 reports it first
_WAIT_MILLISECONDS = 24 * 3600 * 1000  # long, because a lost process is detected by its heartbeat, not by this limit
# Exit codes. EXIT_ERROR_PRINTED: this process has printed its error. EXIT_PEER_LOST: another process has failed or is
# lost.
EXIT_ERROR_PRINTED, EXIT_PEER_LOST = 3, 4

# Exit codes of a process that saved and stopped, because of a signal or a closed output pipe.
EXIT_STOPPED = tuple(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGTERM))

RESUME_HINT = "run the same command again to continue from the last checkpoint"

# Environment variables of schedulers: the number of processes, the index of this process among all processes, and its
# index among the processes on this machine. The fourth variable of SLURM is set in the processes of a job step, but not
# in the shell of an allocation.
_SCHEDULERS = (
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
PMI = ("PMI_SIZE", "PMI_RANK")  # of MPICH and Intel MPI; MPI_LOCALRANKID is the rank on this machine
# Environment variables of launchers that do not give the address of process 0: the rank of this process, and the number
# of processes. PMIx sets only the rank.
_UNKNOWN = (("PMIX_RANK", ""), ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"), ("RANK", "WORLD_SIZE"))
# Parts of the messages that XLA raises when another process is lost.
_PEER_GONE = re.compile(r"Gloo|NCCL|coordination service|CoordinationService|[Cc]onnection (closed|reset|refused)")


def initialize(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Connect this process with the other processes that train the same model. Call this before any other use of JAX.

    Without `count` and `index`, both numbers come from the environment variables of a launcher: SLURM, Open MPI, MPICH
    or Intel MPI. Each process then uses one device of its machine: the device whose number is the rank of the process
    on this machine. If the launcher does not give the address of process 0, give `coordinator`, or set
    JAX_COORDINATOR_ADDRESS to HOST:PORT. Without arguments and without the variables of a launcher, this process trains
    alone, and this function does nothing.

    Args:
      coordinator: HOST:PORT, where HOST is the machine of process 0 and PORT is a free port on HOST.
      count: the number of processes.
      index: the index of this process, from 0.

    Raises:
      ValueError: only some of the three arguments are given (with a launcher, `coordinator` alone is allowed); one of
        them is out of range; the port is in use; fewer than `count` processes have connected; or the environment says
        that there are several processes, but not how they find one another.
      RuntimeError: JAX cannot find the address of process 0 in the environment of Open MPI.
    """
    rank = _find(coordinator, count, index)
    if rank is None:
        return
    coordinator, count, index = rank.coordinator, rank.count, rank.index
    if not 0 <= index < count:
        raise ValueError(
            f"the index of this process must be from 0 to {count - 1} (with {count} processes), got {index}"
        )
    if count == 1:
        return
    if coordinator is not None:
        _, port = check_address(coordinator)
        if index == 0:
            _check_free(port, coordinator)
    _join(rank)
    if jax.process_count() != count:  # otherwise every process would write
        found = f"process {index} of {count} has found only {jax.process_count() - 1} of {count - 1} other processes"
        raise ValueError(f"{found}; give every process the same --coordinator and --processes, and its own --process")
    if index:
        logging.getLogger("stickjax").setLevel(logging.ERROR)  # process 0 warns for all


class _Rank(NamedTuple):
    """The arguments for `jax.distributed.initialize`, with which this process joins the other processes.

    `coordinator`: HOST:PORT of process 0; None: JAX finds it in the environment.
    `count`, `index`: the number of processes, and the index of this process.
    `local`: the index of the device for this process among the devices of this machine; None: JAX chooses the devices.
    `method`: "deactivate" if JAX must ignore the environment variables of schedulers, else None.
    """

    coordinator: str | None
    count: int
    index: int
    local: int | None
    method: str | None


def _find(coordinator: str | None, count: int | None, index: int | None) -> "_Rank | None":
    """Find out how this process joins the other processes. Return None if this process trains alone.

    The arguments are as in `initialize`. If `count` and `index` are None, they come from environment variables.
    Raise ValueError if the arguments or the variables are incomplete.
    """
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
        method = "deactivate"  # the numbers are given, so JAX must ignore the environment of SLURM or Open MPI
        if coordinator is None or count is None or index is None:
            raise ValueError("--coordinator HOST:PORT, --processes N and --process I belong together: give all or none")
    return _Rank(coordinator, count, index, local, method)


def _join(rank: _Rank) -> None:
    """Join the other processes. If one of them is missing after JOIN_SECONDS, print an error and end this process."""
    coordinator, count, index, local, method = rank
    # After JOIN_SECONDS, JAX aborts with a stack trace. Shortly before, this timer prints which process is missing.
    missing = f"process 0{f' at {coordinator}' if coordinator else ''}" if index else "the other processes"
    late = f"error: process {index} of {count} has waited {JOIN_SECONDS} s for {missing}"
    end = lambda: (print(late, file=sys.stderr, flush=True), os._exit(EXIT_ERROR_PRINTED))  # noqa: E731
    timer = threading.Timer(JOIN_SECONDS - 2, end)
    timer.daemon = True
    timer.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM, but the training handles that
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
    """Return the whole number in the environment variable `name`; None if the variable is not set."""
    text = os.environ.get(name)
    try:
        return None if text is None else int(text)
    except ValueError as error:
        raise ValueError(
            f"{name}={text!r} in the environment must be a whole number; correct the variable, or unset it"
        ) from error


def _check_alone() -> None:
    """Raise ValueError if the environment has the rank of this process, but not the address of process 0.

    Some launchers do not give this address (see _UNKNOWN). Without this check, every process would train a separate
    model.
    """
    for rank, size in _UNKNOWN:
        if rank in os.environ and (not size or (_number(size) or 1) > 1):
            raise ValueError(
                f"{rank}={os.environ[rank]} in the environment: this may be one of several processes, but process 0 "
                f"has no known address; give --coordinator HOST:PORT --processes N --process I, or unset {rank}"
            )


def _agree(count: int, index: int) -> str:
    """Return the address HOST:PORT of process 0, in every process that MPICH or Intel MPI has started.

    Process 0 chooses a free port. It shares the address through the process manager (see `stickjax.parallel.pmi`).
    """
    if "PMI_FD" not in os.environ:
        raise ValueError(
            f"PMI_RANK={index} of PMI_SIZE={count}: the address of process 0 is unknown; give --coordinator HOST:PORT"
        )
    here = "localhost" if _number("MPI_LOCALNRANKS") == count else os.environ.get("PMI_HOSTNAME", socket.gethostname())
    return pmi.share(int(os.environ["PMI_FD"]), None if index else f"{here}:{free_port()}")


def check_address(address: str) -> tuple[str, int]:
    """Parse an address HOST:PORT into (host, port). Raise ValueError if it does not have this form.

    >>> check_address("localhost:1234")
    ('localhost', 1234)
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator {address}: expected HOST:PORT, with a port from 1 to 65535")
    return host, int(port)


def free_port() -> int:
    """Return a TCP port of this machine that no program uses at the moment."""
    with socket.create_server(("", 0)) as one:
        return one.getsockname()[1]


def _check_free(port: int, coordinator: str) -> None:
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:  # JAX would crash
        raise ValueError(
            f"cannot open the port of --coordinator {coordinator}: {error.strerror}; choose another port"
        ) from error


def is_writer() -> bool:
    """Return whether this is process 0, the only process that writes files and prints.

    >>> is_writer()
    True
    """
    return jax.process_index() == 0


def _client():
    from jax._src import distributed  # the only way to the key-value store of JAX

    return distributed.global_state.client


def _several() -> bool:
    return jax.process_count() > 1


def joined() -> bool:
    """Return whether `initialize` has connected this process with other processes."""
    return jax.distributed.is_initialized()


_turn = {"shared": 0, "barrier": 0}


def _name(kind: str) -> str:
    """Return a new key for JAX's key-value store: "stickjax/KIND/NUMBER".

    KIND is `kind`, which is "shared" or "barrier". NUMBER is the number of calls with this `kind` so far. All processes
    get the same key, because they make the same calls in the same order.
    """
    _turn[kind] += 1
    return f"stickjax/{kind}/{_turn[kind]}"


def shared(function: Callable, raises: type[Exception] = ()):
    """Call `function` in process 0 only, and return its value in all processes.

    All processes must make the same calls of `shared`, in the same order.

    Args:
      function: a function without arguments, whose value can be stored as JSON.
      raises: a class of exceptions. If `function` raises one, all processes raise it. After any other exception,
        process 0 must end, because the other processes still wait for the value.

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
    """Check that this process and process 0 have the same `facts`, {name: JSON value}.

    All processes must call this function, and it waits for all of them. In a process whose facts differ from the facts
    of process 0, it raises ValueError.

    >>> check_same({"text": "914b8a1bc21f6cbc", "data.T": 256})
    """
    first = shared(lambda: facts)
    other = [
        f"{name} is {facts[name]!r} here, {first[name]!r} in process 0" for name in facts if first[name] != facts[name]
    ]
    if other:
        raise ValueError(f"this process differs from process 0 ({'; '.join(other)}); use the same config and data")
    if _several():
        _client().wait_at_barrier(_name("barrier"), _WAIT_MILLISECONDS)


@functools.cache
def _any(mesh: Mesh) -> tuple[Callable, NamedSharding]:
    whole = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(lambda flags, after: jnp.max(flags), out_shardings=whole, keep_unused=True)
    return program, NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def any_process(mesh: Mesh | None, flag: int, after=0):
    """Return the largest `flag` of all processes. All processes must call this function, and get the same result.

    The result is an array that may not be computed yet. `int(result)` waits for it. With one process, the result is
    `flag` itself.

    Args:
      mesh: the devices of all processes; None: there is one process.
      flag: a whole number of this process, 0 or larger, such as the number of a signal that asks it to stop.
      after: an array on the mesh. The flags are compared after the program that computes this array, because programs
        that communicate must run in the same order in all processes.

    >>> any_process(None, 15)
    15
    """
    if not _several():
        return flag
    program, sharding = _any(mesh)
    flags = jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.array([flag], np.int32))
    return program(flags, after)


def orphaned() -> bool:
    """Return whether the launcher that started this process has ended. Without a launcher, return False.

    The launcher is `python -m stickjax.launch`. It ends all its processes if one of them is lost. After the launcher
    has ended, no program does this, so the training must stop.
    """
    return os.environ.get("STICKJAX_LAUNCHER", str(os.getppid())) != str(os.getppid())


def fail(message: str, error: BaseException | None = None) -> int:
    """Print the error `message`. If this process trains alone, return the exit code 1; otherwise end this process.

    `error` is the exception, if there is one. If XLA raised it because another process is lost, this function prints a
    message about the lost process instead of `message`. If another process has already printed its error, this process
    prints nothing, because most errors are the same in all processes. The process ends by `os._exit`, because Python's
    normal exit would wait for the other processes.
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
        if index:  # if all processes have the same error, process 0 prints it first
            message = message.replace("error:", f"error: process {index}:", 1)
            time.sleep(ERROR_GRACE_SECONDS)
        try:
            _client().key_value_set("stickjax/failed", message)
        except Exception:  # another process failed first, or process 0, which runs the store, has ended
            message, code = "", EXIT_PEER_LOST
    with contextlib.suppress(OSError):  # the terminal may be closed, too
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    if is_writer():
        time.sleep(2 * ERROR_GRACE_SECONDS)  # the store ends with this process; the others must read it first
    os._exit(code)


def lost(index: int, count: int) -> str:
    """Return the error message of process `index`, which ends because another of the `count` processes is lost."""
    return f"process {index} of {count} has lost another process; {RESUME_HINT}"


def _lost_another(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, was raised by XLA because another process is lost."""
    return error is not None and (bool(_PEER_GONE.search(str(error))) or _lost_another(error.__cause__))
