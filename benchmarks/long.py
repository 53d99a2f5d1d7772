"""The time of stick-breaking attention on long texts, compared with softmax attention in JAX and in torch.

If benchmarks/trained_heads.py has written its file (`python -m benchmarks.trained_heads runs/tiny`), the queries and
keys come from a trained model. Otherwise they are random. With `skip_below=-24`, a query stops when less than 2^-24 of
its stick is left, so most tiles are skipped. Softmax attention has to compute all tiles. Torch runs in a separate
process (`benchmarks.torch_attention`), which takes turns with this process. The queries and keys of torch are random,
because the time of softmax attention does not depend on their values.
"""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import stick_breaking_attention

from .cost import Ceilings
from .report import PASSES, Row
from .timing import forward_backward, interleave
from .train import TorchPeer, torch_python
from .trained_logits import SKIP, cotangents, inputs, saved, source

PART = "long"
OURS, JAX, TORCH = "stick-breaking", "softmax, jax.nn", "softmax, torch"
SIZES = dict(B=1, N=4, H=32)
# {T: (goal forward, goal forward+backward)}: how many times as fast as torch's softmax attention
GOALS = {4096: (1.0, 1.0), 16384: (3.0, 3.0), 65536: (8.0, 8.0)}
CACHES = (2**10, 2**12, 2**14, 2**16, 2**18)
GROWTH = 1.5  # the largest allowed time of a decode step at the last cache length, divided by the time at 2^12
LARGEST_SCORES = 2**30  # bytes: jax.nn.dot_product_attention stores all scores, so it is left out above this size


def rows(ceilings: Ceilings, *, quick: bool = False):
    sizes = dict(B=1, N=2, H=32) if quick else SIZES
    for T, goals in {64: (None, None)}.items() if quick else GOALS.items():
        yield from _texts(sizes | dict(T=T), goals, quick)
    yield _dropped(sizes | dict(T=64 if quick else 4096))
    yield from _decoding(sizes, (32, 64) if quick else CACHES, quick)


def _stick_breaking(**settings):
    return lambda q, k, v: stick_breaking_attention(q, k, v, implementation="xla", **settings)


def _softmax(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=q.shape[1] == k.shape[1])


def _texts(shape: dict, goals: tuple, quick: bool):
    """Yield the rows of a text of T tokens: both passes of all contestants."""
    qkv = inputs(jax.random.key(0), **shape, heads=saved())
    d_out, d_rem = cotangents(jax.random.key(1), qkv[0], qkv[2])
    stats = jax.jit(_stick_breaking(skip_below=SKIP, return_stats=True))(*qkv)[2]
    extra = {"tiles kept": float(stats.kept.mean()), "logits of": source()}
    ours = _stick_breaking(skip_below=SKIP)
    runs = (
        {OURS: partial(jax.jit(ours), *qkv), JAX: partial(jax.jit(_softmax), *qkv)},
        {
            OURS: partial(forward_backward(ours), (d_out, d_rem), *qkv),
            JAX: partial(forward_backward(_softmax), d_out, *qkv),
        },
    )
    for name, contestants, goal in zip(PASSES, runs, goals, strict=True):
        sizes = shape | dict(S=shape["T"], backward=name != PASSES[0])
        yield from _race(f"T={shape['T']} N={shape['N']} H={shape['H']} {name}", contestants, sizes, goal, extra, quick)


def _decoding(sizes: dict, caches: tuple, quick: bool):
    """Yield the rows of one decode step: one query against a cache of S keys, for each cache length S."""
    best = {}
    for S in caches:
        shape = sizes | dict(T=1, S=S)
        qkv = inputs(jax.random.key(0), **shape, heads=saved())
        ours = jax.jit(_stick_breaking(skip_below=SKIP, query_offset=S - 1))
        runs = {OURS: partial(ours, *qkv), JAX: partial(jax.jit(_softmax), *qkv)}
        case = f"decoding S={S} N={sizes['N']} H={sizes['H']}"
        for row in _race(case, runs, shape | dict(backward=False), None, {}, quick):
            best[S, row.contestant] = row.best
            yield row
    last, first = caches[-1], caches[1]
    for name in dict.fromkeys(contestant for _, contestant in best):
        growth = best[last, name] / best[first, name]
        bound = GROWTH if name == OURS and not quick else None
        yield Row(PART, f"decoding S={last} over S={first}", name, ratio=growth, against=f"S={first}", at_most=bound)


def _race(case: str, runs: dict, shape: dict, goal: float | None, extra: dict, quick: bool):
    """Time the contestants `runs` and torch in turns. Yield a row for each.

    `goal`: how many times as fast as torch our attention must be; None: no comparison, only the times.
    """
    if 4 * shape["B"] * shape["N"] * shape["T"] * shape["S"] > LARGEST_SCORES:
        del runs[JAX]
    with contextlib.ExitStack() as stack:
        if python := torch_python():
            peer = runs[TORCH] = TorchPeer(python, shape, "benchmarks.torch_attention")
            stack.callback(peer.close)
        times = interleave(runs, seconds=0.1 if quick else 5.0, least=3)
    for name, t in times.items():
        if name != OURS:
            yield Row.timed(PART, case, name, t, extra={"with": peer.versions} if name == TORCH else {})
        elif goal is not None and TORCH in times:
            ratio = times[TORCH].best / t.best
            yield Row.timed(PART, case, name, t, ratio=ratio, against=TORCH, at_least=goal, extra=extra)
        else:
            yield Row.timed(PART, case, name, t, extra=extra)


def _dropped(shape: dict) -> Row:
    """Return a row with the largest of all weights that `skip_below` drops.

    The reference computes all weights. A weight counts as dropped if the call with `skip_below` gives 0 for it. The
    values are unit vectors, so the output of a query is the vector of its weights.
    """
    q, k, _ = inputs(jax.random.key(0), **shape, heads=saved())
    weights = jnp.eye(shape["T"])[None, :, None]
    largest = 0.0
    for n in range(shape["N"]):
        one = q[:, :, n : n + 1], k[:, :, n : n + 1], weights
        full = stick_breaking_attention(*one, implementation="reference")[0]
        kept = jax.jit(_stick_breaking(skip_below=SKIP))(*one)[0]
        largest = max(largest, float(jnp.where(kept == 0, full, 0).max()))
    return Row(
        PART, f"T={shape['T']}", "largest dropped weight", ratio=largest * 2**-SKIP, against="2^-24", at_most=1.0
    )
