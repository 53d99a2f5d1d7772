"""The checked arguments of one call of stick-breaking attention, and its mask. Every implementation uses them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..partition import STATIC, Letters


class Call(NamedTuple):
    """Arrays and settings of one call. Default values are already filled in."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H]
    value: jax.Array  # [B, S, K, Hv]
    where: "Where"
    scale: float | jax.Array
    mask: "Mask"
    skip_below: float | None  # log2 of the stick left
    tiles: tuple[int, int] | None  # query rows, key columns


class Where(NamedTuple):
    """Positions and segments of the queries and keys. Under a vmap over the batch, the leaves have no axis B."""

    offset: jax.Array  # [B], position of the first query among the keys
    query_segments: jax.Array | None  # [B, T]
    key_segments: jax.Array | None  # [B, S]


class Mask(NamedTuple):
    """The static part of the mask."""

    T: int
    S: int
    attend_current: bool
    window: int | None
    static_offset: int | None  # the offset, if it is known when the call is traced

    def visible(self, where: Where, q, k):
        """Return whether query q sees key k, for one batch entry: bool [len(q), len(k)].

        An index outside the arrays (the padding of a tile) sees nothing, and no query sees it.
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
    """`log_rem` [B,T,N]: natural logarithm of the stick left. `kept` [B,K]: share of the key tiles computed."""

    log_rem: jax.Array
    kept: jax.Array


def letters(call: Call) -> Letters:
    """Return the letters of a call: the op is a map over the batch and over the key heads.

    Query heads are divided like the key heads that they read.
    """
    del call
    arrays = Call(
        query="B T N H", key="B S K H", value="B S K Hv", where=Where("B", "B T", "B S"), scale="", mask=STATIC,
        skip_below=STATIC, tiles=STATIC,
    )  # fmt: skip
    maps = {"B": "B", "N": "K", "K": "K"}
    return Letters("stick_breaking_attention", arrays, ("B T N Hv", "B T N", "B K"), maps)
