"""The time of one decode step of attention on a GPU: one query per sequence, and a long cache of keys and values.

Without `skip_below`, a step takes at least the time to read the cache from memory.
"""

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import stick_breaking_attention

from . import gpu_check, gpu_peers, trained_logits
from .gpu_attention import contestant
from .gpu_run import Run
from .timing import rotating
from .trained_logits import SKIP

PART, CHECKS = "stick_breaking decode", "stick_breaking checks at size"
PEERS = ("cudnn softmax",)
SHAPES = [dict(B=B, N=32, K=8, H=128) for B in (8, 1, 64)]
QUICK = [dict(B=2, N=4, K=2, H=32)]
LENGTHS = (32768, 4096)
QUICK_LENGTHS = (200, 100)
STEPS = 16
# Total bytes of all caches of keys and values. The steps use these caches in turn. With skip_below, a step reads only a
# small part of a cache. Even this part must not stay in the L2 cache of the GPU until the cache is used again.
CACHES = 2**31


def steps(function: Callable) -> Callable:
    """Return a jitted function `(query, *caches) -> query` that makes STEPS decode steps and uses the caches in turn.

    `function`: one decode step, (query, key, value) -> out. A cache is a pair (key, value).

    A call of a single step would measure the launch of the step, which takes longer than the step. Each query depends
    on the previous output, as in generation, so that the compiler cannot leave out or reorder a step.
    """

    def run(query, *caches):
        for i in range(STEPS):
            query = query + (1e-3 * function(query, *caches[i % len(caches)])).astype(query.dtype)
        return query

    return jax.jit(run)


def _step(implementation: str, S: int, **settings):
    """Return a function (query, key, value) -> (out, rem) that computes a decode step.

    All queries are at position S - 1. The positions are passed as an array with one number per sequence, as in
    generation. `settings`: further keyword arguments of stick_breaking_attention.
    """

    def run(query, key, value):
        offsets = jnp.full(query.shape[0], S - 1, jnp.int32)
        return stick_breaking_attention(
            query, key, value, query_offset=offsets, implementation=implementation, **settings
        )

    return run


def _check(f: Callable, reference: Callable, arrays) -> gpu_check.Errors:
    """Run the decode step `f` on all sequences, and compare its results with `reference` on the first two sequences.

    The reference makes fp32 copies of the keys and values for every query head. Copies for all sequences would not fit
    into memory.
    """
    expected = gpu_check.exact_forward(reference, [x[:2] for x in arrays])

    def look(results):
        return jax.tree.map(lambda x: x[:2], results[0]), None

    return gpu_check.errors(f, expected, None, arrays, look)


def rows(run: Run, shape: dict, kernels: tuple[str, ...], lengths: tuple[int, int] = LENGTHS) -> None:
    """Check and time the decode step of every kernel at every cache length, without and with `skip_below`.

    The rows are added to the record of `run`. With `skip_below`, the time should not depend on the cache length.
    """
    for S in lengths:
        name = "B{B} N{N} K{K} H{H} bf16 S{S}".format(**shape, S=S)
        size = 2 * 2 * shape["B"] * S * shape["K"] * shape["H"]  # bytes of K and V of one cache, bfloat16
        number = max(1, min(STEPS, CACHES // size))
        make = partial(trained_logits.inputs, T=1, S=S, **shape, dtype=jnp.bfloat16, heads=trained_logits.saved())
        sets = [make(jax.random.key(i)) for i in range(number)]
        query, caches = sets[0][0], [s[1:] for s in sets]
        for implementation, skip in itertools.product(kernels, (None, SKIP)):
            f, label = _step(implementation, S, skip_below=skip), contestant(implementation, skip)
            check = partial(_check, gpu_check.attended(f), gpu_check.attended(_step("reference", S)), sets[0])
            if not run.checked(CHECKS, f"decode {name}", label, jnp.bfloat16, check):
                continue
            kept = partial(_kept, implementation, S, skip, sets[0])
            _time(run, name, label, lambda *arrays, f=f: f(*arrays)[0], query, caches, size, kept)
        if kernels != ("xla",):  # plain JAX is not compared with cuDNN
            _time(run, name, PEERS[0], gpu_peers.softmax_step, query, caches, size, lambda: 1.0)
    for implementation in kernels:
        _against_lengths(run, shape, contestant(implementation, SKIP), lengths)


def _kept(implementation: str, S: int, skip: float | None, arrays) -> float:
    """Return the fraction of the key tiles that a decode step reads. It is 1 without `skip_below`."""
    if skip is None:
        return 1.0
    stats = jax.jit(_step(implementation, S, skip_below=skip, return_stats=True))(*arrays)[2]
    return float(stats.kept.mean())


def _time(run: Run, name: str, label: str, f: Callable, query, caches, size: int, share: Callable[[], float]) -> None:
    """Time the decode step `f`. Add a row with the time of one step and the GB/s at which it read keys and values.

    `size`: the bytes of one cache. `share()` returns the fraction of these bytes that a step reads.
    """

    def make():
        kept = share()
        times = rotating(steps(f), [(query, *caches)], seconds=run.seconds)
        median, best = times.median / STEPS, times.best / STEPS
        rate = kept * size / (median / 1e3)
        extra = {"GB/s": rate / 1e9, "of bandwidth": rate / run.ceilings.bytes}
        return dict(milliseconds=median, best=best, extra=extra | ({"kept": kept} if kept < 1 else {}))

    run.row(PART, name, label, make)


def _against_lengths(run: Run, shape: dict, label: str, lengths: tuple[int, int]) -> None:
    """Add a row with the time of a decode step with a long cache, divided by its time with a short cache.

    `label`: the contestant, a kernel with `skip_below`. `lengths`: the two cache lengths, the longer one first. Both
    times are taken from rows that are already in the record. If one of these rows is missing, no row is added.
    """
    prefix = "B{B} N{N} K{K} H{H} bf16".format(**shape)
    names = [f"{prefix} S{S}" for S in lengths]
    times = {r.case: r.milliseconds for r in run.rows if (r.part, r.contestant) == (PART, label) and r.milliseconds}

    def make():
        long, short = (times[name] for name in names)
        return dict(ratio=long / short, against=f"S{lengths[1]}")

    if set(names) <= set(times):
        run.row(PART, f"{prefix} S{lengths[0]} over S{lengths[1]}", label, make)
