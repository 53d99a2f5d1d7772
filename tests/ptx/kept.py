"""python -m tests.ptx.kept [--check]: write the PTX of a few small kernels to the folder tests/ptx/kept.

The stored kernels let the tests of the PTX machine run without the CUDA wheels, which compile kernels. With --check,
nothing is written: the current kernels are compared with the stored kernels, and the exit status is 1 if they differ. A
stored kernel from other package versions is not compared.
"""

import argparse
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import expert_mlp, route, stick_breaking_attention

from . import capture
from .program import Program, TensorMap

FOLDER = Path(__file__).parent / "kept"
# The packages that write the PTX; it also depends on their versions.
MAKERS = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc")


class Case(NamedTuple):
    function: Callable  # a function of the arrays that uses Mosaic kernels
    arrays: tuple[jax.Array, ...]
    reference: Callable  # the same function by the reference implementation, for arrays in float32


def _random(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


def attention() -> Case:
    """Return a case with the forward pass of attention on 330 tokens.

    The kernel has six tiles of 64 queries, in three thread blocks, and six tiles of 64 keys. A thread block keeps at
    most four tiles of keys in shared memory at the same time, so it must reuse the memory of a tile.
    """
    rng = np.random.default_rng(0)

    def run(implementation, query, key, value):
        return stick_breaking_attention(query, key, value, implementation=implementation)[0]

    return _case(run, *(_random(rng, 1, 330, 1, 32) for _ in range(3)))


def experts() -> Case:
    """Return a case with two expert networks on 150 tokens; each token uses both experts, in random order."""
    rng, (T, k, E, D, F) = np.random.default_rng(0), (150, 2, 2, 64, 64)
    chosen = jnp.asarray(rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1), jnp.int32)

    def run(implementation, x, w_in, w_out, gates):
        return expert_mlp(x, w_in, w_out, route(chosen, E), gates, implementation=implementation)

    shapes = (T, D), (E, D, 2 * F), (E, F, D), (T, k)
    return _case(run, *(_random(rng, *shape) for shape in shapes))


def _case(run: Callable, *arrays) -> Case:
    return Case(partial(run, "mosaic"), arrays, partial(run, "reference"))


CASES: dict[str, Callable[[], Case]] = {"attention": attention, "experts": experts}


def current() -> dict[str, Program]:
    """Compile the kernels of CASES. Return a dict from the name of each kernel to its Program.

    `write` stores the kernel with the name NAME in the files NAME.ptx and NAME.json. Raises MissingWheels if
    jax[cuda13] is not installed.
    """
    cases = [make() for make in CASES.values()]
    found = [program for case in cases for program in capture.programs(case.function, *case.arrays)]
    return {program.name.removesuffix("_mosaic_gpu_kernel"): program for program in map(_without_lines, found)}


def load(name: str) -> Program:
    fields = json.loads((FOLDER / f"{name}.json").read_text())["launch"]
    return Program(
        ptx=(FOLDER / f"{name}.ptx").read_text(),
        **{field: _parameters(x) if field == "parameters" else tuple(x) if isinstance(x, list) else x
           for field, x in fields.items()},
    )  # fmt: skip


def program_of(module) -> Program:
    """Return the stored program of a kernel, instead of compiling the kernel. The name of `module` selects the program.

    Use it as the argument `program_of` of `capture.run`, for functions of CASES.
    """
    from jax._src.lib.mlir import ir

    return load(ir.StringAttr(module.operation.attributes["sym_name"]).value)


def makers() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in MAKERS}


def made_with(name: str) -> dict[str, str]:
    return json.loads((FOLDER / f"{name}.json").read_text())["made_with"]


def _without_lines(program: Program) -> Program:
    """Return the program without debug information in its PTX, because line numbers change with every edit."""
    text = re.sub(r"^\s*\.(?:loc|file|section)\b.*\n|^\$L__(?:tmp|func_)\w+:\n", "", program.ptx, flags=re.M)
    return program._replace(ptx=text.rstrip() + "\n")


def _parameters(values: list) -> tuple:
    def maps(block):
        return tuple(TensorMap(**{k: tuple(v) if isinstance(v, list) else v for k, v in x.items()}) for x in block)

    return tuple(maps(x) if isinstance(x, list) else x for x in values)


def write(name: str, program: Program) -> None:
    launch = {k: v for k, v in program._asdict().items() if k != "ptx"}
    launch["parameters"] = [[m._asdict() for m in x] if isinstance(x, tuple) else x for x in program.parameters]
    (FOLDER / f"{name}.ptx").write_text(program.ptx)
    (FOLDER / f"{name}.json").write_text(json.dumps({"made_with": makers(), "launch": launch}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.kept", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare; skip kernels from other package versions")
    arguments = parser.parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    differs = 0
    for name, program in current().items():
        if not arguments.check:
            write(name, program)
        elif made_with(name) != makers():
            print(f"{name}: not compared, because it was made with {made_with(name)}, and here are {makers()}")
        elif load(name) != program:
            print(f"{name}: differs from the current kernel; run python -m tests.ptx.kept", file=sys.stderr)
            differs = 1
    return differs


if __name__ == "__main__":
    sys.exit(main())
