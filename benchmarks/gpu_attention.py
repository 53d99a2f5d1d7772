"""The time of stick-breaking attention on a GPU, at training shapes, with logits as in a trained model."""

import functools
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import stick_breaking_attention

from . import cost, gpu_check, gpu_peers, stick_breaking, trained_logits
from .gpu_run import Case, Run, work_of
from .trained_logits import SKIP

PART, CHECKS = stick_breaking.PART, "stick_breaking checks at size"
PEERS = ("stickbreaking_attention", "cudnn softmax")
SHAPES = [
    dict(B=4, T=4096, N=12, H=128),
    dict(B=4, T=16384, N=12, H=128),
    dict(B=4, T=4096, N=36, H=64),
    dict(B=8, T=4096, N=32, H=128),
    dict(B=4, T=8192, N=12, H=128),
]
QUICK = [dict(B=1, T=96, N=2, H=32)]
CHECKED = 1024  # largest T of the check that compares all queries: the reference's scores must fit into memory
LAST = 256  # the check at the full T compares only this number of queries, the last ones


def _inputs(seed: int, shape: dict):
    """Return random inputs of one shape: ((cotangent of out, cotangent of rem), query, key, value).

    All arrays are bfloat16, except the cotangent of rem, which is fp32.
    """
    arrays = trained_logits.inputs(jax.random.key(seed), **shape, dtype=jnp.bfloat16, heads=trained_logits.saved())
    return trained_logits.cotangents(jax.random.key(seed + 100), arrays[0], arrays[2]), *arrays


def check_last(function, reference, cotangent, arrays, last: int) -> gpu_check.Errors:
    """Compare `function` with `reference` on the last `last` queries and all keys. Return the errors.

    `cotangent`: the cotangents of all outputs. `arrays`: query, key, value.

    The cotangents of all other queries are set to zero. So the gradients of the keys and values come only from the last
    queries, and the reference computes only the scores of these queries. The gradients of all other queries must be 0.
    """
    tail = slice(arrays[0].shape[1] - last, None)
    small = jax.tree.map(lambda c: c[:, tail], cotangent)
    cotangent = jax.tree.map(lambda c: jnp.zeros_like(c).at[:, tail].set(c[:, tail]), cotangent)
    outputs, (dq, dk, dv) = gpu_check.exact(reference, small, (arrays[0][:, tail], *arrays[1:]))

    def look(results):
        outputs, (dq, dk, dv) = results
        return jax.tree.map(lambda x: x[:, tail], outputs), (dq[:, tail], dq[:, : tail.start].any(), dk, dv)

    return gpu_check.errors(function, (outputs, (dq, 0.0, dk, dv)), cotangent, arrays, look)


def _agrees(run: Run, name: str, shape: dict, implementation: str, skip) -> bool:
    f = gpu_check.attended(stick_breaking.attention(implementation=implementation, skip_below=skip))
    reference = gpu_check.attended(stick_breaking.attention(implementation="reference"))
    small = shape | dict(B=1, T=min(shape["T"], CHECKED))
    checks = [(f"one entry, T={small['T']}", small, small["T"])]
    if small != shape:
        checks.append((f"last {LAST} queries", shape, LAST))
    agrees = True
    for what, sizes, last in checks:

        def check(sizes=sizes, last=last):
            cotangent, *arrays = _inputs(2, sizes)
            return check_last(f, reference, cotangent, arrays, last)

        agrees &= run.checked(CHECKS, f"{name}: {what}", contestant(implementation, skip), jnp.bfloat16, check)
    return agrees


def contestant(implementation: str, skip: float | None) -> str:
    return implementation if skip is None else f"{implementation} skip_below={skip:g}"


def _kept(implementation: str, arrays) -> dict:
    stats = partial(stick_breaking_attention, skip_below=SKIP, return_stats=True, implementation=implementation)
    return {"kept": float(jax.jit(lambda *arrays: stats(*arrays)[2].kept.mean())(*arrays))}


def rows(run: Run, shape: dict, kernels: tuple[str, ...], *, others: tuple[str, ...] = (), tiles=None) -> None:
    """Check and time our implementations at one shape, time the peers, and add the results to the record of `run`.

    Peers are implementations of other projects. They are timed without a check.

    `kernels`: our implementations that are checked against the reference, without `skip_below` and with it. Each of the
    two is timed only if it passes its check.
    `others`: our implementations that are timed without a check, and without `skip_below`.
    `tiles`: {implementation: pairs (queries, keys) of tile sizes}. They are timed without a check, in addition to the
    tile sizes that the implementation chooses.
    """
    name = "B{B} N{N} T{T} H{H} bf16".format(**shape)
    forward, both = (cost.stick_breaking(**shape, itemsize=2, backward=b) for b in (False, True))
    case = Case(PART, name, work_of(forward, both), [_inputs(seed, shape) for seed in (0, 1)])
    for implementation in kernels:
        for skip in (None, SKIP):
            if _agrees(run, name, shape, implementation, skip):
                extra = dict if skip is None else functools.cache(partial(_kept, implementation, case.sets[0][1:]))
                f = stick_breaking.attention(implementation=implementation, skip_below=skip)
                run.jax(case, contestant(implementation, skip), f, extra)
        for size in (tiles or {}).get(implementation, ()):
            f = stick_breaking.attention(implementation=implementation, tiles=size)
            run.jax(case, f"{implementation} tiles={size[0]} x {size[1]}", f)
    for peer in gpu_peers.attention():
        run.torch(case, peer, shape)
    no_rem = [(cotangent[0], *arrays) for cotangent, *arrays in case.sets]
    run.jax(case._replace(sets=no_rem), "cudnn softmax", gpu_peers.softmax)
    for other in others:
        run.jax(case, other, stick_breaking.attention(implementation=other))
    run.limits(case)
