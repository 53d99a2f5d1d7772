"""Measure the time and memory of a training step of Ordered Memory in stickjax and in the original torch code.

The original code runs in a separate process (`benchmarks.torch_ordered_memory`), and the two programs take turns. The
original code needs a clone of its repository in .peers/Ordered-Memory, and a Python with torch, which
`benchmarks.train.torch_python` finds. If one of them is missing, only stickjax is measured.
"""

import contextlib

import jax
import numpy as np

from stickjax.config import Config, OrderedMemoryConfig
from stickjax.models.families import family_of
from stickjax.training.step import init_state, make_step

from .cost import Ceilings
from .report import Row
from .timing import interleave
from .train import ROOT, TorchPeer, torch_python

PART = "ordered_memory"
GOAL = 1.5  # stickjax must be faster than the original by at least this factor
DROPOUT = 0.2
ORIGINAL = ROOT / ".peers" / "Ordered-Memory" / "ordered_memory.py"


def stepper(config: Config, batch: dict):
    """Return (a function that makes one training step on `batch`, the bytes of memory of the step).

    The bytes are the sum of the arguments, the results and the temporaries of the compiled step.
    """
    state = jax.jit(lambda: init_state(config, jax.random.key(0)))()
    step = jax.jit(make_step(config), donate_argnums=0).lower(state, batch).compile()
    memory = step.memory_analysis()

    def run():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return run, memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def rows(ceilings: Ceilings, *, quick: bool = False):
    sizes = dict(V=12, D=8, H=8, N=3, classes=7) if quick else dict(V=12, D=128, H=128, N=12, classes=7)
    B, T = (2, 5) if quick else (128, 40)
    rates = dict.fromkeys(("cell_dropout", "memory_dropout", "input_dropout", "output_dropout"), DROPOUT)
    model = OrderedMemoryConfig(**sizes, **rates)
    config = Config(model).replace({"data.B": B, "data.T": T, "data.source": "logic", "optim.schedule": "constant"})
    rng = np.random.default_rng(0)
    batch = {side: rng.integers(1, 12, (B, T)).astype(np.int32) for side in ("left", "right")}
    batch["label"] = rng.integers(0, 7, B).astype(np.int32)
    run, memory = stepper(config, jax.device_put(batch))
    contestants, case = {"stickjax": run}, f"B={B} pairs T={T} H={model.H} N={model.N}"
    with contextlib.ExitStack() as stack:
        python, peer = torch_python(), None
        if python and ORIGINAL.exists():
            peer = TorchPeer(python, sizes | dict(B=B, T=T, dropout=DROPOUT), "benchmarks.torch_ordered_memory")
            contestants["torch original"] = peer
            stack.callback(peer.close)
        times = interleave(contestants, seconds=0.2 if quick else 60.0, least=2 if quick else 5)
    extra = {"memory (MB)": memory / 1e6}
    if peer is None:
        yield Row.timed(PART, case, "stickjax", times["stickjax"], extra=extra)
    else:
        torch = times["torch original"]
        ratio = torch.best / times["stickjax"].best
        bound = dict(against="torch original", at_least=GOAL)
        yield Row.timed(PART, case, "stickjax", times["stickjax"], ratio=ratio, **bound, extra=extra)
        more = {"memory (MB)": int(peer.last.split()[1]) / 1e6, "with": peer.versions}
        yield Row.timed(PART, case, "torch original", torch, extra=more)
    flops = B * T * family_of(model).flops_per_token(model, T)
    yield Row(PART, case, "limit: compute", 1e3 * flops / ceilings.flops)
