"""Time of a call. Contestants take turns, so that another job on the machine slows all of them alike."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .cost import Ceilings, matmul


class Times(NamedTuple):
    """Milliseconds of every round, in the order of the rounds."""

    rounds: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(self.rounds))

    @property
    def best(self) -> float:
        return float(np.min(self.rounds))

    def over(self, other: "Times") -> float:
        """How many times as long as `other`: the median over rounds, whose two halves met the same load."""
        return float(np.median(self.rounds / other.rounds))


def interleave(
    contestants: dict[str, Callable[[], Any]], *, seconds: float = 3.0, least: int = 5, block=jax.block_until_ready
) -> dict[str, Times]:
    """Run the contestants round-robin for about `seconds`, `least` rounds at least, after two rounds to warm up.

    Every second round goes backwards, so that nobody always runs right after the same neighbour.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(2):
        for run in contestants.values():
            block(run())
    end, i = time.perf_counter() + seconds, 0
    while i < least or time.perf_counter() < end:
        for name in list(contestants)[:: -1 if i % 2 else 1]:
            begun = time.perf_counter()
            block(contestants[name]())
            samples[name].append(1e3 * (time.perf_counter() - begun))
        i += 1
    return {name: Times(np.array(values)) for name, values in samples.items()}


def rotating(
    function: Callable, sets: Sequence[tuple], *, seconds: float = 1.0, least: int = 5, block=jax.block_until_ready
) -> Times:
    """Milliseconds of one call on an asynchronous device, whose calls run in the order they were queued.

    A sample queues calls that take some milliseconds together and waits for the last, so that launching them from
    Python overlaps with their running. The sets of inputs take turns: together larger than the cache, no call finds its
    inputs there. A call shorter than its own launch, some 20 us, must be repeated inside of one compiled function.
    """

    def queue(calls: int) -> float:
        begun = time.perf_counter()
        for i in range(calls):
            output = function(*sets[i % len(sets)])  # the one before is freed as soon as it is computed
        block(output)
        return time.perf_counter() - begun

    queue(len(sets))  # compiles
    turns = int(np.clip(_SAMPLE / queue(len(sets)), 1, 32))
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < least or time.perf_counter() < end:
        samples.append(1e3 * queue(turns * len(sets)) / (turns * len(sets)))
    return Times(np.array(samples))


_SAMPLE = 0.02  # seconds


def forward_backward(function: Callable, **options) -> Callable:
    """`(cotangent, *arguments) -> (output, gradients)`, jitted with these options."""

    def run(cotangent, *arguments):
        output, vjp = jax.vjp(function, *arguments)
        return output, vjp(cotangent)

    return jax.jit(run, **options)


def ceilings(size: int, dtype, copied: int, *, seconds: float = 1.0, queued: bool = False) -> Ceilings:
    """Measured on random numbers: a product of [size, size], and a pass that reads and writes `copied` bytes.

    `queued` is for an asynchronous device: without the wait after every call.
    """
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    x = jax.random.normal(jax.random.key(1), (copied // 4,), jnp.float32)
    # In place: on a CPU a fresh output would cost more in page faults than in memory traffic.
    product, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1, donate_argnums=0)

    def pass_over():
        nonlocal x
        x = add(x)
        return x

    # The best of many: a limit that was taken while another job ran would be no limit.
    runs = {"product": lambda: product(a, b), "copy": pass_over}
    if queued:
        times = {name: rotating(run, [()], seconds=seconds / 2) for name, run in runs.items()}
    else:
        times = interleave(runs, seconds=seconds)
    seconds_of = {name: t.best / 1e3 for name, t in times.items()}
    return Ceilings(matmul(size, size, size).flops / seconds_of["product"], 2 * x.nbytes / seconds_of["copy"])
