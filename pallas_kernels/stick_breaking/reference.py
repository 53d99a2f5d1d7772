"""Stick-breaking attention as it is defined: quadratic, every sum in fp32 (fp64 for fp64) at highest precision."""

import jax
import jax.numpy as jnp
from jax import lax

from .call import Call


def attention(call: Call):
    """(out [B,T,N,Hv], log_rem [B,T,N], share of the key tiles computed [B,K])."""
    dtype = jnp.promote_types(call.query.dtype, jnp.float32)
    q, k, v = (x.astype(dtype) for x in (call.query, call.key, call.value))
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    z = jnp.asarray(call.scale, dtype) * jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest")
    T, S = z.shape[2:]
    mask = jax.vmap(lambda where: call.mask.visible(where, jnp.arange(T), jnp.arange(S)))(call.where)[:, None]
    softplus = jnp.where(mask, jax.nn.softplus(z), 0)
    nearer = jnp.pad(softplus, ((0, 0),) * 3 + ((0, 1),))[..., 1:]  # leaves out the key itself
    weights = jnp.where(mask, jnp.exp(z - softplus - lax.cumsum(nearer, 3, reverse=True)), 0)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights, v, precision="highest")
    log_rem = -softplus.sum(-1).swapaxes(1, 2)
    return out.astype(call.value.dtype), log_rem, jnp.ones((q.shape[0], call.key.shape[2]), jnp.float32)
