"""python -m benchmarks.absent_gpu [--only NAME] [--json]: compile the Mosaic kernels for an H200 that is not there.

Prints their registers, spills and shared memory, and what an iteration of their main loops costs at the least; with
--json also writes benchmarks/results/h200-static.json. Needs the CUDA wheels and no GPU.

The machine code is that of the executable itself. A loop counts every instruction from its first to its last as run
once: a branch around some of them still counts them, and waiting for a barrier costs nothing.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh
from rich.console import Console
from rich.table import Table

from .absent_kernels import KERNELS

HERE = Path(__file__).parent
WARPGROUP = 128  # threads: four warps, one on each scheduler of a multiprocessor
# What a Hopper multiprocessor does in a clock: special-function lanes, dense bf16 floating-point operations.
SPECIAL_LANES, TENSOR_FLOPS = 16, 4096
FP32 = ("FFMA", "FADD", "FMUL", "FMNMX")
ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDAS", "UTMAREDG")
# A wait for a barrier is a loop of its own: a few instructions and one of these.
SPIN = {"SYNCS", "NANOSLEEP", "YIELD"}


class MissingWheels(ImportError):
    """The message says how to install them."""


class Instruction(NamedTuple):
    address: int
    op: str  # up to the first dot
    modifiers: str
    operands: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop of the machine code: instructions of one warp in one iteration."""

    start: int  # address
    instructions: int
    special: int  # MUFU
    fp32: int
    shuffles: int
    products: dict[str, int]  # HGMMA, by shape
    flops: int  # of the products, for the whole warpgroup

    @property
    def cycles(self) -> dict[str, float]:
        """What an iteration of one warpgroup takes of a multiprocessor, by resource, if nothing ever waits."""
        return {
            "special": self.special * WARPGROUP / SPECIAL_LANES,
            "issue": float(self.instructions),
            "tensor": self.flops / TENSOR_FLOPS,
        }

    @property
    def bound(self) -> str:
        """The resource that takes the most: no iteration is shorter, even when everything overlaps."""
        return max(self.cycles, key=self.cycles.get)


@dataclasses.dataclass(frozen=True)
class Machine:
    """One Mosaic kernel as compiled. Bytes are of a thread for spills and stack, of a block for shared memory."""

    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int
    dynamic_shared: int
    atomics: dict[str, int]  # of the whole kernel
    warnings: list[str]  # what ptxas says of lost performance
    loops: list[Loop]  # in the order of the code

    @property
    def main_loops(self) -> list[Loop]:
        """Those with matrix products; without any, the longest."""
        return [x for x in self.loops if x.products] or sorted(self.loops, key=lambda x: -x.instructions)[:1]


def _folder(package: str) -> Path:
    with contextlib.suppress(ModuleNotFoundError):
        if spec := importlib.util.find_spec(package):
            return Path(next(iter(spec.submodule_search_locations)))
    raise MissingWheels(f"needs jax[cuda13]: pip install 'stickjax[cuda13]' ({package} not found)")


@functools.cache
def target(chip: str = "h200") -> list[jax.Device]:
    """Devices for compiling only, of a machine with one such chip (benchmarks/targets). Raises MissingWheels."""
    _folder("jax_cuda13_plugin")
    text = (HERE / "targets" / f"{chip}.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1").devices


@contextlib.contextmanager
def _dumping() -> Iterator[Path]:
    """A folder for what Mosaic writes when it compiles; it reads the environment each time. Gives it a disassembler."""
    import jax.experimental.mosaic.gpu  # noqa: F401  (sets MOSAIC_GPU_CUDA_ROOT: not after we did)

    cuda, triton = _folder("nvidia.cu13"), _folder("triton")
    tools = [*(cuda / "bin").iterdir(), triton / "backends" / "nvidia" / "bin" / "nvdisasm"]
    with tempfile.TemporaryDirectory() as name:
        root, dump = Path(name, "cuda"), Path(name, "dump")
        for folder in (dump, root / "bin"):
            folder.mkdir(parents=True)
        (root / "nvvm").symlink_to(cuda / "nvvm")
        for tool in {tool.name: tool for tool in tools}.values():
            (root / "bin" / tool.name).symlink_to(tool)
        path = f"{root / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        changed = {"MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_CUDA_ROOT": str(root), "PATH": path}
        with mock.patch.dict(os.environ, changed):
            yield dump


def compile_kernel(function: Callable, *shapes, chip: str = "h200") -> list[Machine]:
    """The Mosaic kernels in jit(function), after XLA, Mosaic and ptxas compiled it for an absent chip.

    Args:
      function: of arrays; whatever lowers for the GPU.
      shapes: its arguments, pytrees of jax.ShapeDtypeStruct.
    Raises:
      MissingWheels: without jax[cuda13], or without triton, which has the disassembler.
      RuntimeError: this process compiled one of them before: Mosaic remembers it and writes nothing.
    """
    devices = target(chip)
    on = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=on), shapes)
    device = AbstractDevice(device_kind=devices[0].device_kind, platform="gpu", num_cores=devices[0].core_count)
    with _dumping() as dump, use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(lambda *arguments: function(*arguments)).trace(*shapes).lower()
        lowered.compile()
        distinct = set(re.findall(r'kernel_hash = "[^"]*"', lowered.as_text()))
        written = sorted(dump.glob("*.sass_ctrl"))
        if len(written) != len(distinct):
            raise RuntimeError(f"{len(written)} of {len(distinct)} kernels were compiled; use a new process")
        return [_machine(path) for path in written]


def compile_named(name: str) -> tuple[tuple[int, ...], list[Machine]]:
    """The tiles and the machine code of one of KERNELS."""
    target()
    kernel = KERNELS[name]()
    return kernel.tiles, compile_kernel(kernel.function, *kernel.shapes)


def _machine(path: Path) -> Machine:
    """From one kernel's files."""
    log, listing = (path.with_suffix(suffix).read_text(errors="replace") for suffix in (".ptxas", ".sass_ctrl"))
    with path.with_suffix(".mlir-passes.log").open(errors="replace") as passes:
        module = passes.read(2**22)  # of many times that: the first passes, which still name it
    dynamic = re.search(r"dynamic_shared_memory_size (%\w+)", module)
    dynamic = dynamic and re.search(rf"{dynamic[1]} = arith.constant (\d+) : i32", module)

    def last(pattern: str) -> int:
        # The linker repeats registers and shared memory, and has the last word. What there is none of has no line.
        return int((re.findall(pattern, log) or ["0"])[-1])

    return Machine(
        name=path.stem,
        registers=last(r"[Uu]sed (\d+) registers"),
        stack=last(r"(\d+) bytes stack frame"),
        spill_stores=last(r"(\d+) bytes spill stores"),
        spill_loads=last(r"(\d+) bytes spill loads"),
        static_shared=last(r"(\d+) bytes smem"),
        dynamic_shared=int(dynamic[1]) if dynamic else 0,
        atomics=dict(Counter(i.op for i in read(listing)[0] if i.op in ATOMICS)),
        warnings=re.findall(r"Potential Performance Loss: (.*)", log),
        loops=find_loops(listing),
    )


def read(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions that nvdisasm printed, and the address that each label stands for."""
    instructions, labels, waiting = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            waiting.append(label[1])
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([\w.:]*)\s*([^;]*)", line):
            address, *rest = found.groups()
            instructions.append(Instruction(int(address, 16), *rest))
            labels |= dict.fromkeys(waiting, instructions[-1].address)
            waiting.clear()
    return instructions, labels


def find_loops(listing: str) -> list[Loop]:
    """The innermost loops of a kernel's machine code, waits for barriers aside."""
    instructions, labels = read(listing)
    found = [(i.address, re.search(r"\.L\w+", i.operands)) for i in instructions if i.op == "BRA"]
    branches = [(source, labels[label[0]]) for source, label in found if label and label[0] in labels]
    spans = {start: end for end, start in branches if start < end}  # to the last branch back; traps go to themselves
    # A wait that failed goes on below the code, and from there back into it: no loop, it is entered in its middle.
    spans = {s: e for s, e in spans.items() if not any(source < s < goal <= e for source, goal in branches)}
    bodies = {(s, e): [i for i in instructions if s <= i.address <= e] for s, e in sorted(spans.items())}
    real = {span: x for span, x in bodies.items() if len(x) > 12 or SPIN.isdisjoint(i.op for i in x)}
    return [_loop(x) for (s, e), x in real.items() if not any((s, e) != (a, b) and s <= a and b <= e for a, b in real)]


def _loop(body: list[Instruction]) -> Loop:
    ops = Counter(i.op for i in body)
    products = Counter(re.search(r"\d+x\d+x\d+", i.modifiers)[0] for i in body if i.op == "HGMMA")
    flops = sum(2 * math.prod(map(int, shape.split("x"))) * n for shape, n in products.items())
    fp32 = sum(ops[op] for op in FP32)
    return Loop(body[0].address, len(body), ops["MUFU"], fp32, ops["SHFL"], dict(products), flops)


def milliseconds(cycles_per_tile: float, tiles: int, sms: int = 132, ghz: float = 1.755) -> float:
    """Of `tiles` iterations, each of one warpgroup, spread evenly over the chip."""
    return cycles_per_tile * tiles / (sms * ghz * 1e6)


def bound(machines: list[Machine], tiles: tuple[int, ...]) -> float | None:
    """Milliseconds of all main loops, one after the other; None if `tiles` has not one number for each."""
    loops = [loop for machine in machines for loop in machine.main_loops]
    if len(loops) == len(tiles):
        return sum(milliseconds(x.cycles[x.bound], n) for x, n in zip(loops, tiles, strict=True))


# By name: how often each main loop runs, and the kernels.
type Compiled = dict[str, tuple[tuple[int, ...], list[Machine]]]


def print_table(compiled: Compiled, console: Console) -> None:
    table = Table("kernel", "loop", title="main loops: instructions of a warp, cycles of a warpgroup, per iteration")
    for column in ("MUFU", "fp32", "SHFL", "HGMMA", "all", "special", "issue", "tensor"):
        table.add_column(column, justify="right")
    for name, (tiles, machines) in compiled.items():
        for m in machines:
            spills, shared = f"{m.spill_stores}+{m.spill_loads}", f"{m.static_shared}+{m.dynamic_shared}"
            console.print(
                f"{name} {m.name}: {m.registers} registers, {spills} bytes spilled, stack {m.stack}", end=", "
            )
            console.print(f"shared {shared}, atomics {m.atomics or 'none'}")
            for warning in m.warnings:
                console.print(f"  ptxas: {warning}")
            for x in m.main_loops:
                products = ", ".join(f"{n} {shape}" for shape, n in x.products.items())
                counts = map(str, (x.special, x.fp32, x.shuffles, products, x.instructions))
                cycles = (f"[bold]{n:.0f}[/bold]" if what == x.bound else f"{n:.0f}" for what, n in x.cycles.items())
                table.add_row(m.name, f"{x.start:#x}", *counts, *cycles)
        least = bound(machines, tiles)
        said = f"{least:.3f} ms" if least else f"no bound, tiles={tiles} are not one for each loop"
        table.add_row(f"{name}: {said}", end_section=True)
    console.print(table)


def write_json(path: Path, compiled: Compiled) -> None:
    said = subprocess.run([_folder("nvidia.cu13") / "bin" / "ptxas", "--version"], capture_output=True, text=True)
    info = {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "device": "NVIDIA H200"}
    info["ptxas"] = re.search(r"V([\d.]+)", said.stdout)[1]
    for name, (tiles, machines) in compiled.items():
        info[name] = {"milliseconds": bound(machines, tiles), "tiles": tiles, "kernels": []}
        for m in machines:
            loops = [dataclasses.asdict(x) | {"cycles": x.cycles, "bound": x.bound} for x in m.main_loops]
            info[name]["kernels"].append(dataclasses.asdict(m) | {"loops": loops})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(info, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.absent_gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=KERNELS, help="one kernel")
    parser.add_argument("--json", action="store_true", help="also write benchmarks/results/h200-static.json")
    arguments = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes; this one asks JAX for no device
    names = [arguments.only] if arguments.only else list(KERNELS)
    try:  # a process for each: see compile_kernel
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            compiled = dict(zip(names, pool.map(compile_named, names), strict=True))
    except MissingWheels as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_table(compiled, Console(width=140, soft_wrap=False))
    if arguments.json:
        write_json(HERE / "results" / "h200-static.json", compiled)
    return int(any(m.atomics for _, machines in compiled.values() for m in machines))


if __name__ == "__main__":
    sys.exit(main())
