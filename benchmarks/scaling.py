"""python -m benchmarks.scaling [--devices 8 64] [--json]: the cost of a training step on many H200s, as a table.

The table is in docs/guides/planning.md. `stickjax.plan` compiles each step for GPUs that this machine does not have,
with the mesh and the microbatches of LAYOUTS. --json also writes benchmarks/results/h200-scaling.json. The command
needs the CUDA wheels but no GPU. A row takes one or two minutes.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

import jax

from stickjax.config.command_line import load_config
from stickjax.parallel.chips import chip
from stickjax.plan.aot import absent_machine, compile_step
from stickjax.plan.estimate import ASSUMPTIONS
from stickjax.plan.report import as_dict, gib, mesh_words

ROOT = Path(__file__).parents[1]
# {config: {number of GPUs: changes to the config}}. The mesh axis with the most communication stays within a host:
# `expert` for the large model and `fsdp` for the small one. A host has 8 GPUs. The small model uses `fsdp` only on more
# than one host, where the reduction of whole gradients between hosts would take too long.
LAYOUTS = {
    "powermoe_3b": {
        8: {"mesh.data": 8, "train.accumulate": 32},
        64: {"mesh.data": 8, "mesh.fsdp": 8, "train.accumulate": 4},
        512: {"mesh.data": 64, "mesh.fsdp": 8},
        4096: {"mesh.data": 512, "mesh.fsdp": 8, "data.B": 4096},
    },
    "powermoe_100b": {
        8: {"mesh.expert": 8, "train.accumulate": 128},
        64: {"mesh.fsdp": 8, "mesh.expert": 8, "train.accumulate": 4},
        512: {"mesh.fsdp": 64, "mesh.expert": 8},
        4096: {"mesh.data": 8, "mesh.fsdp": 64, "mesh.expert": 8, "data.B": 8192},
    },
}
HEAD = ("model", "GPUs", "mesh", "sequences", "arguments", "temporaries", "peak", "fits", "sent", "MFU")


def row(name: str, devices: int) -> dict:
    """Compile the training step of a config for `devices` GPUs. Return its memory, its collectives and its MFU.

    `name`: the name of the config, a key of LAYOUTS. The result is a dictionary for JSON.
    """
    config = load_config(str(ROOT / "configs" / f"{name}.py")).replace(LAYOUTS[name][devices])
    machine = absent_machine(chip("h200"), devices, devices // 8)
    found = as_dict(compile_step(config, machine), machine)
    return {"config": name, "B": config.data.B, "accumulate": config.train.accumulate} | found


def markdown(rows: list[dict]) -> str:
    """Return the results of `row` as the Markdown table in docs/guides/planning.md."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for r in rows:
        sizes = [gib(r["bytes"][key]) for key in ("arguments", "temporaries", "peak")]
        sent = [f"{gib(c['sent'])} {c['kind']} ({', '.join(c['axes'])})" for c in r["collectives"] if c["sent"] > 2**26]
        share = f"{r['mfu']['serial']:.0%} to {r['mfu']['overlapped']:.0%}"
        batch = f"{r['accumulate']} x {r['B'] // r['accumulate']}"
        fits = "yes" if r["fits"] else "no"
        lines.append((r["config"], r["devices"], mesh_words(r["mesh"]), batch, *sizes, fits, "; ".join(sent), share))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n\n")[0])
    numbers = (8, 64, 512, 4096)
    parser.add_argument(
        "--devices", type=int, nargs="+", choices=numbers, default=numbers, help="numbers of GPUs (default: all)"
    )
    parser.add_argument("--config", nargs="+", choices=LAYOUTS, default=tuple(LAYOUTS), help="configs (default: all)")
    parser.add_argument("--json", action="store_true", help="also write benchmarks/results/h200-scaling.json")
    words = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    try:
        rows = [row(name, devices) for name in words.config for devices in words.devices]
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(markdown(rows))
    print("\n".join(f"- {assumption}" for assumption in ASSUMPTIONS))
    if words.json:
        info = {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "rows": rows}
        (ROOT / "benchmarks" / "results" / "h200-scaling.json").write_text(json.dumps(info, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
