"""The time of stick-breaking attention on the CPU: the implementation `xla`, compared with `reference`."""

import jax
import jax.numpy as jnp

from pallas_kernels import stick_breaking_attention

from . import cost
from .report import PASSES, Row, compared
from .timing import forward_backward, interleave

PART = "stick_breaking"
SHAPES = {
    "tiny T=128": dict(B=16, T=128, N=4, H=32),
    "tiny T=256": dict(B=16, T=256, N=4, H=32),
    "tiny T=512": dict(B=16, T=512, N=4, H=32),
    "H=64 T=512": dict(B=1, T=512, N=12, H=64),
}
LONG = dict(B=1, T=4096, N=4, H=64)
MEMORY = dict(B=1, T=16384, N=4, H=64)
BOUND = 1.10  # the largest allowed time of xla divided by the time of the reference, at T <= 512


def inputs(key, B: int, T: int, N: int, H: int, dtype=jnp.float32, mean: float = 0.0):
    """Return random ((cotangent of out, cotangent of rem), query, key, value). The logits have mean `mean`, variance 1.

    The first channel of the queries and keys determines the mean, which must not be positive. With a mean of 0, a query
    attends only to the nearest few keys: all other weights are almost zero. With a mean of -4, it attends to several
    hundred keys, like some heads of trained models.
    """
    q, k, v, d_out = jax.random.normal(key, (4, B, T, N, H), jnp.float32)
    d_rem = jax.random.normal(jax.random.fold_in(key, 1), (B, T, N), jnp.float32)
    if mean:
        size = (-mean * H**0.5) ** 0.5
        q, k = q.at[..., 0].set(size), k.at[..., 0].set(-size)
    q, k, v, d_out = (x.astype(dtype) for x in (q, k, v, d_out))
    return (d_out, d_rem), q, k, v


def attention(**settings):
    """Return a function `(q, k, v) -> (out, rem)`: stick-breaking attention with the keyword arguments `settings`."""
    return lambda q, k, v: stick_breaking_attention(q, k, v, **settings)


def _race(name, shape, contestants, *, mean=0.0, seconds):
    cotangent, *qkv = inputs(jax.random.key(0), **shape, mean=mean)
    forward = {n: jax.jit(f) for n, f in contestants.items()}
    times = interleave({n: lambda f=f: f(*qkv) for n, f in forward.items()}, seconds=seconds)
    yield f"{name} {PASSES[0]}", times, False
    both = {n: forward_backward(f) for n, f in contestants.items()}
    times = interleave({n: lambda f=f: f(cotangent, *qkv) for n, f in both.items()}, seconds=seconds)
    yield f"{name} {PASSES[1]}", times, True


def rows(ceilings: cost.Ceilings, *, quick: bool = False):
    seconds = 0.1 if quick else 3.0
    contestants = {name: attention(implementation=name) for name in ("reference", "xla")}
    for name, shape in {"quick T=32": dict(B=2, T=32, N=2, H=8)}.items() if quick else SHAPES.items():
        for case, times, backward in _race(name, shape, contestants, seconds=seconds):
            limits = cost.stick_breaking(**shape, backward=backward).limits(ceilings)
            yield from compared(PART, case, times, "reference", {"xla": BOUND}, limits)
    yield from _long(dict(B=1, T=300, N=2, H=8) if quick else LONG, seconds, ceilings)
    yield from _memory(dict(B=1, T=1024, N=2, H=8) if quick else MEMORY)


def _long(shape, seconds, ceilings):
    contestants = {
        "xla": attention(implementation="xla"),
        "xla skip_below=-24": attention(implementation="xla", skip_below=-24.0),
    }
    _, *qkv = inputs(jax.random.key(0), **shape, mean=-4.0)
    stats = jax.jit(attention(implementation="xla", skip_below=-24.0, return_stats=True))(*qkv)[2]
    name = f"T={shape['T']} N={shape['N']} H={shape['H']} logits N(-4,1)"
    for case, times, backward in _race(name, shape, contestants, mean=-4.0, seconds=seconds):
        limits = cost.stick_breaking(**shape, backward=backward).limits(ceilings)
        for row in compared(PART, case, times, "xla", {}, limits):
            if "skip" in row.contestant:
                row.extra["kept"] = float(stats.kept.mean())
            yield row


def _memory(shape):
    """Yield a row for each implementation: the memory of the temporaries of its forward and backward pass.

    The passes are compiled, but they do not run: the temporaries of the reference would not fit into memory.
    """
    cotangent, *qkv = jax.eval_shape(lambda: inputs(jax.random.key(0), **shape))
    for name in ("reference", "xla"):
        compiled = forward_backward(attention(implementation=name)).lower(cotangent, *qkv).compile()
        megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
        yield Row(PART, f"T={shape['T']} N={shape['N']} H={shape['H']} temporary memory", name, extra={"MB": megabytes})
