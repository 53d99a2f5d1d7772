"""Queries and keys for timing early exit, whose heads attend as far as the heads of a trained model.

If benchmarks/trained_heads.py has written runs/trained_heads.npz, they are taken from the trained model in that file.
Otherwise they are drawn at random: the logits of head n are N(mean_n, 1). The means are fitted to the share of the
64 x 64 tiles that a trained model kept (0.9M parameters, source code as text, skip_below=-24): 34% at T=1024 and 21% at
T=2048, with heads from 12% to 65%. In both cases most heads attend within one tile, and a few reach some hundred keys.
Standard normal queries and keys would make early exit look too good, because nearly all tiles would be skipped. One
mean for all heads would make it look too balanced, because all heads would have the same work.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SKIP = -24.0  # the value of skip_below in all benchmarks of early exit
FARTHEST, CURVE = -4.1, 2.3
SAVED = Path(__file__).parent.parent / "runs" / "trained_heads.npz"


class Heads(NamedTuple):
    """The M heads of a trained model on a text of P tokens. The query contains the scale: logits are query . key."""

    query: np.ndarray  # [M, P, h]
    key: np.ndarray


@functools.cache
def saved() -> Heads | None:
    """Return the heads that benchmarks/trained_heads.py has written, or None."""
    if not SAVED.exists():
        return None
    with np.load(SAVED, allow_pickle=False) as arrays:
        return Heads(arrays["query"], arrays["key"])


def source() -> str:
    """Return a text for a table: the origin of the logits that `inputs` makes."""
    if (heads := saved()) is None:
        return "drawn, fitted to a trained model's"
    return "a trained model's, {} heads on {} tokens".format(*heads.key.shape)


def means(N: int) -> np.ndarray:
    """Return the mean logit of each of N drawn heads. Near and far heads are in random order, as after a training."""
    ordered = FARTHEST * np.linspace(0, 1, N) ** CURVE if N > 1 else np.array([FARTHEST / 2])
    return np.random.default_rng(0).permutation(ordered)


def inputs(
    key, B: int, T: int, N: int, H: int, *, K: int | None = None, S: int | None = None, dtype=jnp.float32,
    heads: Heads | None = None,
):  # fmt: skip
    """Return (query [B,T,N,H], key and value [B,S,K,H]) for the default scale; the values are standard normal.

    Without `heads`, the logits are drawn as N(means(N), 1); the first channel makes the mean. With `heads`, the model's
    heads are used in turn, again from the first if there are too few. Every batch entry and every such repetition
    begins at a random place of the text; after the end of the text comes its beginning. A matrix with orthonormal rows
    maps the h channels to H, which does not change the logits.
    """
    S, K = S or T, K or N
    shapes = ((B, T, N, H), (B, S, K, H), jnp.dtype(dtype))
    # Jitted as a whole: separate eager steps would keep fp32 copies of a long cache.
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

    # The query heads that share a key head take the queries of consecutive tokens, up to the query's position.
    group = (jnp.arange(N) % (N // K))[None, None]
    late = jnp.repeat(place[:, S - T :], N // K, axis=2) - (N // K - 1 - group)
    query = turn(heads.query[np.repeat(head, N // K, axis=2), late % P].astype(jnp.float32), H**0.5)
    return query, turn(heads.key[head, place].astype(jnp.float32), 1.0), jax.random.normal(k_value, key_shape, dtype)


def cotangents(key, query, value):
    """Return random cotangents of `out`, in the type of the values, and of `rem`, in fp32."""
    d_out = jax.random.normal(key, (*query.shape[:3], value.shape[-1]), value.dtype)
    return d_out, jax.random.normal(jax.random.fold_in(key, 1), query.shape[:3], jnp.float32)
