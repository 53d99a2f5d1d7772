"""python -m benchmarks.kill [--kills 20] [--seed 0] [--out DIR]: test that a killed training continues bit for bit.

A small model is trained twice for 60 steps, with a checkpoint every 5 steps. SIGKILL ends the second training at random
moments, sometimes while it starts, and each time the same command starts it again. At the end, both runs must have
bitwise equal training states. Their metrics must be equal too, except for metrics that depend on the clock.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from stickjax.config import Config
from stickjax.config.command import Parser, command
from stickjax.storage.checkpoints import Checkpoints, named_leaves
from stickjax.training.metrics import read_metrics
from stickjax.training.step import init_state

# The config uses all features that keep a state: sampled routing, the router's bias, accumulation, packed documents.
CONFIG = Config().replace(
    {
        "model.V": 257, "model.D": 16, "model.L": 2, "model.N": 2, "model.K": 1, "model.H": 8, "model.F": 16,
        "model.experts.E": 4, "model.experts.k": 2, "model.experts.sample_topk": 1,
        "model.experts.bias_rate": 0.01, "model.experts.z_weight": 0.001,
        "data.source": "listops", "data.examples": 2000, "data.T": 32, "data.B": 4, "train.accumulate": 2,
        "train.steps": 60, "train.log_every": 1, "train.checkpoint_every": 5, "optim.peak_lr": 0.01,
    }
)  # fmt: skip
START = 3  # in the first seconds after its start, a training has not made a step yet
CLOCK = ("tokens_per_second", "mfu")  # the metrics that depend on the clock


class Training:
    """A new process that runs the training command with the config in `folder` and the run folder `folder / run`."""

    def __init__(self, folder: Path, run: str):
        command = [sys.executable, "-m", "stickjax.train", str(folder / "config.json"), "--run", str(folder / run)]
        # With a compilation cache, a training starts quickly, so that fewer kills happen during the compilation.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | cache)

    def until(self, step: int) -> int:
        """Wait until the training prints `step` or a later step, or ends. Return the last printed step, 0 if none."""
        said = 0
        for line in self.process.stdout:
            if line.startswith("step ") and "/" in line.split()[1]:
                said = int(line.split()[1].partition("/")[0])
                if said >= step:
                    break
        return said

    def finish(self) -> None:
        self.process.communicate()
        if self.process.returncode:
            raise ValueError(f"the training failed with exit code {self.process.returncode}; see its error above")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def differences(one: Path, other: Path) -> list[str]:
    """Compare two run folders bit for bit. Return a list with a text for each difference.

    Two things are compared: the metrics of every step, except the metrics in CLOCK, which depend on the time, and all
    arrays of the last training state.
    """
    logs = [[{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(run)] for run in (one, other)]
    found = [f"step {i}: {rows}" for i, rows in enumerate(zip(*logs, strict=False), 1) if rows[0] != rows[1]]
    if len(logs[0]) != len(logs[1]):
        found.append(f"the runs have {len(logs[0])} and {len(logs[1])} rows of metrics")
    abstract = jax.eval_shape(lambda: init_state(CONFIG, jax.random.key(0)))
    states = [Checkpoints(run).restore(abstract, step=CONFIG.train.steps).state for run in (one, other)]
    for (name, a), b in zip(named_leaves(states[0]).items(), named_leaves(states[1]).values(), strict=True):
        a, b = (jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            found.append(name)
    return found


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.kill", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how often to kill the training (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default 0)")
    parser.add_argument("--out", help="new folder for both runs (default: a temporary folder, which is kept)")
    words = parser.parse_args(argv)
    folder = Path(words.out or tempfile.mkdtemp(prefix="stickjax-kill-"))
    folder.mkdir(parents=True, exist_ok=words.out is None)
    (folder / "config.json").write_text(CONFIG.to_json())
    rng, steps = random.Random(words.seed), CONFIG.train.steps
    begun = time.monotonic()
    Training(folder, "whole").finish()
    print(f"without interruption: {steps} steps in {time.monotonic() - begun:.0f} s, including compilation", flush=True)
    moments = sorted(rng.uniform(0, steps) for _ in range(words.kills))
    for number, moment in enumerate(moments, 1):
        training = Training(folder, "killed")
        if rng.random() < 0.3:
            delay = rng.uniform(0, START)
            time.sleep(delay)
            where = f"{delay:.2f} s after the start"
        else:
            step = training.until(max(1, int(moment)))
            delay = rng.uniform(0, 0.02)
            time.sleep(delay)
            where = f"{1000 * delay:.0f} ms after step {step}"
        training.kill()
        left = Checkpoints(folder / "killed").steps()
        print(f"kill {number} of {words.kills}: {where}; steps with a checkpoint: {left or 'none'}", flush=True)
    Training(folder, "killed").finish()
    found = differences(folder / "whole", folder / "killed")
    for line in found:
        print(f"differs: {line}")
    count = len(jax.tree.leaves(jax.eval_shape(lambda: init_state(CONFIG, jax.random.key(0)))))
    equal = "NOT bitwise equal" if found else "bitwise equal"
    print(f"the runs are {equal}: {steps} rows of metrics and {count} arrays of the training state were compared")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
