"""Queries and keys whose heads reach as far as those of a trained model: what early exit is honestly timed on.

They are those of runs/trained_heads.npz, where benchmarks/trained_heads.py left the heads of a trained model. Without
that file they are drawn: the logits of head n are N(mean_n, 1), the means fitted to what such a model kept (0.9M
parameters, source code as text, skip_below=-24): 34% of its 64 x 64 tiles at T=1024 and 21% at T=2048, its heads from
12% to 65%. Either way most heads forget within a tile, and a few reach some hundred keys. Standard normal queries and
keys would skip nearly everything, and one mean for all heads would balance the work by itself.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SKIP = -24.0  # skip_below wherever early exit is timed
FARTHEST, CURVE = -4.1, 2.3
SAVED = Path(__file__).parent.parent / "runs" / "trained_heads.npz"


class Heads(NamedTuple):
    """The M heads of a trained model on one text of P tokens; the logits are query . key, the scale is in the query."""

    query: np.ndarray  # [M, P, h]
    key: np.ndarray


@functools.cache
def saved() -> Heads | None:
    """What the recipe left, if it was run."""
    if not SAVED.exists():
        return None
    with np.load(SAVED, allow_pickle=False) as arrays:
        return Heads(arrays["query"], arrays["key"])


def source() -> str:
    """Where `inputs` takes its logits from, for a table."""
    if (heads := saved()) is None:
        return "drawn, fitted to a trained model's"
    return "a trained model's, {} heads on {} tokens".format(*heads.key.shape)


def means(N: int) -> np.ndarray:
    """Of the logits of each of N heads, where they are drawn. Near and far heads are mixed, as training leaves them."""
    ordered = FARTHEST * np.linspace(0, 1, N) ** CURVE if N > 1 else np.array([FARTHEST / 2])
    return np.random.default_rng(0).permutation(ordered)


def inputs(
    key, B: int, T: int, N: int, H: int, *, K: int | None = None, S: int | None = None, dtype=jnp.float32,
    heads: Heads | None = None,
):  # fmt: skip
    """(query [B,T,N,H], key and value [B,S,K,H]) for the default scale; the values are standard normal.

    Of `heads`, or drawn: logits N(means(N), 1), the mean carried by the first channel. The heads of a model are taken
    in turn, and every entry of the batch and every turn begins elsewhere in the text, which is read in a circle. Their
    h channels are turned into H by a matrix with orthonormal rows, so that the logits stay.
    """
    S, K = S or T, K or N
    shapes = ((B, T, N, H), (B, S, K, H), jnp.dtype(dtype))
    # Whole: eager steps would keep fp32 copies of a long cache.
    if heads is None:
        return jax.jit(_drawn, static_argnums=(1, 2, 3))(key, *shapes)
    if heads.key.shape[2] > H:
        raise ValueError(f"heads of H={H} cannot hold the logits of a model's heads of H={heads.key.shape[2]}")
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

    # Several queries on one key head are those of as many tokens in a row, the last one's included.
    group = (jnp.arange(N) % (N // K))[None, None]
    late = jnp.repeat(place[:, S - T :], N // K, axis=2) - (N // K - 1 - group)
    query = turn(heads.query[np.repeat(head, N // K, axis=2), late % P].astype(jnp.float32), H**0.5)
    return query, turn(heads.key[head, place].astype(jnp.float32), 1.0), jax.random.normal(k_value, key_shape, dtype)


def cotangents(key, query, value):
    """Random ones of `out`, in the type of the values, and of `rem`, in fp32."""
    d_out = jax.random.normal(key, (*query.shape[:3], value.shape[-1]), value.dtype)
    return d_out, jax.random.normal(jax.random.fold_in(key, 1), query.shape[:3], jnp.float32)
