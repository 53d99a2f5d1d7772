"""The interface between `fused` and the backends Mosaic and Triton: three attention kernels and their static sizes."""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from .. import cost
from .call import Call

CACHED = 16 * 2**20  # bytes of keys and values that fit into the level-2 cache of every GPU


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The static sizes of one call of a kernel. Each backend has a subclass with the sizes that only its kernels need.

    A block of the GPU computes a few query tiles of one head. It visits the key tiles that these queries see.
    """

    B: int
    rows: int  # query rows of a head: T, or T * G if the heads of a group are packed (decoding)
    S: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: jnp.dtype
    row_tile: int  # query rows of a tile; every tile has its key-tile range
    key_tile: int  # keys of a tile
    attend_current: bool
    window: int | None
    skip_below: float | None
    segments: bool  # whether the call has segment ids
    per_position: int = 1  # query rows at one position
    splits: int = 1  # parts of the keys; each part is a batch entry in the key-tile ranges and in the results
    out_dtype: jnp.dtype | None = None  # None: dtype

    @staticmethod
    def sizes_of(call: Call) -> dict[str, Any]:
        """Return the fields of a plan that depend only on the call, as {name: value}."""
        (B, _, N, H), (K, Hv), mask = call.query.shape, call.value.shape[2:], call.mask
        return dict(
            B=B, rows=mask.T, S=mask.S, N=N, K=K, H=H, Hv=Hv, dtype=call.query.dtype, window=mask.window,
            attend_current=mask.attend_current, skip_below=call.skip_below,
            segments=call.where.query_segments is not None,
        )  # fmt: skip

    def decoding(self, G: int, splits: int, **sizes: Any) -> "Plan":
        """Return this plan changed for decoding, that is, for few queries and many keys.

        The G query heads of a key head become query rows of one head. The keys are split into `splits` parts. `sizes`
        are other fields to replace.
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
        """The number of blocks that compute the query rows of one head."""
        return -(-self.rows // self.block_rows)

    @property
    def padded(self) -> int:
        """The number of query rows of a head, padded to whole blocks."""
        return self.tiles * self.block_rows

    @property
    def key_tiles(self) -> int:
        """The number of key tiles of a head; the last tile may be partial."""
        return -(-self.S // self.key_tile)

    @property
    def entries(self) -> int:
        """The number of batch entries of the results: each of the B entries once for every split of its keys."""
        return self.B * self.splits

    @property
    def heads_together(self) -> int:
        """The number of heads that are computed at the same time, so that their keys and values fit into the cache."""
        heads = self.entries * self.N
        most = max(1, CACHED // max(1, self.S * (self.H + self.Hv) * jnp.dtype(self.dtype).itemsize))
        return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)

    @property
    def scores(self) -> int:
        """The number of (query, key) pairs that the causal mask keeps, over all batch entries and query heads.

        The last query is assumed to be at the position of the last key. Segments are not considered.
        """
        rows, window = self.rows // self.per_position, self.window
        scores = cost.visible_scores(rows, self.S, attend_current=self.attend_current, window=window)
        return self.B * self.N * self.per_position * scores


@runtime_checkable
class Kernels(Protocol):
    """The attention kernels of one backend. The object is hashable, so that it can be a static argument of a function.

    The arrays are query [B,rows,N,H], key [B,S,K,H], value [B,S,K,Hv], d_out [B,rows,N,Hv] and d_log_rem [B,N,padded].
    The sizes are fields of the plan; rows and S of the arrays may be padded to multiples of `row_multiple`. The last
    arguments of every kernel are `*planned`: the key-tile ranges [entries, query tiles, 4], the offsets [B], and, if a
    call has segments, the ids of its queries [B, padded] and of its keys [B, key_tiles * key_tile]. A head has padded /
    row_tile query tiles. `reached` [entries, N, query tiles] is the leftmost key tile that each query tile visited in
    the forward pass.
    """

    snapshot_bytes: int  # bytes of the snapshots of one query row and one key tile
    row_multiple: int  # the numbers of queries and of keys of the arrays must be multiples of this

    def plan(self, call: Call, *, backward: bool = False, decoding: tuple[int, int] | None = None) -> Plan:
        """Return the sizes of the kernels for a call, forward or `backward`.

        `decoding`: (the number of query heads of a key head, the number of splits of the keys), or None.
        """

    def forward(self, plan: Any, query, key, value, scale, *planned) -> tuple:
        """Return (out [entries,rows,N,Hv], log_decay [2,entries,N,padded], reached): the forward pass.

        `log_decay` is the cumulative log-decay of each query row: -log2 of the stick left, a positive number, as the
        sum of two fp32 numbers.
        """

    def d_query(self, plan: Any, query, key, value, d_out, d_log_rem, log_decay, reached, scale, *planned) -> tuple:
        """Return (d_query, the contribution of every row to the gradient of the scale [B,N,padded], snapshots).

        The snapshots are what `d_key_value` needs to compute any key tile alone: for every query row and key tile, the
        cumulative log-decay on entry to the tile, and P = d_log_rem + the sum of weight * <d_out, value> over the keys
        on the left of the tile. Each backend chooses their shape. Every element belongs to one head and one key tile.
        """

    def d_key_value(self, plan: Any, query, key, value, d_out, snapshots, reached, scale, *planned) -> tuple:
        """Return (d_key [B,S,K,H], d_value [B,S,K,Hv]), given the snapshots that `d_query` returned."""
