"""python -m benchmarks [--only NAME] [--gpu [--fresh]] [--quick] [--json [PATH]]

Prints tables. On the CPU `--json` also writes them to PATH (benchmarks/results/cpu.json).
With --gpu the rows are in PATH (benchmarks/results/CHIP.json) as soon as they come, checks first; the same command
again goes on where the last one ended.
"""

import argparse
import difflib
import sys
from pathlib import Path

import jax.numpy as jnp

from . import experts, gpu, gpu_record, gpu_run, report, stick_breaking, timing, train

PARTS = {module.PART: module for module in (stick_breaking, experts, train)}
RESULTS = Path(__file__).parent / "results"


def cpu_rows(only: str | None = None, quick: bool = False) -> list[report.Row]:
    """The rows of all parts, or of one; `quick` makes every shape tiny, to see that it runs."""
    size, copied = (128, 2**20) if quick else (1024, 2**30)
    ceilings = timing.ceilings(size, jnp.float32, copied, seconds=0.05 if quick else 5.0)
    rows = []
    for name, part in PARTS.items():
        if only in (None, name):
            rows.extend(part.rows(ceilings, quick=quick))
            print(f"{name} done", file=sys.stderr)
    return rows + [report.ceiling_row(ceilings)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    stages = ", ".join(gpu.STAGES)
    parser.add_argument("--only", metavar="NAME", help=f"one of {', '.join(PARTS)}; with --gpu also {stages} or a case")
    parser.add_argument("--gpu", action="store_true", help="check, then time, on the GPU of this machine")
    parser.add_argument("--fresh", action="store_true", help="with --gpu: run again what an earlier run has left")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds: does it run?")
    parser.add_argument("--json", nargs="?", const="", metavar="PATH", help="where JSON is written")
    arguments = parser.parse_args(argv)
    names = gpu.names() if arguments.gpu else list(PARTS)
    if arguments.only is not None and arguments.only not in names:
        near = difflib.get_close_matches(arguments.only, names, n=3)
        said = f"did you mean {' or '.join(map(repr, near))}?" if near else f"one of {', '.join(names)}"
        print(f"error: --only {arguments.only!r} names nothing here; {said}", file=sys.stderr)
        return 2
    if arguments.gpu and not gpu.available():
        print("error: --gpu needs a GPU that JAX can see; this machine has none", file=sys.stderr)
        return 1
    info = report.machine()
    if info["load"][0] > 0.5 * info["cpu_count"]:
        print(f"others are at work here (load {info['load'][0]}): times are long and ratios rough", file=sys.stderr)
    if arguments.gpu:
        return gpu_main(arguments, info)
    rows = cpu_rows(arguments.only, arguments.quick)
    _print(rows, info)
    if arguments.json is not None:
        report.write_json(arguments.json or RESULTS / "cpu.json", info, rows)
    return 0


def gpu_main(arguments: argparse.Namespace, info: dict) -> int:
    """0 where all that was asked for is there and every check passed."""
    info |= {"code": gpu_record.code(), "quick": arguments.quick}
    path = arguments.json or RESULTS / f"{gpu.chip()}{'-quick' if arguments.quick else ''}.json"
    try:
        record = gpu_record.Record(path, info, gpu.finished, fresh=arguments.fresh and arguments.only is None)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    run = gpu_run.Run(record, quick=arguments.quick, again=arguments.fresh or gpu.is_one(arguments.only))
    try:
        gpu.rows(run, arguments.only)
    except KeyboardInterrupt:
        print(f"interrupted; the rows so far are in {path}, and the same command goes on", file=sys.stderr)
        return 130
    rows = record.finished()
    _print([row for row in rows if not gpu.is_passed_check(row)], info)
    summary = rows[-1].extra
    if late := summary[gpu_record.LEFT_OUT]:
        print(f"{late} rows are left out for want of time: run the same command again", file=sys.stderr)
    return 1 if late or summary["did not"] != "none" else 0


def _print(rows: list[report.Row], info: dict) -> None:
    report.print_table(rows)
    print("; ".join(f"{name} {value}" for name, value in info.items()))


if __name__ == "__main__":
    sys.exit(main())
