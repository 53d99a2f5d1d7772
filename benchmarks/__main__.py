"""Measure the time of the ops and of a training step, and print the results as tables.

python -m benchmarks [--only NAME] [--gpu [--fresh]] [--quick] [--json [PATH]]

On the CPU, `--json` also writes the rows of the tables to PATH (default: benchmarks/results/cpu.json).

With `--gpu`, the command checks the results of the kernels and times them. Even without `--json`, it writes each row to
PATH (default: benchmarks/results/CHIP.json) as soon as the row is measured. If the run ends early, the same command
without --fresh continues it.
"""

import argparse
import difflib
import sys
from pathlib import Path

import jax.numpy as jnp

from stickjax.system.allocator import keep_freed_memory

from . import experts, gpu, gpu_record, gpu_run, long, ordered_memory, report, stick_breaking, timing, train

PARTS = {module.PART: module for module in (stick_breaking, experts, train, ordered_memory, long)}
RESULTS = Path(__file__).parent / "results"


def cpu_rows(only: str | None = None, quick: bool = False) -> list[report.Row]:
    """Run the CPU benchmark: measure the modules in PARTS, and return the rows of their tables.

    The last row has the speed of the machine. `only`: the name of the one part to measure; None: all parts. `quick`:
    use tiny shapes, to test that the code runs.
    """
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
    on_gpu = ", ".join((*gpu.STAGES, *gpu.TIMED))
    parser.add_argument(
        "--only",
        metavar="NAME",
        help=f"measure only this: one of {', '.join(PARTS)}; with --gpu: one of {on_gpu}, or one call or shape",
    )
    parser.add_argument("--gpu", action="store_true", help="check and time the kernels on the GPU of this machine")
    parser.add_argument("--fresh", action="store_true", help="with --gpu: ignore the rows of earlier runs")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds, to test that the code runs")
    parser.add_argument("--json", nargs="?", const="", metavar="PATH", help="write the rows to this JSON file")
    arguments = parser.parse_args(argv)
    names = gpu.names() if arguments.gpu else list(PARTS)
    if arguments.only is not None and arguments.only not in names:
        near = difflib.get_close_matches(arguments.only, names, n=3)
        said = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it must be one of {', '.join(names)}"
        print(f"error: --only {arguments.only!r} is an unknown name; {said}", file=sys.stderr)
        return 2
    if arguments.gpu and not gpu.available():
        print("error: --gpu needs a GPU, but JAX finds no GPU on this machine", file=sys.stderr)
        return 1
    info = report.machine()
    if info["load"][0] > 0.5 * info["cpu_count"]:
        print(
            f"warning: other programs use this machine (load average {info['load'][0]} on {info['cpu_count']} CPUs): "
            "the times will be too long and the ratios inexact",
            file=sys.stderr,
        )
    if arguments.gpu:
        return gpu_main(arguments, info)
    rows = cpu_rows(arguments.only, arguments.quick)
    _print(rows, info)
    if arguments.json is not None:
        report.write_json(arguments.json or RESULTS / "cpu.json", info, rows)
    return 0


def gpu_main(arguments: argparse.Namespace, info: dict) -> int:
    """Run the GPU benchmark and return the exit status: 0 if no row is left out and every check passed.

    A row is left out if it was not measured before its deadline. `arguments`: the command line. `info`: facts about the
    machine, which are written to the result file.
    """
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
        print(
            f"interrupted; the rows so far are in {path}; run the same command again (without --fresh) to measure the "
            "other rows",
            file=sys.stderr,
        )
        return 130
    rows = record.finished()
    _print([row for row in rows if not gpu.is_passed_check(row)], info)
    summary = rows[-1].extra
    if late := summary[gpu_record.LEFT_OUT]:
        print(
            f"{late} rows were not measured before their deadlines; run the same command again (without --fresh) to "
            "measure them",
            file=sys.stderr,
        )
    return 1 if late or summary["did not pass"] != "none" else 0


def _print(rows: list[report.Row], info: dict) -> None:
    report.print_table(rows)
    print("; ".join(f"{name} {value}" for name, value in info.items()))


if __name__ == "__main__":
    keep_freed_memory()  # as the command `stickjax.train` does
    sys.exit(main())
