"""What all commands have in common: how they read their words, and how they end.

Exit code 0: done. 1: an error in one line on stderr, which says what the user can put right. 2: the same for words that
the command does not know. 130: Ctrl-C. 141: nobody reads what it prints, as in `... | head`. Any other exception is a
bug and comes with its traceback.
"""

import argparse
import contextlib
import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

from stickjax.config import field_names
from stickjax.disk import REASONS
from stickjax.fields import SEED, checked
from stickjax.options import parse_value
from stickjax.synonyms import suggestion

# These are said in one line. Everything else is a bug.
CLEAR = (ValueError, OSError, FloatingPointError, OverflowError, MemoryError, NotImplementedError)
INTERRUPTED, NOBODY_READS = 128 + signal.SIGINT, 128 + signal.SIGPIPE


class UsageError(ValueError):
    """The words of a command line are not those of the command."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest name for an option that does not exist."""

    def __init__(self, *, prog: str | None = None, **options):
        if prog is not None and os.path.basename(sys.argv[0]) == "stickjax":
            prog = prog.replace("python -m stickjax.", "stickjax ")
        super().__init__(prog=prog, allow_abbrev=False, **options)

    def error(self, message):
        raise UsageError(message)

    def parse_args(self, args=None, namespace=None):
        words, rest = self.parse_known_args(args, namespace)
        if rest:
            hint = suggestion(rest[0].partition("=")[0], _options(self))
            raise UsageError(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return words

    def parse_with_fields(self, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """The command's own words, and the `--section.field=value` of a config."""
        words: list[str] = []
        for word in sys.argv[1:] if argv is None else argv:
            if words and re.fullmatch(r"--\w+\.\w+", words[-1]) and not word.startswith("--"):
                words[-1] += f"={word}"  # else argparse takes the value for a run or a config
            else:
                words.append(word)
        found, rest = self.parse_known_args(words)
        for word in rest:
            name = word.partition("=")[0]
            if word.startswith("-") and "." not in name:
                raise UsageError(f"unknown option {name}{suggestion(name, [*_options(self), *field_names()])}")
        return found, rest


def number(kind: type, **bounds: float) -> Callable[[str], int | float]:
    """The `type` of an argument that is a number within bounds, as those of a config's `field`.

    >>> number(int, at_least=1)("1e6")
    1000000
    """

    def parsed(text: str):
        try:
            return checked("value", parse_value(text, (kind,)), (kind,), bounds)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


SEED_TYPE = number(int, at_least=0, at_most=SEED)


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """The words of a parser and of its subcommands: --options and POSITIONAL ones."""
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    actions = [action for one in parsers for action in one._actions]
    return [name for action in actions for name in (action.option_strings or [action.metavar or action.dest])]


def command(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Make `main(argv)` end as all commands do: it returns an exit code and raises only what is a bug.

    >>> @command
    ... def main(argv):
    ...     raise KeyboardInterrupt
    >>> main([])
    130
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        _print_what_a_terminal_can()
        with _interrupts_raise():
            try:
                try:
                    code = main(argv)
                except SystemExit as end:  # of --help
                    code = end.code
                if sys.stdout is not None:
                    sys.stdout.flush()
                return code or 0
            except KeyboardInterrupt as error:
                _fail("interrupted", error)
                return INTERRUPTED
            except BrokenPipeError:
                drop_output()
                return NOBODY_READS
            except CLEAR as error:
                code = _fail(f"error: {in_one_line(error)}", error)
                if isinstance(error, OSError):
                    drop_output()  # a full disk, where Python would say so again at its end
                return 2 if isinstance(error, UsageError) else code
            except Exception as error:
                if isinstance(error, RuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED: Out of memory"):
                    return _fail(f"error: {in_one_line(error).partition(': ')[2]}", error)
                if _several_processes():  # the others must not wait for this one
                    _fail("".join(traceback.format_exception(error)).rstrip(), error)
                raise

    return run


def in_one_line(error: BaseException) -> str:
    """The message of an error; of an error with a file the path and the reason.

    >>> in_one_line(FileNotFoundError(2, "No such file or directory", "a.py"))
    'a.py: No such file or directory'
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        own = error.strerror != os.strerror(error.errno or 0)  # words of ours, which say more than the system's
        return f"{error.filename}: {error.strerror if own else REASONS.get(error.errno, error.strerror)}"
    return " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__


def say_error(line: str) -> None:
    """Print to stderr, which may be closed."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends this process at once, in one line; inside a command it raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as after nohup
        signal.signal(signal.SIGINT, _end)


def _end(number, frame):
    say_error("interrupted")
    os._exit(INTERRUPTED)


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
    """From now on a character that the terminal does not have is printed as '?', and is no error."""
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def _several_processes() -> bool:
    return "stickjax.processes" in sys.modules and sys.modules["stickjax.processes"].joined()


def _fail(line: str, error: BaseException) -> int:
    if _several_processes():
        return sys.modules["stickjax.processes"].fail(line, error)
    say_error(line)
    return 1


def drop_output() -> None:
    """Forget what is left in stdout where it cannot be written: Python would try once more at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
