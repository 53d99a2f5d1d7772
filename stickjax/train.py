"""Train a model: python -m stickjax.train configs/tiny.py [--run DIR] [--section.field=value ...]"""

import sys
from pathlib import Path

from stickjax.config import Config
from stickjax.config.command import Parser, command
from stickjax.config.command_line import config_name, describe, load_config, parse
from stickjax.parallel import processes
from stickjax.storage.run_config import read_config
from stickjax.system.allocator import keep_freed_memory
from stickjax.training.branch import split_branch
from stickjax.training.loop import Result, fit

__all__ = ["Result", "fit", "main"]


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m stickjax.train", add_help=False)
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a name such as tiny, a .py file, or a config.json")
    parser.add_argument("--run", help="run folder; default: runs/NAME, where NAME is the name of the config")
    parser.add_argument("--init-from", metavar="RUN", help="begin with the parameters of another run")
    parser.add_argument(
        "--from", dest="branch", metavar="RUN@STEP", help="continue from a checkpoint with a changed config"
    )
    parser.add_argument("--dry-run", action="store_true", help="compile the step; print its memory and work")
    parser.add_argument("--profile", action="store_true", help="write a trace of a few steps to RUN/profile")
    parser.add_argument("-h", "--help", action="store_true", help="show the options and the config fields")
    parser.add_process_options()
    words, rest = parser.parse_with_fields(argv)
    if not words.help:
        keep_freed_memory()
        processes.initialize(words.coordinator, words.processes, words.process)
    if words.config is None and words.branch is not None:
        config = read_config(split_branch(words.branch)[0])
    else:
        config = Config() if words.config is None else load_config(words.config)
    if words.help:
        print(f"{parser.format_help()}\nconfig fields, with the values of CONFIG:\n{describe(config)}")
        return 0
    if words.config is None and words.branch is None:
        raise ValueError("CONFIG is missing: name a config, for example python -m stickjax.train tiny")
    if words.run == "":
        raise ValueError("--run is empty: it must name a folder")
    if words.branch is not None and words.init_from is not None:
        raise ValueError(
            "--from continues a checkpoint, --init-from uses only the parameters of a checkpoint: give only one of the "
            "two"
        )
    if words.branch is not None and words.run is None:
        raise ValueError("--from needs a new folder: name it by --run DIR")
    config = parse(config, rest)
    if words.dry_run:
        from stickjax.plan.report import dry_run

        dry_run(config)
        return 0
    run = words.run or str(Path("runs") / config_name(words.config))
    result = fit(config, run, init_from=words.init_from, branch=words.branch, profile=words.profile)
    return 128 + result.stopped_by if result.stopped_by else 0


if __name__ == "__main__":
    sys.exit(main())
