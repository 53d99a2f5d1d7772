"""The common code of all commands: it parses the command line, prints errors and returns the exit code.

Exit code 0: the command succeeded.
Exit code 1: an error that the user can correct. It is printed as one line on stderr.
Exit code 2: an error in the command line. It is printed as one line on stderr.
Exit code 130: the user pressed Ctrl-C.
Exit code 141: the output pipe was closed, as in `... | head`.
Any other exception is a bug and is raised with its traceback.
"""

import argparse
import contextlib
import functools
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

from stickjax.config import field_names
from stickjax.config.command_line import parse_value
from stickjax.config.fields import SEED, checked
from stickjax.config.synonyms import suggestion
from stickjax.system.disk import REASONS
from stickjax.system.text import printable

# Errors of these types are printed as one line. Any other exception is a bug.
EXPECTED_ERRORS = (ValueError, OSError, FloatingPointError, OverflowError, MemoryError, NotImplementedError)
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE


class UsageError(ValueError):
    """An error in the command line, such as an unknown option or a missing argument. The exit code is 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError for a wrong command line, and suggests a name for an unknown option."""

    def __init__(self, *, prog: str | None = None, **options):
        if prog is not None and os.path.basename(sys.argv[0]) == "stickjax":
            prog = prog.replace("python -m stickjax.", "stickjax ")
        super().__init__(prog=prog, allow_abbrev=False, **options)

    def error(self, message):
        raise UsageError(message)

    def add_process_options(self) -> None:
        """Add --coordinator, --processes and --process, by which the processes of a run find one another."""
        self.add_argument("--coordinator", metavar="HOST:PORT", help="address at which process 0 listens")
        self.add_argument("--processes", type=int, metavar="N", help="number of processes, each with its own devices")
        self.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")

    def parse_args(self, args=None, namespace=None):
        words, rest = self.parse_known_args(args, namespace)
        if rest:
            hint = suggestion(rest[0].partition("=")[0], _options(self))
            raise UsageError(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return words

    def parse_with_fields(self, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """Parse a command line that has options of the command and changes of config fields.

        `argv` are the words after the name of the command; None: take them from `sys.argv`. Return the parsed options,
        and the list of all other words, such as `--section.field=value`. Raise UsageError for an unknown option. An
        option whose name has a dot is taken for a config field and is not checked here.
        """
        words: list[str] = []
        for word in sys.argv[1:] if argv is None else argv:
            if words and re.fullmatch(r"--\w+\.\w+", words[-1]) and not word.startswith("--"):
                words[-1] += f"={word}"  # otherwise argparse takes the value as the argument RUN or CONFIG
            else:
                words.append(word)
        found, rest = self.parse_known_args(words)
        for word in rest:
            name = word.partition("=")[0]
            if word.startswith("-") and "." not in name:
                names = [*_options(self), *field_names()]
                raise UsageError(f"unknown option {name}{suggestion(name, names, show=_as_typed)}")
        return found, rest


def number(kind: type, **bounds: float) -> Callable[[str], int | float]:
    """Return a function that parses and checks a number, for the argument `type` of argparse's `add_argument`.

    `kind` is int or float. `bounds` are the limits of the number: any of at_least, above, at_most and below.

    >>> number(int, at_least=1)("1e6")
    1000000
    """

    def parsed(text: str):
        try:
            return checked("value", parse_value(text, (kind,)), (kind,), bounds)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def step_or_best(text: str) -> int | str:
    """Parse the option --step: the step of a checkpoint, or the word "best".

    >>> step_or_best("400"), step_or_best("best")
    (400, 'best')
    """
    try:
        return text if text == "best" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a step nor the word best") from error


SEED_TYPE = number(int, at_least=0, at_most=SEED)


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Return the names of all arguments of a parser and of its subcommands, such as "--run" and "CONFIG"."""
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    actions = [action for one in parsers for action in one._actions]
    return [name for action in actions for name in (action.option_strings or [action.metavar or action.dest])]


def _as_typed(name: str) -> str:
    """Return an option or argument as it is typed: a config field becomes "--section.field=VALUE"."""
    return f"--{name}=VALUE" if "." in name else repr(name)


def command(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Wrap the function `main(argv)` of a command. The wrapped function prints errors and returns an exit code.

    The docstring of this module lists the exit codes. The wrapped function raises an exception only if the exception is
    a bug.

    >>> @command
    ... def main(argv):
    ...     raise KeyboardInterrupt
    >>> main([])
    130
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        _print_what_a_terminal_can()
        _print_plain_notices()
        with _interrupts_raise():
            try:
                try:
                    code = main(argv)
                except SystemExit as end:  # --help ends with this exception
                    code = end.code
                if sys.stdout is not None:
                    sys.stdout.flush()
                return code or 0
            except KeyboardInterrupt as error:
                _fail("interrupted", error)
                return EXIT_INTERRUPTED
            except BrokenPipeError:
                drop_output()
                return EXIT_BROKEN_PIPE
            except EXPECTED_ERRORS as error:
                code = _fail(f"error: {in_one_line(error)}", error)
                if isinstance(error, OSError):
                    drop_output()  # on a full disk Python would report the error again at exit
                return 2 if isinstance(error, UsageError) else code
            except Exception as error:
                if isinstance(error, RuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED: Out of memory"):
                    return _fail(f"error: {in_one_line(error).partition(': ')[2]}", error)
                if _several_processes():  # the other processes must not wait for this one
                    _fail("".join(traceback.format_exception(error)).rstrip(), error)
                raise

    return run


def in_one_line(error: BaseException) -> str:
    """Return the message of an error as one line. For an OSError with a file name, the line is "path: reason".

    >>> in_one_line(FileNotFoundError(2, "No such file or directory", "a.py"))
    'a.py: No such file or directory'
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        own = error.strerror != os.strerror(error.errno or 0)  # a message of stickjax, which is more precise
        reason = error.strerror if own else REASONS.get(error.errno, error.strerror)
        return f"{printable(str(error.filename))}: {reason}"
    return " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__


def say_error(line: str) -> None:
    """Print a line to stderr; do nothing if stderr is closed."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)


def end_on_interrupt() -> None:
    """Make Ctrl-C print "interrupted" and end this process at once, without a traceback.

    While a function that `command` wraps is running, Ctrl-C raises KeyboardInterrupt instead. If this process ignores
    Ctrl-C, as a background process of a shell script does, it continues to ignore Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if the signal is ignored
        signal.signal(signal.SIGINT, _end)


def _end(number, frame):
    say_error("interrupted")
    os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def _interrupts_raise():
    ours = signal.getsignal(signal.SIGINT) is _end
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, _end)


def _print_what_a_terminal_can() -> None:
    """Make stdout print '?' for a character that its encoding does not have, instead of raising an error."""
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def _print_plain_notices() -> None:
    """Print log messages as "LEVEL: text". Orbax's log handler would also print the name of the logger."""
    for handler in logging.root.handlers:
        if getattr(handler.formatter, "_fmt", None) == logging.BASIC_FORMAT:
            handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))


def _several_processes() -> bool:
    return "stickjax.parallel.processes" in sys.modules and sys.modules["stickjax.parallel.processes"].joined()


def _fail(line: str, error: BaseException) -> int:
    if _several_processes():
        return sys.modules["stickjax.parallel.processes"].fail(line, error)
    say_error(line)
    return 1


def drop_output() -> None:
    """Write the buffer of stdout. If this fails, discard the buffer, so that Python does not try again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
