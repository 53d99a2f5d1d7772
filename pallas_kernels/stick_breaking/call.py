"""The types of one call of stick-breaking attention: its checked arguments, and the mask that hides keys from queries.

Every implementation takes a `Call`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..partition import STATIC, Letters


class Call(NamedTuple):
    """The arrays and settings of one call of `stick_breaking_attention`, with the default values filled in."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H]
    value: jax.Array  # [B, S, K, Hv]
    where: "Where"
    scale: float | jax.Array
    mask: "Mask"
    skip_below: float | None  # log2 of the part of a stick below which further keys are skipped
    tiles: tuple[int, int] | None  # (number of queries, number of keys) of a tile


class Where(NamedTuple):
    """The arrays that a `Mask` needs to decide which query sees which key: positions and segment ids.

    Code that runs under a vmap over the batch receives one batch entry. Then the arrays have no axis B.
    """

    offset: jax.Array  # [B], position of the first query among the keys
    query_segments: jax.Array | None  # [B, T]
    key_segments: jax.Array | None  # [B, S]


class Mask(NamedTuple):
    """The part of a mask that is known when a call is traced: T queries, S keys, causality and the window."""

    T: int
    S: int
    attend_current: bool  # whether a query also sees the key at its own position
    window: int | None  # how many positions before the query a key may be; None is no limit
    static_offset: int | None  # the position of the first query, if it is known when the call is traced

    def visible(self, where: Where, q, k):
        """Return whether each query sees each key, for one batch entry: bool [len(q), len(k)].

        `q` and `k` are arrays of query indices and key indices. A query with an index of T or more is padding and sees
        no keys. No query sees a key with an index of S or more. The arrays of `where` have no axis B.
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
    [B,K]: the number of key tiles computed, divided by the number of key tiles that the queries may see. It is below 1
    only with `skip_below`.
    """

    log_rem: jax.Array
    kept: jax.Array


def letters(call: Call) -> Letters:
    """Return the letters of the axes of every array of a call, such as "B T N H", and the axes that a mesh may divide.

    A mesh may divide the batch B, the key heads K and the query heads N. Query heads are divided in the same way as the
    key heads that they use.
    """
    del call
    arrays = Call(
        query="B T N H", key="B S K H", value="B S K Hv", where=Where("B", "B T", "B S"), scale="", mask=STATIC,
        skip_below=STATIC, tiles=STATIC,
    )  # fmt: skip
    maps = {"B": "B", "N": "K", "K": "K"}
    return Letters("stick_breaking_attention", arrays, ("B T N Hv", "B T N", "B K"), maps)
