"""Functions that measure the time of calls.

`interleave` compares several calls, the contestants. The contestants take turns, so that other work on the machine
slows all of them equally. `rotating` measures one call alone, on a device that queues calls, such as a GPU.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .cost import Ceilings, matmul


class Times(NamedTuple):
    """The measured times of one call, in milliseconds."""

    rounds: np.ndarray  # one time per round, in the order of the rounds

    @property
    def median(self) -> float:
        return float(np.median(self.rounds))

    @property
    def best(self) -> float:
        return float(np.min(self.rounds))

    def over(self, other: "Times") -> float:
        """Return the ratio of these times to the times of `other`, which were measured in the same rounds.

        The result is the median over the ratios of all rounds. Within a round, the load of the machine is about the
        same for both calls, so it cancels out.
        """
        return float(np.median(self.rounds / other.rounds))


def interleave(
    contestants: dict[str, Callable[[], Any]], *, seconds: float = 3.0, least: int = 5, block=jax.block_until_ready
) -> dict[str, Times]:
    """Measure the time of several calls, the contestants, and return {name: its times}. The contestants take turns.

    First, two rounds warm up the contestants. The measured rounds take about `seconds` together, and there are at least
    `least` rounds. Every second round is in reverse order, so that no contestant always runs after the same contestant.
    `block(result)` waits until the result of a call is computed.
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
    """Measure the time of a call of `function` on a device that queues calls, such as a GPU.

    Each round queues several calls, which usually take about 20 ms together, and waits only for the result of the last
    call. So the launch of a call from Python overlaps with the execution of earlier calls. The recorded time is the
    time of the round divided by its number of calls. If a call is shorter than its launch (about 20 us), `function`
    must repeat the work inside one compiled program.

    `sets`: sets of arguments, which the calls use in turn. If all sets together are larger than the cache, no call
    finds its inputs in the cache. `seconds`: how long to measure. `least`: the smallest number of rounds.
    `block(result)` waits until the result of a call is computed.
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


_SAMPLE = 0.02  # how many seconds the queued calls of a round should take together


def forward_backward(function: Callable, **options) -> Callable:
    """Return a jitted function `(cotangent, *arguments) -> (output, gradients)` that runs both passes of `function`.

    `options`: keyword arguments of jax.jit.
    """

    def run(cotangent, *arguments):
        output, vjp = jax.vjp(function, *arguments)
        return output, vjp(cotangent)

    return jax.jit(run, **options)


def ceilings(size: int, dtype, copied: int, *, seconds: float = 1.0, queued: bool = False) -> Ceilings:
    """Measure the speed of the machine: FLOP/s and bytes/s. An op cannot be faster than this speed permits.

    A product of [size, size] matrices of type `dtype` gives the FLOP/s. The bytes/s come from a pass that reads
    `copied` bytes and writes `copied` bytes. `seconds`: how long to measure. `queued`: do not wait after every call;
    use this for a device that queues calls.
    """
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    x = jax.random.normal(jax.random.key(1), (copied // 4,), jnp.float32)
    # The addition works in place: on a CPU, page faults for a new output would cost more than the memory traffic.
    product, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1, donate_argnums=0)

    def pass_over():
        nonlocal x
        x = add(x)
        return x

    # The best of many rounds counts: while another job runs, the machine seems slower than it is.
    runs = {"product": lambda: product(a, b), "copy": pass_over}
    if queued:
        times = {name: rotating(run, [()], seconds=seconds / 2) for name, run in runs.items()}
    else:
        times = interleave(runs, seconds=seconds)
    seconds_of = {name: t.best / 1e3 for name, t in times.items()}
    return Ceilings(matmul(size, size, size).flops / seconds_of["product"], 2 * x.nbytes / seconds_of["copy"])
