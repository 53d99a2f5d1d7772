"""The arithmetic of one tile of R queries and one tile of C keys, forward and backward, for the implementation "xla".

G query heads share one key head. The arguments of the functions are q [G,R,H], k [C,H], v [C,Hv], mask bool [R,C] (True
if the query sees the key), and log_rem [G,R]: the natural logarithm of the part of each query's stick that remains
after all keys on the right of the tile. Keys are in the order of their positions, so nearer keys are further right.
With beta = sigmoid(scale * <q, k>), the logarithm of a key's weight is
    log_rem + log(beta) + the sum of log(1 - beta) over the keys of the tile on the right of this key.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ..arguments import sum_type
from .logarithm import NOTHING

# The coefficients of a polynomial for log1p(y) / y on [0, 1], highest power first. The relative error of log1p(y) is at
# most 1e-9, also for small y. XLA vectorises the multiply-adds of the polynomial, but does not vectorise log1p.
_LOG1P = np.polynomial.Chebyshev.interpolate(lambda y: np.log1p(y) / y, 10, [0, 1])
_LOG1P = _LOG1P.convert(kind=np.polynomial.Polynomial).coef[::-1].tolist()  # Python floats take the type of y
# The number of keys over which one product with a triangular matrix sums. 16 is the fastest of 8, 16, 32 and 64:
# forward and backward of B=16 T=256 N=4 H=32 take 0.89 of the time with 64 (one CPU core, 2026-11-30).
_CHUNK = 16


def _log1p(y):
    """Return log(1 + y), element by element, for y from 0 to 1: by a polynomial, or by `jnp.log1p` for fp64."""
    if y.dtype == jnp.float64:
        return jnp.log1p(y)
    total = jnp.full_like(y, _LOG1P[0])
    for c in _LOG1P[1:]:
        total = total * y + c
    return y * total


def _dot(spec, *operands):
    """Return `jnp.einsum(spec, *operands)` at the highest precision, in fp32, or in fp64 if the operands are fp64."""
    dtype = sum_type(operands[0])
    return jnp.einsum(spec, *operands, precision="highest", preferred_element_type=dtype)


def _sum_after(x, reverse: bool):
    """Return (sums [.., C], total [..]): for each key the sum of x over the keys on its right, and the sum of all x.

    x is [.., C], one number for each of C keys. So sums[c] is the sum of x[m] over m > c. If `reverse`, sums[c] is the
    sum of x[m] over m < c, the keys on the left. The sums are products of x and triangular matrices of ones. The keys
    are cut into chunks of 16 keys: one product computes the sums within the chunks, and another one computes the sums
    over whole chunks. A single product with a [C,C] matrix would take C multiply-adds for each key instead of about 16.
    """
    *rows, C = x.shape
    chunk = max(1, min(C, _CHUNK))
    x = jnp.pad(x, [(0, 0)] * len(rows) + [(0, -C % chunk)])
    n = x.shape[-1] // chunk

    def triangle(size):
        ones = np.tri(size, k=-1, dtype=x.dtype)  # element [m, c] is 1 if m > c
        return ones.T if reverse else ones

    within = _dot("rm,mc->rc", x.reshape(-1, chunk), triangle(chunk)).reshape(*rows, n, chunk)
    sums = x.reshape(*rows, n, chunk).sum(-1)
    if n > 1:
        within += _dot("rm,mc->rc", sums.reshape(-1, n), triangle(n)).reshape(*rows, n, 1)
    return within.reshape(*rows, n * chunk)[..., :C], sums.sum(-1)


def _sticks(q, k, mask, scale):
    """Return (z, exp(-|z|), log beta, softplus(z)), each [G,R,C], where z = scale * <q, k> are the logits.

    q is [G,R,H], k is [C,H], and mask is bool [R,C], True if the query sees the key. beta = sigmoid(z) is the share of
    the remaining stick that a key breaks off, and softplus(z) = -log(1 - beta). If a query does not see a key, z is
    NOTHING (-1e30), so that the weight, the softplus and all derivatives are zero.
    """
    z = jnp.where(mask, scale * _dot("grh,ch->grc", q, k), NOTHING)
    y = jnp.exp(-jnp.abs(z))
    small = _log1p(y)
    # Without the barrier, XLA for CPUs computes the polynomial in the loop of the product that sums the softplus. This
    # loop runs operation by operation: forward takes 1.2 times, and forward and backward 1.14 times as long.
    log_beta, softplus = jax.lax.optimization_barrier((jnp.minimum(z, 0) - small, jnp.maximum(z, 0) + small))
    return z, y, log_beta, softplus


def log_decay(q, k, mask, scale):
    """Return, for each query, the sum of -log(1 - beta) over the keys of one tile: [G,R].

    This is the log-decay of the tile: the keys of the tile multiply the length of the query's stick by exp(-log-decay).
    beta is sigmoid(scale * <q, k>). q is [G,R,H], k is [C,H], and mask is bool [R,C], True if the query sees the key.
    """
    return _sticks(q, k, mask, scale)[3].sum(-1)


def forward(q, k, v, mask, log_rem, scale):
    """Compute the attention of R queries to the C keys of one tile. Return (out [G,R,Hv], log_rem [G,R]).

    `out` is the sum of weight * v over these keys. Summed over all tiles, it is the output of the op. The argument
    `log_rem` [G,R] is the natural logarithm of the part of each query's stick that remains after all keys on the right
    of the tile. The result `log_rem` is the same logarithm after the keys of the tile. q is [G,R,H], k is [C,H], v is
    [C,Hv], and mask is bool [R,C], True if the query sees the key.
    """
    _, _, log_beta, softplus = _sticks(q, k, mask, scale)
    nearer, total = _sum_after(softplus, reverse=False)
    weights = jnp.exp(log_beta - nearer + log_rem[..., None])
    return _dot("grc,ch->grh", weights.astype(v.dtype), v), log_rem - total


def backward(q, k, v, d_out, mask, log_rem, prefix, scale):
    """Compute what one tile adds to the gradients. Return (dq [G,R,H], dk [C,H], dv [C,Hv], prefix [G,R]).

    dq and dk are not yet multiplied by `scale`. `d_out` [G,R,Hv] is the cotangent of the output. For each query and
    key, let `a` be weight * <d_out, v>. The argument `prefix` [G,R] is the sum of `a` over all keys on the left of the
    tile, plus the cotangent of log_rem after all keys. The result `prefix` also includes the sum of `a` over the keys
    of the tile. The result is the argument for the next tile on the right. The other arguments are as in `forward`.
    """
    z, y, log_beta, softplus = _sticks(q, k, mask, scale)
    nearer, _ = _sum_after(softplus, reverse=False)
    weights = jnp.exp(log_beta - nearer + log_rem[..., None])
    a = jnp.where(mask, weights * _dot("grh,ch->grc", d_out, v), 0)  # the product overflows if a masked v is huge
    further, total = _sum_after(a, reverse=True)
    # Both beta and 1 - beta are computed from y. A subtraction from 1 would lose precision.
    near = 1 / (1 + y)
    far = y * near
    beta, rest = jnp.where(z >= 0, near, far), jnp.where(z >= 0, far, near)
    dz = (rest * a - beta * (prefix[..., None] + further)).astype(k.dtype)
    return (
        _dot("grc,ch->grh", dz, k),
        _dot("grc,grh->ch", dz, q),
        _dot("grc,grh->ch", weights.astype(v.dtype), d_out),
        prefix + total,
    )
