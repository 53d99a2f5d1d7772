"""The arithmetic of one tile of R queries and one tile of C keys, forward and backward, for the implementation "xla".

G query heads share one key head. The arguments of the functions are q [G,R,H], k [C,H], v [C,Hv], mask bool [R,C] (True
if the query sees the key), and log_rem [G,R], the natural logarithm of the part of each query's stick that remains when
the query enters the tile. Keys are in the order of their positions. Nearer keys are on the right, and queries enter the
tile from the right. With beta = sigmoid(scale * <q, k>), the weight of a key is
exp(log_rem + log beta + the sum of log(1 - beta) over the keys on its right in the tile).
"""

import jax.numpy as jnp
import numpy as np

from ..arguments import sum_type
from .logarithm import NOTHING

# The coefficients of a polynomial for log1p(y) / y on [0, 1], highest power first, with an error of at most 1e-9. XLA
# vectorises its multiply-adds, but not log1p. The relative error of log1p(y) is small for small y too.
_LOG1P = np.polynomial.Chebyshev.interpolate(lambda y: np.log1p(y) / y, 10, [0, 1])
_LOG1P = _LOG1P.convert(kind=np.polynomial.Polynomial).coef[::-1].tolist()  # Python floats take the type of y
_CHUNK = 64  # keys that one product with a triangular matrix sums over


def _log1p(y):
    """Return log(1 + y) for y from 0 to 1, by a polynomial, or for fp64 by `jnp.log1p`."""
    if y.dtype == jnp.float64:
        return jnp.log1p(y)
    total = jnp.full_like(y, _LOG1P[0])
    for c in _LOG1P[1:]:
        total = total * y + c
    return y * total


def _dot(spec, *operands):
    """Return the einsum `spec` of the operands: products of their dtype, summed in fp32 (in fp64 for fp64 operands)."""
    dtype = sum_type(operands[0])
    return jnp.einsum(spec, *operands, precision="highest", preferred_element_type=dtype)


def _sum_after(x, reverse: bool):
    """Return (for each key, the sum of x over the keys on its right [.., C], the sum of x over all keys [..]).

    x is [.., C]. If `reverse`, the sum for each key is over the keys on its left instead. The last axis is cut into
    chunks of 64 keys, so that the cost per score does not grow with C. The sums within a chunk are a product with a
    triangular matrix.
    """
    *rows, C = x.shape
    chunk = max(1, min(C, _CHUNK))
    x = jnp.pad(x, [(0, 0)] * len(rows) + [(0, -C % chunk)])
    n = x.shape[-1] // chunk

    def triangle(size):
        ones = np.tri(size, k=-1, dtype=x.dtype)  # [m, c]: m > c
        return ones.T if reverse else ones

    within = _dot("rm,mc->rc", x.reshape(-1, chunk), triangle(chunk)).reshape(*rows, n, chunk)
    sums = x.reshape(*rows, n, chunk).sum(-1)
    if n > 1:
        within += _dot("rm,mc->rc", sums.reshape(-1, n), triangle(n)).reshape(*rows, n, 1)
    return within.reshape(*rows, n * chunk)[..., :C], sums.sum(-1)


def _sticks(q, k, mask, scale):
    """Return (z, exp(-|z|), log beta, softplus(z)), each [G,R,C], where z = scale * <q, k> are the logits.

    q is [G,R,H], k is [C,H], and mask is bool [R,C], True if the query sees the key. beta = sigmoid(z) is the share of
    the stick that a key breaks off, and softplus(z) = -log(1 - beta). A masked logit is set to NOTHING (-1e30) first,
    so that its weight, its softplus and all derivatives are zero.
    """
    z = jnp.where(mask, scale * _dot("grh,ch->grc", q, k), NOTHING)
    y = jnp.exp(-jnp.abs(z))
    small = _log1p(y)
    return z, y, jnp.minimum(z, 0) - small, jnp.maximum(z, 0) + small


def log_decay(q, k, mask, scale):
    """Return the log-decay of each query over one tile [G,R]: the sum of -log(1 - beta) over the keys of the tile.

    q is [G,R,H], k is [C,H], and mask is bool [R,C], True if the query sees the key. beta is sigmoid(scale * <q, k>).
    """
    return _sticks(q, k, mask, scale)[3].sum(-1)


def forward(q, k, v, mask, log_rem, scale):
    """Return (what the keys of one tile add to the output [G,R,Hv], log_rem after the tile [G,R]).

    q is [G,R,H], k is [C,H], v is [C,Hv], and mask is bool [R,C], True if the query sees the key. The argument
    `log_rem` [G,R] is the natural logarithm of the part of each query's stick that remains before the tile.
    """
    _, _, log_beta, softplus = _sticks(q, k, mask, scale)
    nearer, total = _sum_after(softplus, reverse=False)
    weights = jnp.exp(log_beta - nearer + log_rem[..., None])
    return _dot("grc,ch->grh", weights.astype(v.dtype), v), log_rem - total


def backward(q, k, v, d_out, mask, log_rem, prefix, scale):
    """Return (dq / scale [G,R,H], dk / scale [C,H], dv [C,Hv], the prefix after the tile [G,R]).

    The gradients are what this tile adds to dq, dk and dv. `d_out` [G,R,Hv] is the cotangent of the output. `prefix`
    [G,R] is the cotangent of the final log_rem plus the sum of a over all keys on the left of the tile, where
    a = weight * <d_out, v>. So the tiles must be computed from left to right. The other arguments are as in `forward`.
    """
    z, y, log_beta, softplus = _sticks(q, k, mask, scale)
    nearer, _ = _sum_after(softplus, reverse=False)
    weights = jnp.exp(log_beta - nearer + log_rem[..., None])
    a = jnp.where(mask, weights * _dot("grh,ch->grc", d_out, v), 0)  # the product overflows if a masked v is huge
    further, total = _sum_after(a, reverse=True)
    # Both beta and 1 - beta are computed from y. A subtraction from 1 would lose precision.
    near, far = 1 / (1 + y), y / (1 + y)
    beta, rest = jnp.where(z >= 0, near, far), jnp.where(z >= 0, far, near)
    dz = (rest * a - beta * (prefix[..., None] + further)).astype(k.dtype)
    return (
        _dot("grc,ch->grh", dz, k),
        _dot("grc,grh->ch", dz, q),
        _dot("grc,grh->ch", weights.astype(v.dtype), d_out),
        prefix + total,
    )
