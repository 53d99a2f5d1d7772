"""python -m benchmarks.absent_gpu [--only NAME] [--json]: compile the Mosaic kernels for an H200, without a GPU.

The command prints two tables. The first has the registers, the spilled bytes and the shared memory of each kernel. The
second has the main loops of each kernel, with the smallest number of clock cycles that one iteration can take. It also
has a lower bound of the time of each call in milliseconds, computed from these cycles. With --json, the command also
writes benchmarks/results/h200-static.json. The exit status is 1 if the column "atomics" lists an instruction, because
the results of that kernel may then differ from run to run. The command needs the CUDA wheels: pip install
'stickjax[cuda13]'.

The machine code is read from the compiled program, which the linker of the CUDA libraries has produced. This linker
ignores setmaxnreg, the instruction that gives some warps more registers than others. So in a block of 384 threads, no
thread gets more than 168 registers. The figures named `alone` come from ptxas, which compiles the same PTX without the
linker and respects setmaxnreg.

The lower bounds leave out memory traffic. A decode step is limited by its memory traffic, so it takes longer than its
bound.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from stickjax.parallel.chips import MissingWheels, absent_devices, tracing_for

from .absent_kernels import KERNELS, WIDTHS, Kernel
from .sass import ATOMICS, Loop, find_loops, read

HERE = Path(__file__).parent
# PTX instructions with which thread blocks could add to each other's results or wait for each other: atomics,
# reductions, semaphores. No kernel may have such an instruction, because its results must be deterministic.
SHARING = r"(?:atom|red|multimem|membar|cp\.reduce|(?:ld|st)\.(?:acquire|release|relaxed|volatile))\.[\w.:]*"


@dataclasses.dataclass(frozen=True)
class Machine:
    """The resources and the loops of one compiled Mosaic kernel, read from files that the compiler wrote.

    `registers`: registers per thread. `stack`, `spill_stores` and `spill_loads`: bytes per thread. `static_shared` and
    `dynamic_shared`: bytes of shared memory per thread block.
    """

    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int
    dynamic_shared: int
    alone: dict[str, int]  # the result of `_alone`: resources when ptxas compiles the PTX without the linker
    atomics: dict[str, int]  # how often each atomic instruction occurs in the machine code
    sharing: dict[str, int]  # how often each instruction that matches SHARING occurs in the PTX
    warnings: list[str]  # warnings of ptxas about lost performance
    loops: list[Loop]  # in the order of the code

    @property
    def main_loops(self) -> list[Loop]:
        """The loops with matrix products on tensor cores. If there are none, the loop with the most instructions."""
        return [x for x in self.loops if x.products] or sorted(self.loops, key=lambda x: -x.instructions)[:1]


def _folder(package: str) -> Path:
    with contextlib.suppress(ModuleNotFoundError):
        if spec := importlib.util.find_spec(package):
            return Path(next(iter(spec.submodule_search_locations)))
    raise MissingWheels(f"the package {package} is missing; install it with: pip install 'stickjax[cuda13]'")


@contextlib.contextmanager
def _dumping() -> Iterator[Path]:
    """Make Mosaic write files about each kernel to a temporary folder while the context lasts. Yield the folder.

    The files are the PTX, the machine code and the logs of the compiler. The context sets environment variables, which
    Mosaic reads at every compilation. It also puts nvdisasm, the disassembler of the triton wheel, into a folder where
    Mosaic looks for its tools.
    """
    import jax.experimental.mosaic.gpu  # noqa: F401  (sets MOSAIC_GPU_CUDA_ROOT, so import it before the change)

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


def compile_for(function: Callable, *shapes, chip: str = "h200") -> tuple[jax.stages.Lowered, jax.stages.Compiled]:
    """Lower and compile jit(function) for a GPU that this machine does not have. Return (lowered, compiled).

    `shapes`: the shapes of the arguments of `function`, pytrees of jax.ShapeDtypeStruct. `chip`: the name of the GPU
    model, as in `stickjax.parallel.chips`. Raises MissingWheels if jax[cuda13] is not installed.
    """
    devices = absent_devices(chip)
    on = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=on), shapes)
    with tracing_for(devices[0]):
        lowered = jax.jit(lambda *arguments: function(*arguments)).trace(*shapes).lower()
        return lowered, lowered.compile()


def compile_kernel(function: Callable, *shapes, chip: str = "h200") -> list[Machine]:
    """Compile jit(function) for a GPU that this machine does not have. Return a `Machine` for each Mosaic kernel in it.

    Args:
      function: a function of arrays that can be lowered for the GPU.
      shapes: the shapes of the arguments of `function`, pytrees of jax.ShapeDtypeStruct.
      chip: the name of the GPU model, as in `stickjax.parallel.chips`.
    Raises:
      MissingWheels: jax[cuda13] or triton is not installed. The disassembler is a part of triton.
      RuntimeError: this process has already compiled one of the kernels. Mosaic then takes the kernel from its cache
        and writes no files.
    """
    absent_devices(chip)
    with _dumping() as dump:
        lowered, _ = compile_for(function, *shapes, chip=chip)
        distinct = set(re.findall(r'kernel_hash = "[^"]*"', lowered.as_text()))
        written = sorted(dump.glob("*.sass_ctrl"))
        if len(written) != len(distinct):
            raise RuntimeError(
                f"Mosaic compiled only {len(written)} of {len(distinct)} kernels, because this process has already "
                "compiled the others; use a new process"
            )
        return [_machine(path) for path in written]


def temporaries(kernel: Kernel) -> int:
    """Return the bytes of GPU memory that `kernel.function` needs besides its arguments and results."""
    _, compiled = compile_for(kernel.function, *kernel.shapes)
    return compiled.memory_analysis().temp_size_in_bytes


class Compiled(NamedTuple):
    """The compiled kernels of one call. A call is an entry of KERNELS or WIDTHS in absent_kernels.py."""

    tiles: tuple[int, ...]  # the number of iterations of each main loop
    scores: int  # attention scores per thread and iteration
    machines: list[Machine]


def compile_named(name: str) -> Compiled:
    absent_devices()
    kernel = (KERNELS | WIDTHS)[name]()
    return Compiled(kernel.tiles, kernel.scores, compile_kernel(kernel.function, *kernel.shapes))


def compile_all(names: Iterable[str]) -> dict[str, Compiled]:
    """Compile several calls and return {name: its compiled kernels}.

    `names`: keys of KERNELS or WIDTHS in absent_kernels.py. Each call is compiled in a new process, because Mosaic
    compiles a kernel only once per process. Raises MissingWheels if jax[cuda13] or triton is not installed.
    """
    names = list(names)
    workers = max(1, min(len(names), os.cpu_count() or 1, 4))
    # JAX_PLATFORMS is for the new processes; this process does not ask JAX for a device.
    with (
        mock.patch.dict(os.environ, JAX_PLATFORMS="cpu"),
        ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        return dict(zip(names, pool.map(compile_named, names), strict=True))


def _usage(log: str) -> dict[str, int]:
    """Return the registers, stack, spills and static shared memory of a kernel, read from the log of ptxas.

    If the log reports a resource twice, the last number counts, because it comes from the linker.
    """
    patterns = {
        "registers": r"[Uu]sed (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "static_shared": r"(\d+) bytes smem",
    }
    # ptxas prints no line for a resource that the kernel does not use.
    return {name: int((re.findall(pattern, log) or ["0"])[-1]) for name, pattern in patterns.items()}


def _alone(ptx: Path) -> dict[str, int]:
    """Compile a PTX file with ptxas, without the linker. Return the resources of its kernel, as `_usage` does.

    Unlike the linker, ptxas respects setmaxnreg, the instruction that gives some warps more registers than others.
    """
    chip = re.search(r"^\.target (\w+)", ptx.read_text(), re.M)[1]
    tool = _folder("nvidia.cu13") / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        command = [tool, f"-arch={chip}", "-v", ptx, "-o", Path(folder, "cubin")]
        return _usage(subprocess.run(command, capture_output=True, text=True, check=True).stderr)


def _machine(path: Path) -> Machine:
    """Read one compiled kernel from the files that Mosaic wrote. `path`: the file with the suffix .sass_ctrl."""
    log, listing, ptx = (path.with_suffix(x).read_text(errors="replace") for x in (".ptxas", ".sass_ctrl", ".ptx"))
    with path.with_suffix(".mlir-passes.log").open(errors="replace") as passes:
        module = passes.read(2**22)  # the file is much larger; only its first passes still name the shared memory size
    dynamic = re.search(r"dynamic_shared_memory_size (%\w+)", module)
    dynamic = dynamic and re.search(rf"{dynamic[1]} = arith.constant (\d+) : i32", module)
    return Machine(
        name=path.stem,
        **_usage(log),
        dynamic_shared=int(dynamic[1]) if dynamic else 0,
        alone=_alone(path.with_suffix(".ptx")),
        atomics=dict(Counter(i.op for i in read(listing)[0] if i.op in ATOMICS)),
        sharing=dict(Counter(re.findall(rf"^\s*(?:@!?%\w+\s+)?({SHARING})", ptx, re.M))),
        warnings=re.findall(r"Potential Performance Loss: (.*)", log),
        loops=find_loops(listing),
    )


def milliseconds(cycles_per_tile: float, tiles: int, sms: int = 132, ghz: float = 1.755) -> float:
    """Return the milliseconds that `tiles` iterations of a loop take if they are spread evenly over multiprocessors.

    `cycles_per_tile`: the clock cycles of a multiprocessor for one iteration of one warpgroup. `sms`: the number of
    multiprocessors. `ghz`: the clock rate. The defaults describe an H200.
    """
    return cycles_per_tile * tiles / (sms * ghz * 1e6)


def bound(machines: list[Machine], tiles: tuple[int, ...]) -> float | None:
    """Return a lower bound of the time of several kernels in milliseconds: the sum of the bounds of their main loops.

    `tiles`: the number of iterations of each main loop. If it does not have one number per main loop, return None.
    """
    loops = [loop for machine in machines for loop in machine.main_loops]
    if len(loops) == len(tiles):
        return sum(milliseconds(x.cycles[x.bound], n) for x, n in zip(loops, tiles, strict=True))


def print_table(compiled: dict[str, Compiled], console: Console) -> None:
    kernels = Table(
        "kernel",
        title="spilled: bytes per thread, stores + loads; alone: without the linker; shared: bytes, static + dynamic",
    )
    for column in ("registers", "stack", "spilled", "alone: spilled", "shared", "atomics"):
        kernels.add_column(column, justify="right")
    table = Table("kernel", "loop", title="main loops, per iteration: instructions of a warp, cycles of a warpgroup")
    for column in ("iterations", "MUFU", "per score", "fp32", "SHFL", "HGMMA", "all", "special", "issue", "tensor"):
        table.add_column(column, justify="right")
    for name, (tiles, scores, machines) in compiled.items():
        kernels.add_row(f"[bold]{name}[/bold]")
        runs = iter(tiles)
        for m in machines:
            spilled, alone = (f"{x['spill_stores']}+{x['spill_loads']}" for x in (vars(m), m.alone))
            shared, atomics = f"{m.static_shared}+{m.dynamic_shared}", str({**m.atomics, **m.sharing} or "none")
            kernels.add_row(m.name, str(m.registers), str(m.stack), spilled, alone, shared, atomics)
            for x in m.main_loops:
                products = ", ".join(f"{n} {shape}" for shape, n in x.products.items())
                counts = (x.special, f"{x.special / scores:.2f}", x.fp32, x.shuffles, products, x.instructions)
                cycles = (f"[bold]{n:.0f}[/bold]" if what == x.bound else f"{n:.0f}" for what, n in x.cycles.items())
                table.add_row(m.name, f"{x.start:#x}", str(next(runs, "?")), *map(str, counts), *cycles)
        least = bound(machines, tiles)
        said = f"no bound: tiles={tiles} must have one number per loop" if least is None else f"{least:.3f} ms"
        table.add_row(f"[bold]{name}[/bold]", said, end_section=True)
    console.print(kernels)
    for warning in sorted({w for x in compiled.values() for m in x.machines for w in m.warnings}):
        console.print(f"ptxas: {warning}")
    console.print(table)


def write_json(path: Path, compiled: dict[str, Compiled]) -> None:
    said = subprocess.run([_folder("nvidia.cu13") / "bin" / "ptxas", "--version"], capture_output=True, text=True)
    info = {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "device": "NVIDIA H200"}
    info["ptxas"] = re.search(r"V([\d.]+)", said.stdout)[1]
    for name, (tiles, scores, machines) in compiled.items():
        info[name] = {"milliseconds": bound(machines, tiles), "tiles": tiles, "kernels": []}
        for m in machines:
            loops = [
                dataclasses.asdict(x) | {"special_per_score": x.special / scores, "cycles": x.cycles, "bound": x.bound}
                for x in m.main_loops
            ]
            info[name]["kernels"].append(dataclasses.asdict(m) | {"loops": loops})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(info, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.absent_gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=KERNELS, help="compile only this call")
    parser.add_argument("--json", action="store_true", help="also write benchmarks/results/h200-static.json")
    arguments = parser.parse_args(argv)
    try:
        compiled = compile_all([arguments.only] if arguments.only else KERNELS)
    except MissingWheels as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_table(compiled, Console(width=150, soft_wrap=False))
    if arguments.json:
        write_json(HERE / "results" / "h200-static.json", compiled)
    return int(any(m.atomics or m.sharing for x in compiled.values() for m in x.machines))


if __name__ == "__main__":
    sys.exit(main())
