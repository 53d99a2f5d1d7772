"""Print the report of a plan: the numbers of one compiled step with its estimated time, or a table of several steps."""

import json
from collections import defaultdict

from rich.console import Console
from rich.table import Table

from stickjax.config import Config
from stickjax.models.families import family_of
from stickjax.models.vocabulary_size import with_vocabulary
from stickjax.plan import estimate
from stickjax.plan.aot import Compiled, Machine, compile_step, present_machine
from stickjax.plan.search import nearest_changes, sweep
from stickjax.system.memory import gib


def by_axes(compiled: Compiled) -> list[dict]:
    """Group the collectives of a step by `kind`, mesh `axes` and `local`. Return a dictionary for each group.

    The dictionary has `kind`, `axes` and `local` (whether the collectives stay within a host), and three sums over the
    group: `count` is how often the collectives run in a step, `bytes` is their size on one device, added up over all
    these runs, and `sent` is the number of bytes that one device sends in a step. The group with the largest `sent`
    comes first.
    """
    groups = defaultdict(lambda: dict(count=0.0, bytes=0.0, sent=0.0))
    for c in compiled.collectives:
        group = groups[c.kind, c.axes, c.local]
        group["count"] += c.count
        group["bytes"] += c.bytes * c.count
        group["sent"] += c.sent * c.count
    rows = [dict(kind=kind, axes=list(axes), local=local, **sums) for (kind, axes, local), sums in groups.items()]
    return sorted(rows, key=lambda row: -row["sent"])


def mesh_words(axes: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "one device"


def as_dict(compiled: Compiled, machine: Machine) -> dict:
    """Return all numbers of the report on a compiled step as a dictionary that can be stored as JSON.

    Sizes are in bytes, times in seconds. If the GPU model of `machine` is known, the estimated times are included.
    """
    total, active = family_of(compiled.config.model).parameter_counts(compiled.config.model)
    found = dict(
        machine=machine.description,
        devices=compiled.devices,
        hosts=machine.hosts,
        mesh=compiled.axes,
        parameters=total,
        active_parameters=active,
        bytes=dict(
            arguments=compiled.arguments, temporaries=compiled.temporaries, peak=compiled.peak, state=compiled.state
        ),
        memory=machine.memory,
        fits=estimate.fits(compiled, machine.memory),
        flops=compiled.work.flops,
        model_flops=estimate.model_flops(compiled),
        traffic=compiled.work.bytes,
        unknown_loops=compiled.work.unknown,
        collectives=by_axes(compiled),
        kernels=[str(choice) for choice in compiled.kernels],
        compile_seconds=compiled.seconds,
        assumptions=list(estimate.ASSUMPTIONS),
    )
    if machine.chip is not None:
        times = estimate.estimate(compiled, machine.chip)
        found["seconds"] = times._asdict() | dict(overlapped=times.overlapped, serial=times.serial)
        found["mfu"] = {
            name: estimate.mfu(compiled, machine.chip, found["seconds"][name]) for name in ("overlapped", "serial")
        }
    return found


def memory_words(compiled: Compiled, machine: Machine) -> str:
    parts = f"{gib(compiled.arguments)} arguments + {gib(compiled.temporaries)} temporaries, peak {gib(compiled.peak)}"
    if machine.memory is None:
        return parts
    verdict = "fits" if estimate.fits(compiled, machine.memory) else "does NOT fit"
    return f"{parts} of {gib(machine.memory)}: {verdict}"


def time_words(compiled: Compiled, machine: Machine) -> str:
    t = estimate.estimate(compiled, machine.chip)
    best, worst = (estimate.mfu(compiled, machine.chip, s) for s in (t.overlapped, t.serial))
    return (
        f"compute {t.compute:.3g} s, memory {t.memory:.3g} s, network {t.network:.3g} s: "
        f"{t.overlapped:.3g} s (MFU {best:.0%}) if all overlap, {t.serial:.3g} s (MFU {worst:.0%}) if nothing does"
    )


def print_step(compiled: Compiled, machine: Machine, changes: list[tuple[dict, Compiled]]) -> None:
    """Print the report of one compiled step.

    `changes`: pairs ({config field: value}, the step compiled with these values) for changes of the config that make
    the step fit into memory. `changes` is not used if the step fits already.
    """
    config, work = compiled.config, compiled.work
    total, active = family_of(config.model).parameter_counts(config.model)
    rows = config.data.B // config.train.accumulate
    print(f"machine       {machine.description}")
    print(f"mesh          {mesh_words(compiled.axes)}")
    print(f"parameters    {total:,} ({active:,} active per token, without the embedding)")
    print(f"step          B={config.data.B} x T={config.data.T}, "
          f"{config.train.accumulate} microbatches of {rows} sequences, remat={config.model.remat}")  # fmt: skip
    for choice in compiled.kernels:
        print(f"kernel        {choice}")
    print(f"memory        per device: {memory_words(compiled, machine)}")
    print(f"state         {', '.join(f'{name} {gib(size)}' for name, size in compiled.state.items())}")
    again = work.flops / estimate.model_flops(compiled)
    print(f"work          {work.flops:.3g} FLOP, {again:.2f} x the FLOP of the model; {gib(work.bytes)} memory traffic")
    if work.unknown:
        print(f"              {work.unknown} loops of unknown length count as one pass each")
    for row in by_axes(compiled):
        where = "within hosts" if row["local"] else "between hosts"
        print(f"collective    {row['kind']} over {' and '.join(row['axes']) or 'no mesh axis'}, {where}: "
              f"{row['count']:,.0f} runs per step, {gib(row['sent'])} sent by each device")  # fmt: skip
    if not compiled.collectives:
        print("collective    none")
    if machine.chip is not None:
        print(f"time          {time_words(compiled, machine)}")
    else:
        print("time          not estimated: the speed of this device is not known")
    print(f"compiled in   {compiled.seconds:.0f} s")
    if not estimate.fits(compiled, machine.memory):
        for changed, other in changes:
            words = " ".join(f"--{key}={value}" for key, value in changed.items())
            print(f"would fit     {words}: peak {gib(other.peak)}; {time_words(other, machine)}")
        if compiled.arguments > estimate.MEMORY_SHARE * machine.memory:
            print("would fit     no change of remat or microbatches: state and batch alone take too much memory")
        elif not changes:
            print("would fit     nothing that was tried: more remat, smaller microbatches, a larger mesh.fsdp")
    for assumption in estimate.ASSUMPTIONS if machine.chip is not None else ():
        print(f"assumed       {assumption}")


def print_sweep(steps: list[Compiled], left_out: list, machine: Machine) -> None:
    """Print a table of compiled steps on different meshes, the fastest step first.

    The steps are compared by their estimated times without overlap (`Estimate.serial`).
    `left_out`: the configs with the meshes for which no step was compiled. The first six of these meshes are printed
    below the table.
    """
    table = Table(title=machine.description)
    for column in ("mesh", "arguments", "temporaries", "peak", "fits", "sent", "overlapped", "serial", "MFU"):
        table.add_column(column, justify="left" if column == "mesh" else "right")
    for step in sorted(steps, key=lambda s: estimate.estimate(s, machine.chip).serial):
        t = estimate.estimate(step, machine.chip)
        share = " to ".join(f"{estimate.mfu(step, machine.chip, s):.0%}" for s in (t.serial, t.overlapped))
        sizes = (gib(n) for n in (step.arguments, step.temporaries, step.peak))
        sent = gib(sum(c.sent * c.count for c in step.collectives))
        fits = "yes" if estimate.fits(step, machine.memory) else "no"
        table.add_row(mesh_words(step.axes), *sizes, fits, sent, f"{t.overlapped:.3g} s", f"{t.serial:.3g} s", share)
    Console(width=140).print(table)
    if left_out:
        names = [mesh_words(config.to_dict()["mesh"]) for config in left_out]
        print(f"not compiled: {len(names)} more meshes ({'; '.join(names[:6])}{'; ...' if len(names) > 6 else ''})")
    for assumption in estimate.ASSUMPTIONS:
        print(f"assumed: {assumption}")


def show(config: Config, machine: Machine, *, as_json: bool = False, swept: bool = False) -> None:
    """Compile the step of a config for a machine, and print the report.

    If the step does not fit into memory, the report also has changes of the config that make it fit. With `swept`, the
    report is a table that compares several meshes. `as_json`: print JSON. Raise ValueError if the mesh cannot shard the
    batch and the model evenly.
    """
    config = with_vocabulary(config, devices=machine.devices)
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
    """Compile the training step of a config for the devices that are present, and print the report.

    The step does not run, and no file is written.
    """
    show(config, present_machine())
