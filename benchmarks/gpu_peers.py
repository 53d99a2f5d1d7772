"""Peers: implementations of other projects, which are timed for comparison. Each is called as its documentation says.

A peer that is not installed is left out. A peer in JAX gets the same inputs as our kernels. A peer in torch is a
function `(shape, passes, seconds) -> Times`, which makes random inputs itself. `shape` is {letter: size}, `passes` is
"forward", "backward" or "forward+backward", and `seconds` is how long to measure.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import route
from pallas_kernels.scatter_moe.call import ACTIVATIONS

from .timing import Times, rotating


def _have(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def softmax(q, k, v):
    """Compute causal softmax attention with cuDNN. Its speed is the goal for stick-breaking attention."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def softmax_step(query, key, value):
    """Compute a decode step of softmax attention with cuDNN: one query per sequence attends to the whole cache."""
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def ragged_dots() -> Iterator[tuple[str, Callable]]:
    """Yield (name, function) for each library function that computes a grouped GEMM.

    A function takes three arrays: rows [R,D], sorted by expert; weights [E,D,F]; and the number of rows of each expert
    [E]. It returns rows [R,F].
    """
    yield "jax.lax.ragged_dot", jax.lax.ragged_dot
    if _have("tokamax"):
        import tokamax

        yield "tokamax.ragged_dot", lambda x, w, sizes: tokamax.ragged_dot(lhs=x, rhs=w, group_sizes=sizes)


def ragged_mlp(dot: Callable, chosen, E: int) -> Callable:
    """Return a function `(x, w_in, w_out, gates) -> out` that computes expert networks with the grouped GEMM `dot`.

    Like most code with `ragged_dot`, the function gathers the rows by expert, computes two grouped GEMMs, and gathers
    the rows back by token. `dot`: one of the functions that `ragged_dots` yields. `chosen` [T,k]: the expert indices.
    """

    def run(x, w_in, w_out, gates):
        routing, (T, k) = route(chosen, E), chosen.shape
        hidden = dot(x[routing.order // k], w_in, routing.counts)
        y = dot(ACTIVATIONS["swiglu"](hidden).astype(x.dtype), w_out, routing.counts)[routing.inverse]
        return (gates[..., None] * y.reshape(T, k, -1).astype(jnp.float32)).sum(1).astype(x.dtype)

    return run


def attention() -> list[Callable]:
    return [stickbreaking_attention] if _have("torch", "stickbreaking_attention") else []


def experts() -> list[Callable]:
    peers = {"scattermoe": scattermoe, "sonicmoe": sonicmoe}
    return [peer for name, peer in peers.items() if _have("torch", name)]


def _torch_times(forward: Callable, make_inputs: Callable, parameters: list, passes: str, seconds: float) -> Times:
    """Time one pass of the torch function `forward`, on two sets of random inputs in turn.

    `make_inputs()` returns a set of inputs. `passes` says what is timed. "forward": `forward(*inputs)`. "backward": the
    gradients of the inputs and of `parameters`. "forward+backward": both.
    """
    import torch

    def gradients(out, d_out, *inputs, **how):
        wanted = [x for x in (*inputs, *parameters) if x.requires_grad]
        return torch.autograd.grad(out, wanted, d_out, allow_unused=True, **how)

    def both(d_out, *inputs):
        return gradients(forward(*inputs), d_out, *inputs)

    def only(d_out, *inputs):
        with torch.no_grad():
            return forward(*inputs)

    sets = []
    for inputs in (make_inputs() for _ in range(2)):
        out = forward(*inputs)
        d_out = torch.randn_like(out)
        sets.append((out, d_out, *inputs) if passes == "backward" else (d_out, *inputs))
    run = {"forward": only, "backward": partial(gradients, retain_graph=True), "forward+backward": both}[passes]
    return rotating(run, sets, seconds=seconds, block=lambda out: torch.cuda.synchronize())


def _normal(*shape):
    import torch

    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def stickbreaking_attention(shape: dict, passes: str, seconds: float) -> Times:
    """Time the original Triton kernel of stick-breaking attention, which takes torch tensors [B,N,T,H]."""
    from stickbreaking_attention.sb_attn import sb_attn

    B, T, N, H = (shape[letter] for letter in "BTNH")
    return _torch_times(
        lambda q, k, v: sb_attn(q, k, v, inv_temp=H**-0.5)[0],
        lambda: tuple(_normal(B, N, T, H) for _ in range(3)), [], passes, seconds,
    )  # fmt: skip


def scattermoe(shape: dict, passes: str, seconds: float) -> Times:
    import torch
    from scattermoe.mlp import GLUMLP

    T, k, D, F, E = (shape[letter] for letter in ("T", "k", "D", "F", "E"))
    mlp = GLUMLP(D, F, E, k).to(device="cuda", dtype=torch.bfloat16)

    def make():
        gates, chosen = torch.rand((T, E), device="cuda").topk(k)
        return _normal(T, D), (gates / gates.sum(-1, keepdim=True)).bfloat16(), chosen

    return _torch_times(mlp, make, list(mlp.parameters()), passes, seconds)


def sonicmoe(shape: dict, passes: str, seconds: float) -> Times:
    """Time SonicMoE. Unlike the other peers, it also computes the router: one more product, with a [D,E] matrix."""
    import torch
    from sonicmoe import KernelBackendMoE, MoE
    from sonicmoe.enums import ActivationType

    T, k, D, F, E = (shape[letter] for letter in ("T", "k", "D", "F", "E"))
    moe = MoE(
        num_experts=E, num_experts_per_tok=k, hidden_size=D, intermediate_size=F,
        activation_function=ActivationType.SWIGLU, add_bias=False, std=0.02,
    ).to(device="cuda", dtype=torch.bfloat16)  # fmt: skip

    def forward(x):
        return moe(x, kernel_backend_moe=KernelBackendMoE.sonicmoe)[0]

    return _torch_times(forward, lambda: (_normal(T, D),), list(moe.parameters()), passes, seconds)
