"""The implementation "reference" of stick-breaking attention: the formulas in JAX, with all T * S weights in memory.

Every sum is in fp32, or in fp64 for fp64 arrays. Every matrix product has the highest precision.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ..arguments import sum_type
from .call import Call
from .logarithm import NOTHING


def weights(call: Call):
    """Return (attention weights A [B,N,T,S], log_rem [B,N,T]).

    `log_rem` is the natural logarithm of the part of each query's stick that remains after all keys. `call` has the
    arguments of the op. Its array `value` is not used.
    """
    dtype = sum_type(call.query)
    q, k = call.query.astype(dtype), call.key.astype(dtype)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    z = jnp.asarray(call.scale, dtype) * jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest")
    T, S = z.shape[2:]
    mask = jax.vmap(lambda where: call.mask.visible(where, jnp.arange(T), jnp.arange(S)))(call.where)[:, None]
    # The mask comes before the exponential. A `where` after an exponential that overflows has the right value, but its
    # gradient is 0 * inf = NaN.
    z = jnp.where(mask, z, NOTHING)
    log_beta, softplus = -jax.nn.softplus(-z), jax.nn.softplus(z)
    nearer = jnp.pad(softplus, ((0, 0),) * 3 + ((0, 1),))[..., 1:]  # so that the sum for a key leaves out this key
    A = jnp.exp(log_beta - lax.cumsum(nearer, 3, reverse=True))
    return jnp.where(mask, A, 0), -softplus.sum(-1)  # masked again, so that no gradient flows through a masked weight


def attention(call: Call):
    """Compute stick-breaking attention by its formulas. Return (out [B,T,N,Hv], log_rem [B,T,N], kept [B,K]).

    `log_rem` is the natural logarithm of the part of each query's stick that remains after all keys. `kept` is the
    share of the key tiles that is computed. It is always 1, because this implementation computes all keys.
    """
    A, log_rem = weights(call)
    v = jnp.repeat(call.value.astype(A.dtype), A.shape[1] // call.value.shape[2], axis=2)
    out = jnp.einsum("BNTS,BSNH->BTNH", A, v, precision="highest")
    kept = jnp.ones((A.shape[0], call.key.shape[2]), jnp.float32)
    return out.astype(call.value.dtype), log_rem.swapaxes(1, 2), kept
