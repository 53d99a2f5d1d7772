"""Handle requests to stop a training run: a signal, a lost terminal, a closed output pipe or a lost launcher."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from stickjax.parallel import processes
from stickjax.training.progress import Progress


@contextlib.contextmanager
def stop_requests(progress: Progress) -> Iterator[Callable[[], int]]:
    """Catch requests to stop a training run in a `with` block, and yield a function that returns the first request.

    The function returns the number of a signal, or 0 if there is no request. A request is SIGTERM, SIGINT (Ctrl-C), or
    SIGHUP, which the system sends when the terminal is lost. A program that nohup has started ignores SIGHUP. Two other
    events are also requests. If the program that reads the output of `progress` has closed the pipe, the function
    returns SIGPIPE. If the launcher of this process has ended, the function returns SIGHUP. A Ctrl-C after the first
    request raises KeyboardInterrupt at once.
    """
    asked: list[int] = []

    def handle(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    def first() -> int:
        if not asked and progress.unread:
            asked.append(signal.SIGPIPE)
        elif not asked and processes.orphaned():
            asked.append(signal.SIGHUP)
        return asked[0] if asked else 0

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    try:
        old = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # only the main thread can handle signals
        old = {}
    try:
        yield first
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
