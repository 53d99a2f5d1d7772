"""The time of expert networks on a GPU, compared with other implementations and with a dense network."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import route

from . import cost, experts, gpu_check, gpu_peers
from .gpu_run import Case, Run, work_of

PART = experts.PART
PEERS = (
    "scattermoe",
    "sonicmoe",
    "tokamax.ragged_dot",
    "jax.lax.ragged_dot by Triton",
    "jax.lax.ragged_dot",
    "dense of k F",
)
SHAPES = [
    dict(T=8192, k=8, D=1536, F=512, E=40),
    dict(T=8192, k=2, D=2048, F=3072, E=8),
    dict(T=16384, k=4, D=2560, F=1280, E=64),
    dict(T=65536, k=8, D=1536, F=512, E=40),
]
QUICK = [dict(T=128, k=2, D=32, F=32, E=4)]
# Without this option, XLA multiplies each row by the weights of all experts.
TRITON = {"xla_gpu_experimental_use_ragged_dot_fusion": True}
CHECKED = 2048  # largest number of tokens in a check: the reference computes every expert for every token


def rows(run: Run, shape: dict, implementations) -> None:
    """Time our implementations and the peers at one shape, and add the rows to the record of `run`.

    Our implementations and the functions of `gpu_peers.ragged_dots` are checked against the reference. Each of them is
    timed only if its check passes. The torch peers and the dense network are timed without a check.

    `implementations(op, *arguments)` yields the names of our implementations that can run a call of the op.
    """
    E, make = shape["E"], partial(experts.inputs, dtype=jnp.bfloat16)
    forward, both = (cost.experts(**shape, itemsize=2, backward=b) for b in (False, True))
    (first, chosen), (second, _) = (make(jax.random.key(i), **shape) for i in (0, 1))
    name = "T{T} D{D} F{F} E{E} k{k} bf16".format(**shape)
    case = Case(PART, name, work_of(forward, both), [first, second])
    (cotangent, *small), few = make(jax.random.key(2), **(shape | dict(T=min(shape["T"], CHECKED))))
    expected = gpu_check.exact(experts.experts(few, E, implementation="reference"), cotangent, small)
    _, x, w_in, w_out, gates = first
    names = implementations("expert_mlp", x, w_in, w_out, jax.eval_shape(lambda: route(chosen, E)), gates)
    # A contestant is a function of the expert indices, because the check has fewer tokens than the timing.
    contestants = {name: lambda c, name=name: experts.experts(c, E, implementation=name) for name in names}
    contestants |= {name: lambda c, dot=dot: gpu_peers.ragged_mlp(dot, c, E) for name, dot in gpu_peers.ragged_dots()}
    for contestant, routed in contestants.items():
        check = partial(gpu_check.errors, routed(few), expected, cotangent, small)
        if run.checked(f"{PART} checks", name, contestant, jnp.bfloat16, check):
            run.jax(case, contestant, routed(chosen))
            if contestant == "jax.lax.ragged_dot":
                run.jax(case, f"{contestant} by Triton", routed(chosen), options=TRITON)
    for peer in gpu_peers.experts():
        run.torch(case, peer, shape)
    run.jax(case._replace(sets=[_dense_inputs(seed, **shape) for seed in (0, 1)]), "dense of k F", experts.dense)
    run.limits(case)


def _dense_inputs(seed: int, *, T: int, k: int, D: int, F: int, E: int):
    """Return random (cotangent, x, w_in, w_out) in bfloat16, for a dense network with the hidden width k * F.

    This is the hidden width of k experts together. So the dense network does the same work as k experts per token.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (T, D), (T, D), (D, 2 * k * F), (k * F, D)
    scales = 1, 1, D**-0.5, (k * F) ** -0.5
    return tuple(
        s * jax.random.normal(*a, jnp.bfloat16) for s, a in zip(scales, zip(keys, shapes, strict=True), strict=True)
    )
