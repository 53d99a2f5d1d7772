"""The checked arguments of one call of stick-breaking attention, and its mask. Every implementation takes them."""

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
    skip_below: float | None  # log2 of the stick left
    tiles: tuple[int, int] | None  # query rows, key columns


class Where(NamedTuple):
    """The positions and segment ids of the queries and keys, which the mask reads.

    Code that runs under a vmap over the batch receives one batch entry, where the arrays have no axis B.
    """

    offset: jax.Array  # [B], position of the first query among the keys
    query_segments: jax.Array | None  # [B, T]
    key_segments: jax.Array | None  # [B, S]


class Mask(NamedTuple):
    """The static part of the mask of a call: the numbers of queries T and keys S, and the settings of the mask."""

    T: int
    S: int
    attend_current: bool
    window: int | None
    static_offset: int | None  # the offset, if it is known when the call is traced

    def visible(self, where: Where, q, k):
        """Return whether each query sees each key, for one batch entry: bool [len(q), len(k)].

        `q` and `k` are arrays of query indices and key indices. A query index of T or more (the padding of a tile) sees
        no key, and no query sees a key index of S or more. `where` has the arrays of the batch entry, without axis B.
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
    """Additional results of `stick_breaking_attention`, with `return_stats`.

    `log_rem` [B,T,N]: the natural logarithm of the stick left. `kept` [B,K]: the share of the key tiles in reach of the
    queries that was computed. It is below 1 only with `skip_below`.
    """

    log_rem: jax.Array
    kept: jax.Array


def letters(call: Call) -> Letters:
    """Return the letters of the axes of all arrays of a call, and the axes along which a mesh may divide the op.

    These are the batch B, the key heads K and the query heads N. Query heads are divided like the key heads that they
    read.
    """
    del call
    arrays = Call(
        query="B T N H", key="B S K H", value="B S K Hv", where=Where("B", "B T", "B S"), scale="", mask=STATIC,
        skip_below=STATIC, tiles=STATIC,
    )  # fmt: skip
    maps = {"B": "B", "N": "K", "K": "K"}
    return Letters("stick_breaking_attention", arrays, ("B T N Hv", "B T N", "B K"), maps)
