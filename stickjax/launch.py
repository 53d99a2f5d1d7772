"""Train one model in several processes, on one machine or on several machines.

python -m stickjax.launch --processes 8 configs/tiny.py --mesh.data=-1
python -m stickjax.launch --processes 8 --hosts 2 --host 0 --coordinator HOST:PORT configs/tiny.py --mesh.data=-1

CONFIG and all arguments after it are the command line of `python -m stickjax.train`. On several machines, run the
command on every machine, with --host 0, --host 1 and so on. If a machine has several processes, each of them uses one
device. If a machine has only one process, this process uses all devices of the machine.

After SIGTERM, Ctrl-C or the loss of the terminal, all processes save a checkpoint at the same step and end. If one
process fails, all processes end. Run the same command again to continue from the last checkpoint.
"""

import argparse
import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time

from stickjax.config.command import Parser, command, say_error
from stickjax.parallel.processes import (
    EXIT_ERROR_PRINTED,
    EXIT_PEER_LOST,
    EXIT_STOPPED,
    RESUME_HINT,
    check_address,
    free_port,
    lost,
)

KILL_AFTER_SECONDS = 5  # when one process has failed: the seconds from SIGTERM to SIGKILL for the other processes
# Output to stderr is shown this many seconds after it was written. When a process fails, the other processes write long
# errors because of it. These errors have not been shown yet, so they can be dropped.
STDERR_DELAY_SECONDS = 0.5


class Processes:
    """The training processes of this machine. Creating the object starts them.

    Their output to stderr is held in a buffer for STDERR_DELAY_SECONDS before it is shown. So if a process fails, the
    errors that the other processes write because of it can be dropped.

    Args:
      commands: the command line of each process.
      environments: for each process, the environment variables that it gets besides the variables of the launcher.
    """

    def __init__(self, commands: list[list[str]], environments: list[dict[str, str]]):
        self.all = [
            # A new session for every process, so that it gets Ctrl-C only from the launcher, and only once.
            subprocess.Popen(command, env=os.environ | extra, stderr=subprocess.PIPE, start_new_session=True)
            for command, extra in zip(commands, environments, strict=True)
        ]
        self._held: list[tuple[float, int, bytes]] = []  # (time, index of the process, a piece of its output)
        self._pipes = selectors.DefaultSelector()
        for index, process in enumerate(self.all):
            os.set_blocking(process.stderr.fileno(), False)
            self._pipes.register(process.stderr, selectors.EVENT_READ, index)

    def send(self, number: int) -> None:
        for process in self.all:
            process.send_signal(number)  # does nothing if the process has ended

    def read(self, timeout: float) -> None:
        """Read new stderr output of the processes into a buffer. Wait at most `timeout` seconds for output."""
        if not self._pipes.get_map():
            time.sleep(timeout)
        for key, _ in self._pipes.select(timeout):
            if data := key.fileobj.read():
                self._held.append((time.monotonic(), key.data, data))
            elif data == b"":
                self._pipes.unregister(key.fileobj)

    def write(self, *, before: float = float("inf"), only: int | None = None) -> None:
        """Write the buffered output of the processes to stderr, and remove it from the buffer.

        `before`: only the output that was read before this time (`time.monotonic`). `only`: write the output of the
        process with this index, and drop the output of all others.
        """
        due = [piece for piece in self._held if piece[0] < before]
        self._held = [piece for piece in self._held if piece[0] >= before]
        for _, index, data in due:
            if only in (None, index):
                sys.stderr.buffer.write(data)
        sys.stderr.flush()

    def has_printed(self, index: int, words: bytes) -> bool:
        """Return whether the buffered stderr output of process `index` contains `words`."""
        return words in b"".join(data for _, who, data in self._held if who == index)

    def wait(self) -> int | None:
        """Wait until one process fails, or until all processes have ended without a failure.

        While it waits, this method shows the stderr output of the processes. Return the index of the process that
        failed, or None if no process failed.

        If a process failed only because it lost another process, this method waits up to KILL_AFTER_SECONDS for a
        process that fails for another reason. If there is such a process, return its index instead.
        """
        deadline = None  # set when the first process has failed
        while True:
            self.read(0.1)
            codes = {index: code for index, process in enumerate(self.all) if (code := process.poll()) is not None}
            failed = [index for index, code in codes.items() if code not in (0, *EXIT_STOPPED)]
            causes = [index for index in failed if codes[index] not in (EXIT_PEER_LOST, -signal.SIGABRT)]
            if failed and deadline is None:
                deadline = time.monotonic() + KILL_AFTER_SECONDS
            if causes or (failed and (len(codes) == len(self.all) or time.monotonic() > deadline)):
                self.read(0)
                return (causes or failed)[0]
            if len(codes) == len(self.all):
                return None
            if not failed:
                self.write(before=time.monotonic() - STDERR_DELAY_SECONDS)

    def close(self) -> None:
        self._pipes.close()
        for process in self.all:
            process.stderr.close()

    def end(self) -> None:
        """Send SIGTERM to all processes, and wait until they have ended.

        After KILL_AFTER_SECONDS, send SIGKILL to the processes that still run.
        """
        deadline = time.monotonic() + KILL_AFTER_SECONDS
        self.send(signal.SIGTERM)
        while any(process.poll() is None for process in self.all):
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            self.read(0.1)


@contextlib.contextmanager
def _forwarded(processes: Processes):
    """Return a context in which a SIGTERM, SIGINT or SIGHUP to this process sends SIGTERM to all training processes.

    If this process has received one of these signals before, a SIGINT (Ctrl-C) sends SIGKILL instead. If this process
    ignores SIGHUP, as under nohup, SIGHUP stays ignored. The context yields a list. The number of every received signal
    is appended to this list.
    """
    got: list[int] = []

    def handle(number, frame):
        processes.send(signal.SIGKILL if got and number == signal.SIGINT else signal.SIGTERM)
        got.append(number)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # after nohup, SIGHUP stays ignored
        numbers.append(signal.SIGHUP)
    old = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield got
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        prog="python -m stickjax.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes on this machine (default 1)")
    parser.add_argument("--hosts", type=int, default=1, metavar="H", help="machines, each with N processes (default 1)")
    parser.add_argument("--host", type=int, default=0, metavar="I", help="index of this machine, from 0 (default 0)")
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="the machine with --host 0, and a free port of it; needed if --hosts is above 1",
    )
    parser.add_argument("train", nargs=argparse.REMAINDER, metavar="CONFIG ...", help="as for python -m stickjax.train")
    words = parser.parse_args(argv)
    for name in ("processes", "hosts"):
        if getattr(words, name) < 1:
            raise ValueError(f"--{name} {getattr(words, name)} must be at least 1")
    if not 0 <= words.host < words.hosts:
        raise ValueError(f"--host {words.host} must be at least 0 and below --hosts {words.hosts}")
    if words.hosts > 1 and words.coordinator is None:
        raise ValueError(
            f"--hosts {words.hosts} needs --coordinator HOST:PORT: the machine with --host 0, and a free port of it"
        )
    if words.coordinator is not None:
        check_address(words.coordinator)
    return words, words.train[1:] if words.train[:1] == ["--"] else words.train


@command
def main(argv: list[str] | None = None) -> int:
    """Run `python -m stickjax.launch` with the arguments `argv`; None: `sys.argv[1:]`. Return the exit code."""
    words, train = _parse(argv)
    count, first = words.processes * words.hosts, words.processes * words.host
    address = words.coordinator or f"localhost:{free_port()}"
    command, extra = [sys.executable, "-m", "stickjax.train", *train], {"STICKJAX_LAUNCHER": str(os.getpid())}
    if count == 1:
        commands, environments = [command], [extra]
    else:
        join = ["--coordinator", address, "--processes", str(count), "--process"]
        commands = [[*command, *join, str(first + i)] for i in range(words.processes)]
        one_each = [{"JAX_LOCAL_DEVICE_IDS": str(i)} for i in range(words.processes)] if words.processes > 1 else [{}]
        environments = [extra | own for own in one_each]
    with contextlib.closing(Processes(commands, environments)) as processes, _forwarded(processes) as got:
        bad = processes.wait()
        if bad is None:
            processes.write()
            code = max(process.returncode for process in processes.all)
            return 128 + got[0] if code and got else code
        code = processes.all[bad].returncode
        processes.end()
        if code == -signal.SIGABRT and processes.has_printed(bad, b"another task died"):  # JAX aborted it
            print(f"error: {lost(first + bad, count)}", file=sys.stderr)
            return 1
        processes.write(only=bad)
    if got and code == -signal.SIGTERM:  # the process ended before it could save
        say_error("interrupted")
        return 128 + got[0]
    if code not in (
        1,
        EXIT_ERROR_PRINTED,
        EXIT_PEER_LOST,
    ):  # a process that ends with one of these codes has already printed its error
        what = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(f"error: process {first + bad} of {count} {what}; {RESUME_HINT}", file=sys.stderr)
    return 128 - code if code < 0 else 1


if __name__ == "__main__":
    sys.exit(main())
