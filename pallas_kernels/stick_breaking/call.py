"""The types of one call of stick-breaking attention: `Call` has its arguments, and `Mask` hides keys from queries.

Every implementation of the op takes a `Call`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..partition import STATIC, Letters


class Call(NamedTuple):
    """The arrays and settings of one call of `stick_breaking_attention`, checked and with the defaults filled in."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H]
    value: jax.Array  # [B, S, K, Hv]
    where: "Where"
    scale: float | jax.Array
    mask: "Mask"
    skip_below: float | None  # if less than 2^skip_below remains of all sticks of a query tile, skip further keys
    tiles: tuple[int, int] | None  # (number of queries, number of keys) of a tile


class Where(NamedTuple):
    """The arrays of the attention mask: the position of the first query, and the segment ids of queries and keys.

    The arrays begin with the batch axis B. Code that computes a single batch entry gets them without this axis.
    """

    offset: jax.Array  # [B], position of the first query among the keys
    query_segments: jax.Array | None  # [B, T]
    key_segments: jax.Array | None  # [B, S]


class Mask(NamedTuple):
    """The part of the attention mask that is known when JAX traces a call: Python values. `Where` has the arrays.

    The mask is always causal: a query never sees a key to the right of its own position. T and S are the numbers of
    queries and keys. With `attend_current`, a query also sees the key at its own position. With a `window`, it sees
    only keys that are at most `window` positions to its left. `static_offset` is the position of the first query, or
    None if the caller gives this position as an array. Then the mask uses the array `Where.offset`.
    """

    T: int  # number of queries
    S: int  # number of keys
    attend_current: bool  # whether a query also sees the key at its own position
    window: int | None  # the largest distance of a key to the left of the query; None is no limit
    static_offset: int | None  # the position of the first query; None if the caller gives it as an array

    def visible(self, where: Where, q, k):
        """Return whether each query sees each key, for one batch entry: bool [len(q), len(k)].

        `q` and `k` are arrays of query indices and key indices. A query with an index of T or more is padding and sees
        no keys. No query sees a key with an index of S or more. `where` has the arrays of this batch entry, without
        axis B.
        """
        offset = where.offset if self.static_offset is None else self.static_offset
        distance = (offset + q)[:, None] - k[None, :]
        seen = (distance >= (0 if self.attend_current else 1)) & (q < self.T)[:, None] & (k < self.S)[None, :]
        if self.window is not None:
            seen &= distance <= self.window
        if where.query_segments is not None:
            seg_q = jnp.take(where.query_segments, q, mode="clip")[:, None]
            seg_k = jnp.take(where.key_segments, k, mode="clip")[None, :]
            seen &= (seg_q == seg_k) & (seg_q >= 0)
        return seen


class Stats(NamedTuple):
    """The additional results that `stick_breaking_attention` returns with `return_stats`.

    `log_rem` [B,T,N]: the natural logarithm of the part of each query's stick that remains after all keys. `kept`
    [B,K]: the number of key tiles computed, divided by the number of key tiles that the queries may see, for each batch
    entry and key head. It is below 1 only with `skip_below`.
    """

    log_rem: jax.Array
    kept: jax.Array


def share_of(computed, total) -> jax.Array:
    """Return the share of the key tiles that were computed: `computed` / `total` in float32, and 1 if `total` is 0.

    If all tiles were computed, the share is exactly 1. The division itself does not give this: XLA may replace it by a
    multiplication with 1 / `total`, and 55 * (1 / 55) is 0.99999994 in float32.
    """
    return 1 - (total - computed).astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)


def letters(call: Call) -> Letters:
    """Return the letters of the axes of all arrays of `stick_breaking_attention`, and which axes may be sharded.

    The letters of `query` are "B T N H", for example. The batch B, the query heads N and the key heads K may be sharded
    over a mesh. N and K are sharded over the same mesh axes, so that each device has the key heads that its query heads
    use. The result is the same for every call.
    """
    del call
    arrays = Call(
        query="B T N H", key="B S K H", value="B S K Hv", where=Where("B", "B T", "B S"), scale="", mask=STATIC,
        skip_below=STATIC, tiles=STATIC,
    )  # fmt: skip
    maps = {"B": "B", "N": "K", "K": "K"}
    return Letters("stick_breaking_attention", arrays, ("B T N Hv", "B T N", "B K"), maps)
