"""Compile a training step ahead of time: for absent GPUs, for virtual CPU devices, or for the devices of this process.

From the compiled step, this module reads the exact bytes of the arguments, the bytes of the temporaries, and the
collectives. From the traced step, a jaxpr, it counts the floating-point operations and the memory traffic.
"""

import dataclasses
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import dispatch
from stickjax.config import Config
from stickjax.models.families import family_of
from stickjax.models.parameters import shardings
from stickjax.parallel import mesh as mesh_module
from stickjax.parallel.chips import Chip, absent_devices, has_wheels, of_kind, tracing_for
from stickjax.parallel.mesh import abstract_batch
from stickjax.plan.flops import Work, count
from stickjax.plan.hlo import Collective, collectives
from stickjax.system.memory import state_parts
from stickjax.training.step import TrainState, init_state, jit_step


class Machine(NamedTuple):
    """The devices for which a step is compiled. Every host has the same number of devices.

    `chip`: the GPU model and its peak rates; None for an unknown device. `memory`: the bytes of memory of one device;
    None if not known.
    """

    devices: tuple[jax.Device, ...]
    hosts: int
    chip: Chip | None
    memory: int | None
    description: str  # for the report
    platforms: tuple[str, ...] | None = None  # the step is lowered for them; None: for the platform of the devices

    @property
    def per_host(self) -> int:
        return len(self.devices) // self.hosts


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The numbers of a compiled training step that a plan needs.

    `arguments`, `temporaries` and `peak` are bytes on one device. The peak is the sum of the arguments, of the
    temporaries, and of the results that do not reuse the memory of an argument. `work` has the floating-point
    operations and the memory traffic of all devices together.
    """

    config: Config
    mesh: Mesh | None
    arguments: int
    temporaries: int
    peak: int
    state: dict[str, int]  # bytes of each part of the training state on one device, included in `arguments`
    work: Work
    collectives: list[Collective]
    kernels: tuple[dispatch.Choice, ...]  # the implementations that were chosen for the ops
    seconds: float  # compile time

    @property
    def devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def axes(self) -> dict[str, int]:
        """Return {mesh axis: its size}, or {} without a mesh."""
        return {} if self.mesh is None else dict(self.mesh.shape)


def absent_machine(chip: Chip, devices: int, hosts: int) -> Machine:
    """Return a `Machine` of GPUs of the model `chip`, which need not be present.

    `devices` is the number of GPUs on all hosts together. If the CUDA wheels are not installed, the machine has
    virtual CPU devices instead, in the same number.

    Raises:
      ValueError: `devices` or `hosts` is smaller than 1; `devices` is not a multiple of `hosts`; or the CUDA wheels
        are not installed, and this process has fewer CPU devices than needed (see `virtual_devices`).
    """
    if devices < 1 or hosts < 1:
        raise ValueError(f"devices={devices} and hosts={hosts} must be at least 1")
    if devices % hosts:
        raise ValueError(f"devices={devices} must be a multiple of hosts={hosts}")
    named = f"{devices} x {chip.kind}"
    if has_wheels():
        found, platforms = absent_devices(chip.name, devices, hosts), ("cuda",)
        description = f"{named} that are not present"
    else:
        found, platforms = jax.devices("cpu")[:devices], None
        description = f"{devices} virtual CPU devices instead of {named} (memory and collectives are of a CPU program; "
        description += "to compile for the GPUs: pip install 'stickjax[cuda13]')"
        if len(found) < devices:
            raise ValueError(
                f"JAX has started with {len(found)} virtual CPU devices, but {devices} are needed; make the plan in "
                "a new process"
            )
    description += f", {hosts} host{'s' if hosts > 1 else ''}"
    return Machine(tuple(found), hosts, chip, chip.memory, description, platforms)


def present_machine() -> Machine:
    """Return a `Machine` with all devices that JAX has now: the devices of all processes that train together."""
    devices = jax.devices()
    stats = devices[0].memory_stats() or {}
    chip = of_kind(devices[0].device_kind)
    memory = stats.get("bytes_limit") or (chip.memory if chip else None)
    description = f"{len(devices)} x {devices[0].device_kind}"
    return Machine(tuple(devices), jax.process_count(), chip, memory, description)


def make_mesh(config: Config, machine: Machine) -> Mesh | None:
    """Return the mesh of a config on a machine, or None for one device.

    Raise ValueError if the mesh cannot shard the batch and the model evenly, or does not use all devices of the
    machine.
    """
    mesh = mesh_module.make_mesh(config, list(machine.devices))
    if (used := 1 if mesh is None else mesh.size) != len(machine.devices):
        raise ValueError(f"the mesh has {used} devices, but there are {len(machine.devices)}; --mesh.fsdp=-1 uses all")
    return mesh


def abstract_arguments(config: Config, mesh: Mesh | None, device: jax.Device) -> tuple[TrainState, dict]:
    """Return the arguments of a training step, (state, batch), as ShapeDtypeStructs with shardings on the mesh.

    Without a mesh, all arrays are on `device`.
    """
    alone = NamedSharding(Mesh([device], ("x",)), PartitionSpec())
    state = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))
    places = jax.tree.map(lambda _: alone, state) if mesh is None else shardings(mesh, state)
    state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places)
    batch = family_of(config.model).example_batch(config)
    if mesh is None:
        return state, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), batch)
    return state, abstract_batch(mesh, batch)


def compile_step(config: Config, machine: Machine) -> Compiled:
    """Compile the training step that `python -m stickjax.train` would run for a config, for the devices of a machine.

    The step is not executed. Raise ValueError if `make_mesh` cannot make the mesh.
    """
    begun = time.perf_counter()
    mesh, device = make_mesh(config, machine), machine.devices[0]
    state, batch = abstract_arguments(config, mesh, device)
    with tracing_for(device), dispatch.recorded() as choices:
        traced = jit_step(config, mesh, state).trace(state, batch)
        lowered = traced.lower(lowering_platforms=machine.platforms)
    # The step never runs, so its machine code need not be fast. The lowest optimization level of the backend does not
    # change its memory and collectives.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    memory = compiled.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        config=config,
        mesh=mesh,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes + kept + memory.temp_size_in_bytes,
        state=state_parts(state),
        work=count(traced.jaxpr),
        collectives=collectives(compiled.as_text(), mesh, machine.per_host),
        kernels=tuple(choices),
        seconds=time.perf_counter() - begun,
    )


def virtual_devices(number: int) -> None:
    """Give this process at least `number` virtual CPU devices.

    If JAX has already initialised its devices, this function does nothing.
    """
    try:
        jax.config.update("jax_num_cpu_devices", max(number, jax.config.jax_num_cpu_devices))
    except RuntimeError:
        return
