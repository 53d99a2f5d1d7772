"""Run a command by its name: `stickjax train tiny`, or `python -m stickjax train tiny`."""

import importlib
import sys

from stickjax import __version__
from stickjax.config.command import UsageError, command, end_on_interrupt
from stickjax.config.fields import nearest

# {name of a command: (its module, what the command does)}. The module is imported when the command runs.
COMMANDS = {
    "train": ("stickjax.train", "train a model; resume a run, branch from it, or begin with its parameters"),
    "evaluate": ("stickjax.evaluate", "compute the held-out loss of runs, at several lengths"),
    "generate": ("stickjax.generate", "generate the text that follows a prompt"),
    "convert": ("stickjax.convert", "convert models to and from the Hugging Face layout"),
    "plan": ("stickjax.plan.__main__", "estimate time and memory of a training step on GPUs that need not exist"),
    "sweep": ("stickjax.sweeps", "run coordinate checks, learning-rate sweeps, and the fit of the Power schedule"),
    "launch": ("stickjax.launch", "start several training processes"),
    "data": ("stickjax.data.__main__", "make token files from text, and verify them"),
    "surgery": ("stickjax.surgery.__main__", "extend, freeze, concentrate and prune experts, and report their use"),
}
_LIST = "\n".join(f"  {name:<10}{doc}" for name, (_, doc) in COMMANDS.items())
HELP = f"""usage: stickjax COMMAND ...

{_LIST}

stickjax COMMAND --help describes a command; stickjax --version prints the version"""


@command
def main(argv: list[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or [None]
    if name in (None, "-h", "--help", "help"):
        print(HELP)
        return 0
    if name in ("-V", "--version", "version"):
        print(f"stickjax {__version__}")
        return 0
    name = {"sweeps": "sweep", "modules": "surgery"}.get(name, name)  # further names for these two commands
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}{nearest(name, COMMANDS)}; the commands are {', '.join(COMMANDS)}")
    return importlib.import_module(COMMANDS[name][0]).main(rest)


def script() -> int:
    """Run the program `stickjax`, and return its exit code."""
    end_on_interrupt()
    return main()


if __name__ == "__main__":
    sys.exit(script())
