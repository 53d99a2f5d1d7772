"""The interface of the attention kernels, which fused.py calls. The Mosaic and Triton backends implement it.

`Kernels` has the three kernels of a backend. `Plan` has the sizes that are constants in a compiled kernel.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from .. import cost
from .call import Call

CACHED = 16 * 2**20  # bytes of keys and values that fit into the level-2 cache of every GPU


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes and settings of one call of an attention kernel, which are constants in the compiled kernel.

    In the kernels `forward` and `d_query`, a block of the GPU computes one or two query tiles of one head, with the key
    tiles that these queries see. The head is a query head, and its query rows are the T queries. In decoding, the head
    is a key head: the G query heads that use it are packed into one head with T * G query rows, and the field N has the
    same value as the field K. In the kernel `d_key_value`, a block computes one key tile of one key head. The
    properties `block_rows` and `tiles` are about the blocks of `forward` and `d_query`. Backends add fields in
    subclasses.
    """

    B: int
    rows: int  # query rows of a head: T, or T * G in decoding
    S: int
    N: int  # heads with query rows: query heads, or key heads in decoding
    K: int  # key heads
    H: int
    Hv: int
    dtype: jnp.dtype
    row_tile: int  # query rows of a tile; every query tile has one key-tile range
    key_tile: int  # keys of a tile
    attend_current: bool
    window: int | None
    skip_below: float | None
    segments: bool  # whether the call has segment ids
    per_position: int = 1  # query rows at one position: 1, or G in decoding
    splits: int = 1  # parts of the keys; each part is a batch entry in the key-tile ranges and in the results
    out_dtype: jnp.dtype | None = None  # the dtype of the output; None means `dtype`

    @staticmethod
    def sizes_of(call: Call) -> dict[str, Any]:
        """Return the fields of a `Plan` that depend only on the call and not on the backend, as {name: value}."""
        (B, _, N, H), (K, Hv), mask = call.query.shape, call.value.shape[2:], call.mask
        return dict(
            B=B, rows=mask.T, S=mask.S, N=N, K=K, H=H, Hv=Hv, dtype=call.query.dtype, window=mask.window,
            attend_current=mask.attend_current, skip_below=call.skip_below,
            segments=call.where.query_segments is not None,
        )  # fmt: skip

    def decoding(self, G: int, splits: int, **sizes: Any) -> "Plan":
        """Return a copy of this plan for decoding, that is, for few queries and many keys.

        The G query heads that share a key head become query rows of one head: row t * G + g is query t of the g-th of
        these G heads. The keys are split into `splits` parts. `sizes` are more fields to change in the copy, as
        name=value.
        """
        return replace(
            self, rows=self.rows * G, N=self.K, per_position=G, splits=splits, out_dtype=jnp.float32, skip_below=None,
            **sizes,
        )  # fmt: skip

    @property
    def block_rows(self) -> int:
        """The number of query rows of a head that one block computes."""
        return self.row_tile

    @property
    def tiles(self) -> int:
        """The number of blocks that compute one head: its query rows, divided by `block_rows` and rounded up."""
        return -(-self.rows // self.block_rows)

    @property
    def padded(self) -> int:
        """The number of query rows of a head, rounded up to a multiple of `block_rows`."""
        return self.tiles * self.block_rows

    @property
    def key_tiles(self) -> int:
        """The number of key tiles of a head. The last tile may have fewer keys than the others."""
        return -(-self.S // self.key_tile)

    @property
    def entries(self) -> int:
        """The size of the batch axis of the results: B times the number of parts into which the keys are split."""
        return self.B * self.splits

    @property
    def heads_together(self) -> int:
        """The number of heads in a group. The GPU computes the heads group by group.

        The keys and values of a group fit into the level-2 cache. But if one head does not fit, a group has one head.
        All groups have the same size, a divisor of entries * N.
        """
        heads = self.entries * self.N
        most = max(1, CACHED // max(1, self.S * (self.H + self.Hv) * jnp.dtype(self.dtype).itemsize))
        return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)

    @property
    def scores(self) -> int:
        """The number of (query, key) pairs that causality and the window permit, in all batch entries and query heads.

        This number assumes that the last query is at the position of the last key. It does not consider segments.
        """
        rows, window = self.rows // self.per_position, self.window
        scores = cost.visible_scores(rows, self.S, attend_current=self.attend_current, window=window)
        return self.B * self.N * self.per_position * scores


@runtime_checkable
class Kernels(Protocol):
    """The attention kernels of one backend. The object is hashable, so that it can be a static argument of a function.

    The methods take the arrays below. The letters and names in their shapes are fields of `Plan`. But the arrays of
    queries may have more than `rows` rows, and the arrays of keys more than S, because they are padded to multiples of
    `row_multiple`.
    - query [B,rows,N,H], key [B,S,K,H], value [B,S,K,Hv] and scale [], the factor of the logits.
    - d_out [B,rows,N,Hv] and d_log_rem [B,N,padded]: the cotangents of the output and of log_rem, the natural logarithm
      of the part of the stick that remains.
    - reached [entries, N, query tiles]: the index of the leftmost key tile that `forward` computed for each query tile.
      A head has padded / row_tile query tiles.
    - `*planned`: the arrays of the mask. They are the key-tile ranges [entries, query tiles, 4] (`key_tile_ranges`) and
      the position of the first query among the keys [B]. If the call has segments, the segment ids of the queries
      [B, padded] and of the keys [B, key_tiles * key_tile] follow.
    """

    snapshot_bytes: int  # bytes of the snapshots (see `d_query`) of one query row and one key tile
    row_multiple: int  # the numbers of queries and of keys of the arrays must be multiples of this

    def plan(self, call: Call, *, backward: bool = False, decoding: tuple[int, int] | None = None) -> Plan:
        """Return the `Plan` of a call for the kernel `forward`. If `backward`, it is for `d_query` and `d_key_value`.

        `decoding` is None, except in decoding. There it is a pair: the number of query heads that share a key head, and
        the number of parts into which the keys are split.
        """

    def forward(self, plan: Any, query, key, value, scale, *planned) -> tuple:
        """Compute the forward pass. Return (out [entries,rows,N,Hv], log_decay [2,entries,N,padded], reached).

        `log_decay` is the cumulative log-decay of each query row: -log2 of the part of the stick that remains, a
        positive number. It is stored as the sum of two fp32 numbers. `reached` [entries, N, query tiles] is the index
        of the leftmost key tile that was computed for each query tile. `*planned` are the arrays of the mask.
        """

    def d_query(self, plan: Any, query, key, value, d_out, d_log_rem, log_decay, reached, scale, *planned) -> tuple:
        """Compute the gradient of the queries. Return (d_query [B,rows,N,H], d_scale [B,N,padded], snapshots).

        d_scale is what every query row adds to the gradient of the scale. `log_decay` and `reached` are results of
        `forward`. The snapshots are two numbers for every query row and key tile:
        - the sum of -log2(1 - sigmoid(logit)) over all keys on the right of the tile;
        - P: d_log_rem plus the sum of weight * <d_out, value> over all keys on the left of the tile.
        `d_key_value` reads these two numbers, so it needs no running sum over other key tiles. The Mosaic backend
        stores the two numbers for each half of a key tile instead. Each backend chooses the shape of the array.
        """

    def d_key_value(self, plan: Any, query, key, value, d_out, snapshots, reached, scale, *planned) -> tuple:
        """Compute the gradients of the keys and values. Return (d_key [B,S,K,H], d_value [B,S,K,Hv]).

        `snapshots` is a result of `d_query`, and `reached` is a result of `forward`.
        """
