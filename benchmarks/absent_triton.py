"""python -m benchmarks.absent_triton [--only NAME] [--json]: compile the Triton kernels, without a GPU.

The kernels are compiled for several GPU models. The command prints a table of the registers, the spilled bytes and the
shared memory of each kernel. With --json, it also writes benchmarks/results/triton-static.json. The exit status is 1
if the column "atomics" lists an instruction, because the results of that kernel may then differ from run to run. The
command needs the CUDA wheels and jax-triton: pip install 'stickjax[cuda13]'.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from pallas_kernels import stick_breaking_attention
from stickjax.parallel.chips import MissingWheels

from . import absent_kernels
from .absent_gpu import SHARING, _folder, _usage, compile_for

RESULT = Path(__file__).parent / "results" / "triton-static.json"
PRODUCTS = r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b"


class Usage(NamedTuple):
    """The resources of one compiled Triton kernel.

    `registers`: registers per thread. `spill_stores` and `spill_loads`: bytes per thread. `shared`: bytes of shared
    memory per thread block.
    """

    name: str
    target: str  # the GPU architecture, such as "sm_80"
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    products: int  # the number of tensor-core instructions in the PTX
    copies: int  # the number of asynchronous copies to shared memory (cp.async) in the PTX
    sharing: dict[str, int]  # how often each instruction that matches SHARING occurs in the PTX


class Case(NamedTuple):
    """A function that runs Triton kernels, with the shapes of its arguments and the GPU model to compile it for."""

    chip: str  # a GPU model, such as "h200"
    function: Callable  # a function of arrays with the shapes `shapes`; not jitted
    shapes: tuple[jax.ShapeDtypeStruct, ...]


def stick_breaking(
    chip: str, *, H: int, dtype=jnp.bfloat16, T: int = 512, S: int | None = None, N: int = 4, K: int = 2,
    backward: bool = True, segments: bool = False, **options,
) -> Case:  # fmt: skip
    S = S or T

    def run(query, key, value, d_out, segment_ids):
        ids = {"segment_ids": segment_ids} if segments else {}

        @jax.checkpoint  # as in training with remat; JAX then removes outputs that the backward pass does not need
        def attend(*arrays):
            return stick_breaking_attention(*arrays, **ids, **options, implementation="triton")[0]

        if not backward:
            return attend(query, key, value)
        out, vjp = jax.vjp(attend, query, key, value)
        return out, vjp(d_out)

    query, key = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, T, N, H), (2, S, K, H)))
    return Case(chip, run, (query, key, key, query, jax.ShapeDtypeStruct((2, T), jnp.int32)))


def experts(chip: str, make: Callable[..., absent_kernels.Kernel] = absent_kernels.experts, **sizes) -> Case:
    kernel = make(**sizes, implementation="triton")
    return Case(chip, kernel.function, kernel.shapes)


HEADS = dict(make=absent_kernels.expert_heads, T=8192, k=4, D=1024, F=256, E=16)
# {architecture: a GPU model that has it}. CASES has one size of attention and one size of `expert_mlp` for all of these
# models. Every other case is for one model only.
CHIPS = {"sm_80": "a100-80", "sm_89": "l40s", "sm_90": "h200", "sm_100": "b200", "sm_120": "rtx-pro-6000"}
CASES: dict[str, Callable[[], Case]] = {
    **{f"stick_breaking_{target}": partial(stick_breaking, chip, H=64) for target, chip in CHIPS.items()},
    "stick_breaking_128": partial(stick_breaking, "a100-80", H=128),
    "stick_breaking_256": partial(stick_breaking, "l40s", H=256),
    "stick_breaking_float32": partial(stick_breaking, "l40s", H=128, dtype=jnp.float32),
    "stick_breaking_packed": partial(
        stick_breaking, "a100-80", H=80, segments=True, window=100, skip_below=-24.0, attend_current=True
    ),
    "stick_breaking_decode": partial(stick_breaking, "a100-80", H=128, T=1, S=8192, N=8, backward=False),
    **{f"experts_{target}": partial(experts, chip, T=8192, k=8, D=1536, F=512, E=40) for target, chip in CHIPS.items()},
    "experts_odd": partial(experts, "a100-80", T=1000, k=2, D=200, F=300, E=6, activation="geglu", bias=True),
    "experts_few_rows": partial(experts, "h200", T=256, k=8, D=1536, F=512, E=40, activation="reglu"),
    "experts_decode": partial(experts, "h200", absent_kernels.experts_decode),
    "expert_heads": partial(experts, "h200", **HEADS),
    "expert_heads_float32": partial(experts, "a100-80", **HEADS, dtype=jnp.float32),
}


def compile_kernels(case: Case) -> list[Usage]:
    """Compile the function of a case with Triton, XLA and ptxas. Return the resources of each of its Triton kernels.

    Raises:
      MissingWheels: jax[cuda13] or jax-triton is not installed.
      RuntimeError: this process has already compiled the kernels. jax-triton then takes them from its cache and writes
        no files.
    """
    try:
        from jax_triton import triton_lib
    except ModuleNotFoundError as error:
        raise MissingWheels(
            f"jax-triton is missing ({error}); install it with: pip install 'stickjax[cuda13]'"
        ) from None
    assembler = _folder("nvidia.cu13") / "bin"
    path = {"PATH": f"{assembler}{os.pathsep}{os.environ.get('PATH', '')}"}  # XLA uses the first ptxas in PATH
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(triton_lib, "_JAX_TRITON_DUMP_DIR", folder),
        mock.patch.dict(os.environ, path),
    ):
        compile_for(case.function, *case.shapes, chip=case.chip)
        written = list(Path(folder).glob("*/*.ptx"))
        if not written:
            raise RuntimeError(
                "no Triton kernel was compiled, because this process has already compiled them all; use a new process"
            )
        return sorted((_read(path, assembler / "ptxas") for path in written), key=lambda usage: usage[:-1])


def _read(path: Path, assembler: Path) -> Usage:
    ptx = path.read_text()
    target = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    command = [assembler, f"-arch={target}", "-v", path, "-o", path.with_suffix(".cubin")]
    usage = _usage(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
    shared = int(re.search(r"shared_mem_bytes: (\d+)", path.with_suffix(".compile_info").read_text())[1])
    sharing = Counter(re.findall(rf"^\s*(?:@!?%\w+\s+)?({SHARING})", ptx, re.M))
    return Usage(
        path.stem, target.rstrip("af"), usage["registers"], usage["spill_stores"], usage["spill_loads"], shared,
        len(re.findall(PRODUCTS, ptx)), len(re.findall(r"\bcp\.async\.c[ag]\b", ptx)), dict(sharing),
    )  # fmt: skip


def _compile_named(name: str) -> list[Usage]:
    return compile_kernels(CASES[name]())


def compile_all(names: Iterable[str]) -> dict[str, list[Usage]]:
    """Compile several cases and return {name of the case: the resources of its kernels}. `names`: keys of CASES.

    Each case is compiled in a new process, because jax-triton compiles a kernel only once per process, and because a
    process that has interpreted Triton kernels cannot compile any. Raises MissingWheels if jax[cuda13] or jax-triton is
    not installed.
    """
    names = list(names)
    workers = max(1, min(len(names), os.cpu_count() or 1, 4))
    with mock.patch.dict(os.environ, JAX_PLATFORMS="cpu"):
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            return dict(zip(names, pool.map(_compile_named, names), strict=True))


def print_table(compiled: dict[str, list[Usage]], console: Console) -> None:
    table = Table(title="Triton kernels; spilled: bytes per thread; shared memory: bytes per block")
    for column in ("case", "kernel", "target", "registers", "spilled", "shared memory", "atomics"):
        table.add_column(column)
    for name, usages in compiled.items():
        for i, u in enumerate(usages):
            spilled = f"{u.spill_stores} stored, {u.spill_loads} loaded" if u.spill_stores else "0"
            said = [u.name, u.target, str(u.registers), spilled, str(u.shared), ", ".join(u.sharing) or "none"]
            table.add_row("" if i else name, *said, end_section=i == len(usages) - 1)
    console.print(table)


def write_json(path: Path, compiled: dict[str, list[Usage]]) -> None:
    info = {"date": datetime.date.today().isoformat()}
    info |= {name: importlib.metadata.version(name) for name in ("jax", "jax-triton", "triton", "nvidia-cuda-nvcc")}
    info["kernels"] = {name: [usage._asdict() for usage in usages] for name, usages in compiled.items()}
    path.write_text(json.dumps(info, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.absent_triton", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=CASES, help="compile only this case")
    parser.add_argument("--json", action="store_true", help="also write benchmarks/results/triton-static.json")
    arguments = parser.parse_args(argv)
    if arguments.json and arguments.only:
        parser.error("--json writes the results of all cases, so it cannot be used together with --only")
    try:
        compiled = compile_all([arguments.only] if arguments.only else CASES)
    except MissingWheels as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_table(compiled, Console(width=150, soft_wrap=False))
    if arguments.json:
        write_json(RESULT, compiled)
    return int(any(u.sharing for usages in compiled.values() for u in usages))


if __name__ == "__main__":
    sys.exit(main())
