"""Plan a training run: what its step takes on GPUs that need not be there.

python -m stickjax.plan configs/powermoe_3b.py --gpu h200 --devices 64 [--sweep] [--json] [--section.field=value ...]

Compiles the real step ahead of time and prints parameters, memory, work, collectives and an estimated time, and when it
does not fit, the nearest changes that do, each compiled too. With the CUDA wheels for the GPUs themselves, otherwise on
virtual CPU devices.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax

from stickjax import estimate
from stickjax.aot import Compiled, Machine, absent_machine, compile_step, make_mesh, present_machine, virtual_devices
from stickjax.chips import CHIPS, chip, has_wheels
from stickjax.config import Config
from stickjax.options import describe, load_config, parse
from stickjax.report import as_dict, print_step, print_sweep

SWEPT = 8  # meshes that a sweep compiles


class Change(NamedTuple):
    """A config that fits, by what was changed."""

    changes: dict[str, int | str]
    compiled: Compiled


def nearest_changes(compiled: Compiled, machine: Machine) -> list[Change]:
    """Changes under which a step that does not fit does: the smallest of each kind, or of all kinds together.

    The kinds are more remat, a smaller microbatch, and more parts of the parameters and the optimizer's state, of which
    the first two leave the arguments as they are. Each is compiled.
    """
    found, room = [], estimate.FITS * machine.memory - compiled.arguments
    kinds = [list(_more_parts(compiled))]
    if room > 0:
        kinds = [list(_more_remat(compiled)), list(_smaller_microbatches(compiled, room)), *kinds]
    for kind in kinds:
        found += _first_that_fits(compiled.config, kind, machine)
    if not found:
        together = {name: value for kind in kinds if kind for name, value in kind[-1].items()}
        found += _first_that_fits(compiled.config, [together] if len(together) > 1 else [], machine)
    return found


def _first_that_fits(config: Config, candidates: list[dict], machine: Machine) -> list[Change]:
    for changes in candidates:
        try:
            compiled = compile_step(config.replace(changes), machine)
        except ValueError:  # does not divide
            continue
        if estimate.fits(compiled, machine.memory):
            return [Change(changes, compiled)]
    return []


def _more_remat(compiled: Compiled) -> Iterator[dict]:
    policies = ("none", "dots", "full")
    for policy in policies[policies.index(compiled.config.model.remat) + 1 :]:
        yield {"model.remat": policy}


def _smaller_microbatches(compiled: Compiled, room: float) -> Iterator[dict]:
    """Down to one sequence on a device, three at most: temporaries shrink with the microbatch at the most."""
    accumulate, B = compiled.config.train.accumulate, compiled.config.data.B
    rows = B // accumulate // compiled.devices
    divisors = [n for n in range(2, rows + 1) if rows % n == 0 and compiled.temporaries / n <= room]
    return ({"train.accumulate": accumulate * n} for n in dict.fromkeys(divisors[:2] + divisors[-1:]))


def _more_parts(compiled: Compiled) -> Iterator[dict]:
    """Devices that keep all parameters divide them instead."""
    data, fsdp = compiled.axes.get("data", 1), compiled.axes.get("fsdp", 1)
    for n in range(2, data + 1):
        if data % n == 0:
            yield {"mesh.data": data // n, "mesh.fsdp": fsdp * n}


def meshes(config: Config, machine: Machine) -> list[Config]:
    """The config on every mesh of all devices that it allows, those with the fewest axes first."""
    axes = list(config.to_dict()["mesh"])

    def shapes(devices: int, left: int) -> Iterator[tuple[int, ...]]:
        if left == 1:
            yield (devices,)
            return
        for n in range(1, devices + 1):
            if devices % n == 0:
                yield from ((n, *rest) for rest in shapes(devices // n, left - 1))

    allowed = []
    for sizes in sorted(shapes(len(machine.devices), len(axes)), key=lambda s: (sum(n > 1 for n in s), s)):
        changed = config.replace({f"mesh.{axis}": n for axis, n in zip(axes, sizes, strict=True)})
        try:
            make_mesh(changed, machine)
        except ValueError:
            continue
        allowed.append(changed)
    return allowed


def sweep(config: Config, machine: Machine) -> tuple[list[Compiled], list[Config]]:
    """The step compiled on the first SWEPT meshes, and those that were left out. Raises ValueError if none divides."""
    configs = meshes(config, machine)
    if not configs:
        make_mesh(config, machine)  # its message says what does not divide
        raise ValueError("no mesh of these devices divides the batch and the model")
    return [compile_step(config, machine) for config in configs[:SWEPT]], configs[SWEPT:]


def show(config: Config, machine: Machine, *, as_json: bool = False, swept: bool = False) -> None:
    """Compile, search, and print the report. Raises ValueError for a mesh that does not divide."""
    if swept:
        steps, left_out = sweep(config, machine)
        if as_json:
            print(json.dumps({"steps": [as_dict(step, machine) for step in steps],
                              "left_out": [c.to_dict()["mesh"] for c in left_out]}, indent=1))  # fmt: skip
        else:
            print_sweep(steps, left_out, machine)
        return
    step = compile_step(config, machine)
    changes = [] if estimate.fits(step, machine.memory) else nearest_changes(step, machine)
    if as_json:
        found = [{"changes": c.changes, "step": as_dict(c.compiled, machine)} for c in changes]
        print(json.dumps(as_dict(step, machine) | {"changes": found}, indent=1))
    else:
        print_step(step, machine, [(c.changes, c.compiled) for c in changes])


def dry_run(config: Config) -> None:
    """The report for the machine at hand; nothing is written."""
    show(config, present_machine())


def _hosts(devices: int) -> int:
    """The fewest of at most eight devices each."""
    return next(hosts for hosts in range(max(1, -(-devices // 8)), max(1, devices) + 1) if devices % hosts == 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stickjax.plan", add_help=False, allow_abbrev=False)
    parser.add_argument("config", nargs="?", help="a config file, or a run's config.json")
    parser.add_argument("--gpu", default="h200", help=f"one of {', '.join(CHIPS)}; h200 by default")
    parser.add_argument("--devices", type=int, default=8, help="GPUs; 8 by default")
    parser.add_argument("--hosts", type=int, help="hosts that they are in; one for every 8 by default")
    parser.add_argument("--sweep", action="store_true", help=f"compare mesh shapes, {SWEPT} at most")
    parser.add_argument("--json", action="store_true", help="machine-readable, to stdout")
    parser.add_argument("-h", "--help", action="store_true")
    words, rest = parser.parse_known_args(argv)
    try:
        config = load_config(words.config) if words.config else Config()
        if words.help:
            print(f"{parser.format_help()}\nconfig fields, with their values here:\n{describe(config)}")
            return 0
        if words.config is None:
            raise ValueError("which config? for example: python -m stickjax.plan configs/powermoe_3b.py --devices 64")
        config = parse(config, rest)
        gpu = chip(words.gpu)
        if "JAX_PLATFORMS" not in os.environ:
            jax.config.update("jax_platforms", "cpu")  # no GPU here is used
        if not has_wheels():
            virtual_devices(words.devices)
        machine = absent_machine(gpu, words.devices, words.hosts or _hosts(words.devices))
        if not words.sweep and not any(word.startswith("--mesh.") for word in rest) and config.mesh == Config().mesh:
            config = config.replace({"mesh.fsdp": -1})
        show(config, machine, as_json=words.json, swept=words.sweep)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
