"""The search for other configs: changes that make a step fit, and the meshes of a sweep."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from stickjax.config import Config
from stickjax.parallel.mesh import ROW_AXES
from stickjax.plan import estimate
from stickjax.plan.aot import Compiled, Machine, compile_step, make_mesh

SWEPT = 8  # meshes that a sweep compiles


class Change(NamedTuple):
    """Changes of a config after which its step fits into memory, {field: value}, and the step compiled with them."""

    changes: dict[str, int | str]
    compiled: Compiled


def nearest_changes(compiled: Compiled, machine: Machine) -> list[Change]:
    """Find changes of the config that make a step fit: the smallest change of each kind.

    There are three kinds: more remat, a smaller microbatch, and more devices that divide the parameters and the
    optimizer state. The first two do not change the size of the arguments, so they are left out if the arguments alone
    do not fit. If no kind suffices alone, the largest changes of all kinds are tried together. Every candidate is
    compiled.
    """
    found, room = [], estimate.MEMORY_SHARE * machine.memory - compiled.arguments
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
        except ValueError:  # the mesh does not divide the config
            continue
        if estimate.fits(compiled, machine.memory):
            return [Change(changes, compiled)]
    return []


def _more_remat(compiled: Compiled) -> Iterator[dict]:
    policies = ("none", "dots", "full")
    for policy in policies[policies.index(compiled.config.model.remat) + 1 :]:
        yield {"model.remat": policy}


def _smaller_microbatches(compiled: Compiled, room: float) -> Iterator[dict]:
    """Return changes to at most three smaller microbatches, down to one sequence per device. `room`: free bytes.

    Temporaries shrink at most in proportion to the microbatch. So microbatches that cannot fit are left out.
    """
    accumulate, B = compiled.config.train.accumulate, compiled.config.data.B
    rows = B // accumulate // math.prod(compiled.axes.get(axis, 1) for axis in ROW_AXES)
    divisors = [n for n in range(2, rows + 1) if rows % n == 0 and compiled.temporaries / n <= room]
    return ({"train.accumulate": accumulate * n} for n in dict.fromkeys(divisors[:2] + divisors[-1:]))


def _more_parts(compiled: Compiled) -> Iterator[dict]:
    """Yield changes to meshes with a smaller axis "data" and a larger axis "fsdp".

    On such meshes more devices divide the parameters.
    """
    data, fsdp = compiled.axes.get("data", 1), compiled.axes.get("fsdp", 1)
    for n in range(2, data + 1):
        if data % n == 0:
            yield {"mesh.data": data // n, "mesh.fsdp": fsdp * n}


def meshes(config: Config, machine: Machine) -> list[Config]:
    """Return a copy of the config for every mesh that uses all devices of the machine and divides the config.

    Meshes with few axes larger than 1 come first, and among these the meshes that divide only the batch.
    """
    axes = list(config.to_dict()["mesh"])

    def shapes(devices: int, left: int) -> Iterator[tuple[int, ...]]:
        if left == 1:
            yield (devices,)
            return
        for n in range(1, devices + 1):
            if devices % n == 0:
                yield from ((n, *rest) for rest in shapes(devices // n, left - 1))

    allowed = []
    for sizes in sorted(shapes(len(machine.devices), len(axes)), key=lambda s: (sum(n > 1 for n in s), s[::-1])):
        changed = config.replace({f"mesh.{axis}": n for axis, n in zip(axes, sizes, strict=True)})
        try:
            make_mesh(changed, machine)
        except ValueError:
            continue
        allowed.append(changed)
    return allowed


def sweep(config: Config, machine: Machine) -> tuple[list[Compiled], list[Config]]:
    """Compile the step of a config on the first SWEPT of its `meshes`.

    Return the compiled steps, and the configs on the other meshes, which were not compiled. Raises ValueError if no
    mesh divides the batch and the model.
    """
    configs = meshes(config, machine)
    if not configs:
        make_mesh(config, machine)  # its message says what does not divide
        raise ValueError("no mesh of these devices divides the batch and the model")
    return [compile_step(config, machine) for config in configs[:SWEPT]], configs[SWEPT:]
