"""Plan a training run: the time and memory of its step on GPUs that need not be present.

python -m stickjax.plan configs/powermoe_3b.py --gpu h200 --devices 64 [--sweep] [--json] [--section.field=value ...]

The command compiles the training step ahead of time. It prints the numbers of parameters, bytes and floating-point
operations, the collectives and an estimated time. If the step does not fit into memory, the command also prints the
smallest changes of the config that make it fit, and compiles the changed steps too. If the CUDA wheels are installed,
the step is compiled for the GPUs, otherwise for virtual CPU devices. If neither the config nor an option sets a mesh
axis, the plan uses --mesh.fsdp=-1: all devices along the axis "fsdp".
"""

import os
import sys

import jax

from stickjax.config import Config
from stickjax.config.command import Parser, command, number
from stickjax.config.command_line import describe, load_config, parse
from stickjax.parallel.chips import CHIPS, chip, has_wheels
from stickjax.plan.aot import absent_machine, virtual_devices
from stickjax.plan.report import show
from stickjax.plan.search import SWEPT


def _hosts(devices: int) -> int:
    """Return the smallest number of hosts among which `devices` can be divided evenly, with at most 8 devices each."""
    return next(hosts for hosts in range(max(1, -(-devices // 8)), max(1, devices) + 1) if devices % hosts == 0)


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m stickjax.plan", add_help=False)
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a name such as tiny, a .py file, a config.json")
    parser.add_argument("--gpu", default="h200", help=f"one of {', '.join(CHIPS)}; h200 by default")
    parser.add_argument("--devices", type=number(int, at_least=1), default=8, help="number of GPUs; 8 by default")
    parser.add_argument("--hosts", type=number(int, at_least=1), help="number of hosts; one per 8 GPUs by default")
    parser.add_argument("--sweep", action="store_true", help=f"compare at most {SWEPT} meshes")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("-h", "--help", action="store_true")
    words, rest = parser.parse_with_fields(argv)
    config = Config() if words.config is None else load_config(words.config)
    if words.help:
        print(f"{parser.format_help()}\nconfig fields, with their values here:\n{describe(config)}")
        return 0
    if words.config is None:
        raise ValueError(
            "CONFIG is missing: name a config, for example python -m stickjax.plan powermoe_3b --devices 64"
        )
    config = parse(config, rest)
    gpu = chip(words.gpu)
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # a plan does not use the GPUs of this machine
    if not has_wheels():
        virtual_devices(words.devices)
    machine = absent_machine(gpu, words.devices, words.hosts or _hosts(words.devices))
    if not words.sweep and not any(word.startswith("--mesh.") for word in rest) and config.mesh == Config().mesh:
        config = config.replace({"mesh.fsdp": -1})
    show(config, machine, as_json=words.json, swept=words.sweep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
