"""python -m benchmarks [--only stick_breaking|experts|train] [--gpu] [--quick] [--json [PATH]]

Prints tables and, with --json, writes them to PATH (benchmarks/results/cpu.json, with --gpu the chip's name).
"""

import argparse
import sys
from pathlib import Path

import jax.numpy as jnp

from . import cost, experts, gpu, report, stick_breaking, timing, train

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
    return rows + [ceiling_row(ceilings)]


def ceiling_row(ceilings: cost.Ceilings) -> report.Row:
    extra = {"TFLOP/s": ceilings.flops / 1e12, "GB/s": ceilings.bytes / 1e9}
    return report.Row("machine", "ceilings", "matrix product, copy", extra=extra)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--gpu", action="store_true", help="check, then time, on the GPU of this machine")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds: does it run?")
    parser.add_argument("--json", nargs="?", const="", metavar="PATH", help="also write JSON")
    arguments = parser.parse_args(argv)
    if arguments.gpu and not gpu.available():
        print("error: --gpu needs a GPU that JAX can see; this machine has none", file=sys.stderr)
        return 1
    info = report.machine()
    if info["load"][0] > 0.5 * info["cpu_count"]:
        print(f"others are at work here (load {info['load'][0]}): times are long and ratios rough", file=sys.stderr)
    rows: list[report.Row] = []

    def finish(default: str, rows: list[report.Row]) -> None:
        report.print_table(rows)
        print("; ".join(f"{name} {value}" for name, value in info.items()))
        if arguments.json is not None:
            report.write_json(arguments.json or RESULTS / default, info, rows)

    if arguments.gpu:
        ceilings = gpu.measured_ceilings(arguments.quick)
        default = f"{gpu.chip()}.json"

        def finish_gpu():
            finish(default, [*gpu.finished(rows), ceiling_row(ceilings)])

        with gpu.give_up_after(gpu.HANGS, finish_gpu):
            gpu.rows(arguments.only, arguments.quick, ceilings, rows)
        finish_gpu()
    else:
        finish("cpu.json", cpu_rows(arguments.only, arguments.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
