"""Functions that time calls. Contestants take turns, so that another job on the machine slows all of them alike."""

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
        """Return the ratio of these times to the times of `other`.

        It is the median of the ratios of each round, because both contestants had the same load in the same round.
        """
        return float(np.median(self.rounds / other.rounds))


def interleave(
    contestants: dict[str, Callable[[], Any]], *, seconds: float = 3.0, least: int = 5, block=jax.block_until_ready
) -> dict[str, Times]:
    """Time the contestants in turn for about `seconds`, but at least `least` rounds, after two rounds to warm up.

    Every second round runs in reverse order, so that no contestant always runs right after the same other one.
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
    """Time calls on an asynchronous device, which runs calls in the order in which they were queued.

    A sample queues several calls, some milliseconds together, and waits for the last one. Their launch from Python so
    overlaps with their execution. The calls use the sets of inputs in turn. If all sets together are larger than the
    cache, no call finds its inputs in the cache. A call that is shorter than its launch (about 20 us) must be repeated
    inside one compiled function.
    """

    def queue(calls: int) -> float:
        begun = time.perf_counter()
        for i in range(calls):
            output = function(*sets[i % len(sets)])  # the previous output is freed as soon as it is computed
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
    """Return the function `(cotangent, *arguments) -> (output, gradients)`, jitted with these options."""

    def run(cotangent, *arguments):
        output, vjp = jax.vjp(function, *arguments)
        return output, vjp(cotangent)

    return jax.jit(run, **options)


def ceilings(size: int, dtype, copied: int, *, seconds: float = 1.0, queued: bool = False) -> Ceilings:
    """Measure the machine's speed: a product of [size, size] matrices, and a pass that reads and writes `copied` bytes.

    `queued`: do not wait after every call; for an asynchronous device.
    """
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    x = jax.random.normal(jax.random.key(1), (copied // 4,), jnp.float32)
    # The addition works in place: on a CPU, page faults for a new output would cost more than the memory traffic.
    product, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1, donate_argnums=0)

    def pass_over():
        nonlocal x
        x = add(x)
        return x

    # The best of many rounds counts: a time that was measured while another job ran would not be a limit.
    runs = {"product": lambda: product(a, b), "copy": pass_over}
    if queued:
        times = {name: rotating(run, [()], seconds=seconds / 2) for name, run in runs.items()}
    else:
        times = interleave(runs, seconds=seconds)
    seconds_of = {name: t.best / 1e3 for name, t in times.items()}
    return Ceilings(matmul(size, size, size).flops / seconds_of["product"], 2 * x.nbytes / seconds_of["copy"])
