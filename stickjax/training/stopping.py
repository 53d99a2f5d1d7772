"""Requests to stop a training: a signal, a lost terminal, a closed output pipe, a lost launcher."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from stickjax.parallel import processes
from stickjax.training.progress import Progress


@contextlib.contextmanager
def stop_requests(progress: Progress) -> Iterator[Callable[[], int]]:
    """Handle requests to stop a training, and yield a function that returns the number of the signal, or 0 for none.

    The signals are SIGTERM, SIGINT (Ctrl-C) and SIGHUP, which a lost terminal sends. After nohup, SIGHUP is ignored.
    A closed output pipe counts as SIGPIPE, a lost launcher as SIGHUP. A second Ctrl-C interrupts at once.
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
    except ValueError:  # signals belong to the main thread; in another one there is nothing to handle
        old = {}
    try:
        yield first
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
