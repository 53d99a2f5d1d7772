"""Queries and keys to time early exit (`skip_below`). Their heads attend as far as the heads of a trained model.

If benchmarks/trained_heads.py has written runs/trained_heads.npz, the queries and keys are taken from this file, which
has the heads of a trained model. Otherwise they are random: the logits of head n have the distribution N(mean_n, 1). In
both cases, most heads attend to the keys of one tile, and a few heads attend to several hundred keys.

The means are fitted to a trained model with 0.9M parameters, which read source code with skip_below=-24. Of all tiles
of 64 queries and 64 keys, the model computed 34% at T=1024 and 21% at T=2048. Each head computed from 12% to 65% of its
tiles.

With standard normal queries and keys, early exit would look too good, because nearly all tiles would be skipped. With
one mean for all heads, the work would look too balanced, because all heads would have the same work.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SKIP = -24.0  # the value of skip_below in all benchmarks of early exit
# Fitted numbers, see `means`: the mean logit of the head that attends farthest, and how fast the other means rise to 0.
FARTHEST, CURVE = -4.1, 2.3
SAVED = Path(__file__).parent.parent / "runs" / "trained_heads.npz"


class Heads(NamedTuple):
    """The queries and keys of M heads of width h of a trained model, on a text of P tokens.

    The queries are already multiplied by the scale of the attention, so a logit is the product query . key.
    """

    query: np.ndarray  # [M, P, h]
    key: np.ndarray  # [M, P, h]


@functools.cache
def saved() -> Heads | None:
    """Return the queries and keys in the file that benchmarks/trained_heads.py writes, or None if there is no file."""
    if not SAVED.exists():
        return None
    with np.load(SAVED, allow_pickle=False) as arrays:
        return Heads(arrays["query"], arrays["key"])


def source() -> str:
    """Return a text for the tables that says whether the logits come from a trained model or are random."""
    if (heads := saved()) is None:
        return "random heads, fitted to a trained model"
    return "a trained model, {} heads on {} tokens".format(*heads.key.shape)


def means(N: int) -> np.ndarray:
    """Return the mean logits [N] of N random heads.

    A head with a lower mean attends farther. The means are in random order, as in a trained model.
    """
    ordered = FARTHEST * np.linspace(0, 1, N) ** CURVE if N > 1 else np.array([FARTHEST / 2])
    return np.random.default_rng(0).permutation(ordered)


def inputs(
    key, B: int, T: int, N: int, H: int, *, K: int | None = None, S: int | None = None, dtype=jnp.float32,
    heads: Heads | None = None,
):  # fmt: skip
    """Return (query [B,T,N,H], key [B,S,K,H], value [B,S,K,H]) for attention with the default scale H^-0.5.

    The values are standard normal. `K` None means N key heads, and `S` None means T keys.

    Without `heads`, the logits of head n have the distribution N(means(N)[n], 1). The first channel of the queries and
    keys determines the mean.

    With `heads`, the K key heads are taken from the M heads of a trained model, in random order. If K is above M, the M
    heads are used repeatedly. Every batch entry and every repetition begins at a random position of the text. Positions
    after the end of the text continue at its beginning. A matrix with orthonormal rows maps the h channels of the
    trained heads to H channels, which does not change the logits.

    Raises ValueError if the width h of the trained heads is above H.
    """
    S, K = S or T, K or N
    shapes = ((B, T, N, H), (B, S, K, H), jnp.dtype(dtype))
    # Jitted as a whole: separate eager steps would keep fp32 copies of a long cache.
    if heads is None:
        return jax.jit(_drawn, static_argnums=(1, 2, 3))(key, *shapes)
    if heads.key.shape[2] > H:
        raise ValueError(f"H={H} is below {heads.key.shape[2]}, the width of the trained heads; use a larger H")
    return jax.jit(_taken, static_argnums=(2, 3, 4))(key, Heads(*map(jnp.asarray, heads)), *shapes)


def _drawn(key, query_shape, key_shape, dtype):
    *_, N, H = query_shape
    q, k, v = (
        jax.random.normal(jax.random.fold_in(key, i), shape, dtype)
        for i, shape in enumerate((query_shape, key_shape, key_shape))
    )
    shifts = jnp.asarray(means(N) * H**0.5, dtype)
    return q.at[..., 0].set(jnp.broadcast_to(shifts, q.shape[:-1])), k.at[..., 0].set(1), v


def _taken(key, heads: Heads, query_shape, key_shape, dtype):
    (B, T, N, H), (_, S, K, _) = query_shape, key_shape
    M, P, h = heads.key.shape
    k_start, k_turn, k_value = jax.random.split(key, 3)
    head = np.random.default_rng(0).permutation(M)[np.arange(K) % M][None, None]
    start = jax.random.randint(k_start, (B, -(-K // M)), 0, P).repeat(M, axis=1)[:, :K]  # [B,K]
    place = (start[:, None] + jnp.arange(S)[None, :, None]) % P  # [B,S,K]
    rows = jnp.linalg.qr(jax.random.normal(k_turn, (H, h)))[0].T  # [h,H]

    def turn(x, scale):
        return jnp.einsum("...h,hH->...H", x * scale, rows, precision="highest").astype(dtype)

    # The G query heads that share a key head use the saved queries of G consecutive tokens. The last of these tokens is
    # at the position of the query. Here G is N // K.
    group = (jnp.arange(N) % (N // K))[None, None]
    late = jnp.repeat(place[:, S - T :], N // K, axis=2) - (N // K - 1 - group)
    query = turn(heads.query[np.repeat(head, N // K, axis=2), late % P].astype(jnp.float32), H**0.5)
    return query, turn(heads.key[head, place].astype(jnp.float32), 1.0), jax.random.normal(k_value, key_shape, dtype)


def cotangents(key, query, value):
    """Return random (cotangent of out, in the type of `value`; cotangent of rem, in fp32) for attention."""
    d_out = jax.random.normal(key, (*query.shape[:3], value.shape[-1]), value.dtype)
    return d_out, jax.random.normal(jax.random.fold_in(key, 1), query.shape[:3], jnp.float32)
