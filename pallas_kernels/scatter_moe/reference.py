"""The reference implementation of `expert_linear` and `expert_mlp`: it computes every expert for all rows, in a loop.

It is slow and simple. The other implementations are compared with it. All sums are in fp32 (fp64 for fp64 arrays), and
all matrix products have the highest precision.
"""

import jax.numpy as jnp
from jax import lax

from ..arguments import sum_type
from .call import ACTIVATIONS, LinearCall, MlpCall


def linear(call: LinearCall):
    """Return the result of `expert_linear`, [T*k, F], or [T, F] with gates, by the formula, expert after expert."""
    dtype = sum_type(call.x)
    routing, (T, k) = call.routing, call.routing.expert_indices.shape
    by_pair = {"token": lambda x: jnp.repeat(x, k, 0), "pair": lambda x: x, "sorted": lambda x: x[routing.inverse]}
    x = by_pair[call.x_rows](call.x).astype(dtype)
    # A row of x whose pair has no expert may have NaN, so it is replaced by zeros.
    x = jnp.where(routing.expert_indices.reshape(-1, 1) < routing.num_experts, x, 0)
    bias = jnp.zeros((routing.num_experts, call.weight.shape[2]), dtype) if call.bias is None else call.bias

    def expert(total, e):
        y = jnp.einsum("RD,DF->RF", x, call.weight[e].astype(dtype), precision="highest") + bias[e].astype(dtype)[None]
        return jnp.where((routing.expert_indices == e).reshape(-1, 1), y, total), None

    zeros = jnp.zeros_like(x, shape=(T * k, call.weight.shape[2]))  # varies over the same mesh axes as x
    y, _ = lax.scan(expert, zeros, jnp.arange(routing.num_experts))
    if call.gates is not None:
        y = (call.gates.astype(dtype)[..., None] * y.reshape(T, k, y.shape[-1])).sum(1)
    return (y[routing.order] if call.out_rows == "sorted" else y).astype(call.x.dtype)


def mlp(call: MlpCall):
    """Return the result of `expert_mlp`, [T, D], by the formula, expert after expert."""
    x = call.x.astype(sum_type(call.x))  # so that the hidden units have this type too
    up = LinearCall(x, call.w_in, call.b_in, None, call.routing, "token", "pair")
    hidden = ACTIVATIONS[call.activation](linear(up))
    down = LinearCall(hidden, call.w_out, call.b_out, call.gates, call.routing, "pair", "token")
    return linear(down).astype(call.x.dtype)
