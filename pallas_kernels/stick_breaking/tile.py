"""The arithmetic of one tile of queries against one tile of keys, forward and backward.

G query heads share the key head of the tile: q [G,R,H], k [C,H], v [C,Hv], mask [R,C], log_rem [G,R].
Every formula has the exclusive form: log beta of the key itself, and a sum over the strictly nearer keys.
"""

import jax.numpy as jnp
import numpy as np

from ..arguments import sum_type
from .logarithm import NOTHING

# log1p(y) / y on [0, 1], highest power first, interpolated at Chebyshev nodes, within 1e-9. Multiply-adds vectorise,
# but the library's log1p does not. Small y keep their relative precision.
_LOG1P = np.polynomial.Chebyshev.interpolate(lambda y: np.log1p(y) / y, 10, [0, 1])
_LOG1P = _LOG1P.convert(kind=np.polynomial.Polynomial).coef[::-1].tolist()  # Python floats take the type of y
_CHUNK = 64  # keys of a triangular product


def _log1p(y):
    if y.dtype == jnp.float64:
        return jnp.log1p(y)
    total = jnp.full_like(y, _LOG1P[0])
    for c in _LOG1P[1:]:
        total = total * y + c
    return y * total


def _dot(spec, *operands):
    """Multiply in the type of the operands, and sum in fp32 (fp64 for fp64)."""
    dtype = sum_type(operands[0])
    return jnp.einsum(spec, *operands, precision="highest", preferred_element_type=dtype)


def _sum_after(x, reverse: bool):
    """Return (the sum over the strictly later keys, or over the earlier ones if `reverse`; the sum over all keys).

    The last axis is cut into chunks, so that the cost per score does not grow with the tile. Each chunk takes a product
    with a triangular matrix.
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
    """Return (z, exp(-|z|), log beta, softplus(z)) of the logits z.

    A masked logit is set to NOTHING first, so that its weight, its softplus and all derivatives are zero.
    """
    z = jnp.where(mask, scale * _dot("grh,ch->grc", q, k), NOTHING)
    y = jnp.exp(-jnp.abs(z))
    small = _log1p(y)
    return z, y, jnp.minimum(z, 0) - small, jnp.maximum(z, 0) + small


def log_decay(q, k, mask, scale):
    """Return the cumulative log-decay over this tile, [G,R]: -log of the share of the stick that is left after it."""
    return _sticks(q, k, mask, scale)[3].sum(-1)


def forward(q, k, v, mask, log_rem, scale):
    """Return (the part of the output from this tile [G,R,Hv], log_rem after the tile)."""
    _, _, log_beta, softplus = _sticks(q, k, mask, scale)
    nearer, total = _sum_after(softplus, reverse=False)
    weights = jnp.exp(log_beta - nearer + log_rem[..., None])
    return _dot("grc,ch->grh", weights.astype(v.dtype), v), log_rem - total


def backward(q, k, v, d_out, mask, log_rem, prefix, scale):
    """Return (dq / scale, dk / scale, dv, the prefix after the tile) of the tile.

    `log_rem` is the logarithm of the stick left on entry from the right. `prefix` is d_log_rem + the sum of a over the
    keys further left.
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
