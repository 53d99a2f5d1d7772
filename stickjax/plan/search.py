"""Search for configs: changes of a config that make its step fit into memory, and meshes to compare."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from stickjax.config import Config
from stickjax.parallel.mesh import ROW_AXES
from stickjax.plan import estimate
from stickjax.plan.aot import Compiled, Machine, compile_step, make_mesh

SWEPT = 8  # the largest number of meshes for which `sweep` compiles the step


class Change(NamedTuple):
    """Changes of a config, {field: value}, that make its step fit into memory, and the step compiled with them."""

    changes: dict[str, int | str]
    compiled: Compiled


def nearest_changes(compiled: Compiled, machine: Machine) -> list[Change]:
    """Find changes of the config that make a step fit into memory: the smallest change of each kind.

    There are three kinds: more remat, smaller microbatches, and a larger mesh axis "fsdp" with a smaller axis "data".
    The third kind uses the same devices, but divides the parameters and the optimizer state among more of them. Only
    this kind makes the arguments of the step smaller. So if the arguments alone do not fit, the first two kinds are not
    tried. If no kind is enough alone, the largest changes of all kinds are tried together. The step is compiled for
    every change that is tried.
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
        except ValueError:  # the mesh cannot shard the batch and the model evenly
            continue
        if estimate.fits(compiled, machine.memory):
            return [Change(changes, compiled)]
    return []


def _more_remat(compiled: Compiled) -> Iterator[dict]:
    policies = ("none", "dots", "full")
    for policy in policies[policies.index(compiled.config.model.remat) + 1 :]:
        yield {"model.remat": policy}


def _smaller_microbatches(compiled: Compiled, room: float) -> Iterator[dict]:
    """Return at most three changes {"train.accumulate": number} that make the microbatches smaller.

    The changes give the two largest microbatches that may fit, and the smallest one, with one sequence per device.
    `room` is the number of bytes of a device that the arguments leave free. A microbatch with 1/n of the
    sequences needs at least 1/n of the bytes of the temporaries. It is left out if even these do not fit into `room`.
    """
    accumulate, B = compiled.config.train.accumulate, compiled.config.data.B
    rows = B // accumulate // math.prod(compiled.axes.get(axis, 1) for axis in ROW_AXES)
    divisors = [n for n in range(2, rows + 1) if rows % n == 0 and compiled.temporaries / n <= room]
    return ({"train.accumulate": accumulate * n} for n in dict.fromkeys(divisors[:2] + divisors[-1:]))


def _more_parts(compiled: Compiled) -> Iterator[dict]:
    """Yield changes of the mesh that make the axis "data" smaller and the axis "fsdp" larger.

    Then the parameters and the optimizer state are divided among more devices.
    """
    data, fsdp = compiled.axes.get("data", 1), compiled.axes.get("fsdp", 1)
    for n in range(2, data + 1):
        if data % n == 0:
            yield {"mesh.data": data // n, "mesh.fsdp": fsdp * n}


def meshes(config: Config, machine: Machine) -> list[Config]:
    """Return a copy of the config for every mesh that uses all devices and can shard the batch and the model evenly.

    The meshes are sorted by the number of axes that have more than one device, the smallest number first. Meshes with
    the same number are sorted by the size of the last axis, "tensor", then by the size of the axis before it, and so
    on, always the smallest size first.
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
    """Compile the training step of a config for several meshes: for the first SWEPT results of `meshes`.

    Return (the compiled steps, the configs with the other meshes, which were not compiled). Raise ValueError if no mesh
    can shard the batch and the model evenly.
    """
    configs = meshes(config, machine)
    if not configs:
        make_mesh(config, machine)  # raises an error that says which size is not a multiple
        raise ValueError(
            "no mesh of all devices can shard the batch and the model evenly; change data.B or the number of devices"
        )
    return [compile_step(config, machine) for config in configs[:SWEPT]], configs[SWEPT:]
