"""The time of a training step of three models: configs/tiny.py, its softmax variant, and GraniteMoe in torch.

GraniteMoe is a model of Hugging Face; here it has the same sizes. It may need another Python environment, so it runs in
another process (`torch_peer --serve`), which takes turns with this process. `torch_python` says which Python runs it.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from configs import tiny
from stickjax.config import Config
from stickjax.data.batches import make_batch
from stickjax.models.families import family_of
from stickjax.training.step import init_state, make_step

from .cost import Ceilings
from .report import Row
from .timing import interleave

PART = "train"
# {attention: the lowest allowed value of our tokens/s divided by torch's tokens/s}. The value for stick-breaking is
# lower, because it does more work per score than softmax, and torch runs softmax.
GOALS = {"softmax": 0.8, "stick_breaking": 0.7}
ROOT = Path(__file__).parents[1]


class TorchPeer:
    """The torch model in another process. A call of this object makes one training step there and waits for its end.

    `python`: the path of a Python that has torch and transformers. `shape`: {letter: size}, the arguments of the
    function `stepper` in `program`. `program`: the module to run, which must have the option --serve.
    """

    def __init__(self, python: str, shape: dict, program: str = "benchmarks.torch_peer"):
        command = [python, "-m", program, "--serve", "--shape", json.dumps(shape)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1, cwd=ROOT)
        self.versions = self._line()

    def __call__(self) -> None:
        self.process.stdin.write("step\n")
        self.last = self._line()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the torch process ended with exit code {self.process.wait()}; see its error above")
        return line.strip()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def torch_python() -> str | None:
    """Return the path of a Python that should have torch and transformers, or None if there is no such path.

    These places are tried in turn: the path in the environment variable TORCH_PYTHON, the Python of this process if it
    has both packages, and `.peers/bin/python`. Only the Python of this process is checked for the packages.
    """
    if named := os.environ.get("TORCH_PYTHON"):
        return named
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return sys.executable
    peers = ROOT / ".peers" / "bin" / "python"
    return str(peers) if peers.exists() else None


def peer_sizes(config: Config) -> dict[str, int]:
    """Return {letter: size}, the arguments of `torch_peer.stepper` for a torch model with the sizes of `config`."""
    m, data = config.model, config.data
    sizes = {letter: getattr(m, letter) for letter in "DLNKHF"}
    return sizes | dict(V=m.vocabulary, E=m.experts.E, k=m.experts.k, B=data.B, T=data.T)


def stepper(config: Config):
    """Return a function that makes one training step of a new model and returns the metrics.

    Every step uses the same random batch. The function keeps the training state and donates it to the next step.
    """
    step = jax.jit(make_step(config), donate_argnums=0)
    state = jax.jit(lambda: init_state(config, jax.random.key(0)))()
    eot = config.model.vocabulary - 1
    windows = np.random.default_rng(0).integers(0, config.model.vocabulary, (config.data.B, config.data.T + 1))
    batch = jax.device_put(make_batch(windows, eot))

    def run():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return run


def rows(ceilings: Ceilings, *, quick: bool = False):
    config = tiny.get_config()
    if quick:
        small = {"model.L": 1, "model.D": 16, "model.F": 16, "model.H": 8, "data.B": 2, "data.T": 32}
        config = config.replace(small | {"optim.warmup_tokens": 0, "optim.decay_tokens": 0})
    m, tokens = config.model, config.data.tokens_per_step
    contestants = {name: stepper(config.replace({"model.attention": name})) for name in GOALS}
    with contextlib.ExitStack() as stack:
        python, versions = torch_python(), ""
        if python:
            peer = contestants["torch GraniteMoe"] = TorchPeer(python, peer_sizes(config))
            versions = peer.versions
            stack.callback(peer.close)
        times = interleave(contestants, seconds=0.2 if quick else 40.0, least=3 if quick else 15)
    case = f"B={config.data.B} T={config.data.T} D={m.D} L={m.L} E={m.experts.E} k={m.experts.k}"
    torch = times.get("torch GraniteMoe")
    for name, t in times.items():
        extra = {"tokens/s": 1e3 * tokens / t.median, "best tokens/s": 1e3 * tokens / t.best}
        if name in GOALS and torch:
            # The ratio compares the best rounds. Torch's threads wait for their slowest thread, so another job on the
            # machine slows torch much more than XLA, and a ratio of the medians would favour XLA.
            extra |= {"ratio of": "best tokens/s", "of medians": torch.over(t)}
            bound = dict(against="torch GraniteMoe", at_least=GOALS[name])
            yield Row.timed(PART, case, name, t, ratio=torch.best / t.best, **bound, extra=extra)
        else:
            yield Row.timed(PART, case, name, t, extra=extra | ({} if name in GOALS else {"with": versions}))
    yield Row(
        PART, case, "limit: compute", 1e3 * tokens * family_of(m).flops_per_token(m, config.data.T) / ceilings.flops
    )
