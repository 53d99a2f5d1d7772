"""python -m benchmarks.absent_triton [--only NAME] [--chip CHIP]: compile the Triton kernels for absent GPUs.

Prints the registers, spills and shared memory of each, as ptxas makes them of the PTX that jax-triton would load. Needs
the CUDA wheels and no GPU.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from stickjax.plan.chips import MissingWheels, absent_devices

from .absent_gpu import SHARING, _folder, _usage, compile_for
from .absent_kernels import Kernel, expert_heads, experts, experts_decode

# One for each compute capability: 8.0, 8.9, 9.0, 10.0, 12.0.
CHIPS = ("a100-80", "l40s", "h200", "b200", "rtx-pro-6000")
PRODUCTS = r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)"  # of tensor cores
experts = partial(experts, implementation="triton")
expert_heads = partial(expert_heads, implementation="triton")
KERNELS: dict[str, Callable[[], Kernel]] = {
    "experts_powermoe_3b": partial(experts, T=8192, k=8, D=1536, F=512, E=40),
    "experts_odd": partial(experts, T=1000, k=2, D=200, F=300, E=6, activation="geglu", bias=True),
    "expert_heads": partial(expert_heads, T=8192, k=4, D=1024, F=256, E=16),
    "expert_heads_float32": partial(expert_heads, T=8192, k=4, D=1024, F=256, E=16, dtype=jnp.float32),
    "experts_decode": partial(experts_decode, implementation="triton"),
}


class Machine(NamedTuple):
    """One Triton kernel as compiled. Bytes are of a thread for spills and stack, of a block for shared memory."""

    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    products: int  # tensor core instructions
    copies: int  # asynchronous copies to shared memory
    sharing: tuple[str, ...]  # of its PTX: what matches SHARING


def compile_kernel(kernel: Kernel, chip: str) -> list[Machine]:
    """The Triton kernels of it that this process has not compiled for this chip yet. Raises MissingWheels."""
    absent_devices(chip)
    _folder("jax_triton")
    from jax_triton import triton_lib

    with tempfile.TemporaryDirectory() as dump, mock.patch.object(triton_lib, "_JAX_TRITON_DUMP_DIR", dump):
        compile_for(kernel.function, *kernel.shapes, chip=chip)
        written = sorted(Path(dump).glob("*/*.ptx"), key=lambda path: (path.name, path.stat().st_mtime_ns))
        return [_machine(path) for path in written]


def _machine(path: Path) -> Machine:
    text = path.read_text()
    chip = re.search(r"^\.target (\w+)", text, re.M)[1]
    command = [_folder("nvidia.cu13") / "bin" / "ptxas", f"-arch={chip}", "-v", path, "-o", path.with_suffix(".cubin")]
    usage = _usage(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
    return Machine(
        path.stem,
        *(usage[name] for name in Machine._fields[1:5]),
        shared=int(re.search(r"\d+$", path.with_suffix(".compile_info").read_text().strip())[0]),
        products=len(re.findall(PRODUCTS, text)),
        copies=len(re.findall(r"\bcp\.async\.c[ag]", text)),
        sharing=tuple(re.findall(rf"^\s*(?:@!?%\w+\s+)?({SHARING})", text, re.M)),
    )


def compile_named(name: str, chips: Iterable[str]) -> list[list[Machine]]:
    return [compile_kernel(KERNELS[name](), chip) for chip in chips]


def compile_all(names: Iterable[str], chips: Iterable[str]) -> dict[tuple[str, str], list[Machine]]:
    """By name and chip, each name in a process of its own. Raises MissingWheels."""
    names, chips = list(names), list(chips)
    workers = max(1, min(len(names), os.cpu_count() or 1, 4))
    # Of the processes; this one need not ask JAX for a device.
    with (
        mock.patch.dict(os.environ, JAX_PLATFORMS="cpu"),
        ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        every = zip(names, pool.map(compile_named, names, [chips] * len(names)), strict=True)
        return {(name, chip): machines for name, found in every for chip, machines in zip(chips, found, strict=True)}


def print_table(compiled: dict[tuple[str, str], list[Machine]], console: Console) -> None:
    table = Table("chip", "kernel", title="bytes spilled by a thread: stores + loads")
    for column in ("registers", "spilled", "shared", "tensor core products", "copies ahead"):
        table.add_column(column, justify="right")
    for (name, chip), machines in compiled.items():
        table.add_row(chip, f"[bold]{name}[/bold]")
        for m in machines:
            spilled = f"{m.spill_stores}+{m.spill_loads}"
            table.add_row("", m.name, str(m.registers), spilled, *map(str, (m.shared, m.products, m.copies)))
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.absent_triton", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=KERNELS, help="one kernel")
    parser.add_argument("--chip", choices=CHIPS, help="one chip")
    words = parser.parse_args(argv)
    try:
        compiled = compile_all([words.only] if words.only else KERNELS, [words.chip] if words.chip else CHIPS)
    except MissingWheels as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_table(compiled, Console(width=150, soft_wrap=False))
    return int(any(m.sharing for machines in compiled.values() for m in machines))


if __name__ == "__main__":
    sys.exit(main())
