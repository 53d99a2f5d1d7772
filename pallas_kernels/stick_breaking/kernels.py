"""The interface between `fused` and the backends Mosaic and Triton: attention kernels, and the sizes of their calls."""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from .. import cost
from .call import Call

CACHED = 16 * 2**20  # bytes of keys and values that fit into the level-2 cache of every GPU


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Static sizes of one call of a kernel. Each backend adds the sizes that only its kernels need."""

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
        """Return the fields that depend only on the call."""
        (B, _, N, H), (K, Hv), mask = call.query.shape, call.value.shape[2:], call.mask
        return dict(
            B=B, rows=mask.T, S=mask.S, N=N, K=K, H=H, Hv=Hv, dtype=call.query.dtype, window=mask.window,
            attend_current=mask.attend_current, skip_below=call.skip_below,
            segments=call.where.query_segments is not None,
        )  # fmt: skip

    def decoding(self, G: int, splits: int, **sizes: Any) -> "Plan":
        """Return the plan for decoding.

        The G query heads of a key head become rows of one head, and the keys are split.
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
        """The number of blocks that the query rows of a head are cut into."""
        return -(-self.rows // self.block_rows)

    @property
    def padded(self) -> int:
        """The number of query rows of a head, padded to whole blocks."""
        return self.tiles * self.block_rows

    @property
    def key_tiles(self) -> int:
        return -(-self.S // self.key_tile)

    @property
    def entries(self) -> int:
        """The number of batch entries of the results."""
        return self.B * self.splits

    @property
    def heads_together(self) -> int:
        """The number of heads that blocks work on at the same time, so that their keys and values share the cache."""
        heads = self.entries * self.N
        most = max(1, CACHED // max(1, self.S * (self.H + self.Hv) * jnp.dtype(self.dtype).itemsize))
        return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)

    @property
    def scores(self) -> int:
        """The number of (query, key) pairs inside the mask, if the last query is at the position of the last key."""
        rows, window = self.rows // self.per_position, self.window
        scores = cost.visible_scores(rows, self.S, attend_current=self.attend_current, window=window)
        return self.B * self.N * self.per_position * scores


@runtime_checkable
class Kernels(Protocol):
    """The attention kernels of one backend. They are hashable, because `jax.custom_vjp` takes them as static.

    The last arguments of every kernel are `*planned`: the key-tile ranges [entries, query tiles, 4], the offsets [B],
    and, if a call has segments, the ids of its queries [B, padded] and of its keys [B, key_tiles * key_tile]. A head
    has padded / row_tile query tiles. `reached` [entries, N, query tiles] is the leftmost key tile that each query tile
    visited.
    """

    snapshot_bytes: int  # bytes of the snapshots of one query row and one key tile
    row_multiple: int  # the numbers of queries and of keys of the arrays must be multiples of this

    def plan(self, call: Call, *, backward: bool = False, decoding: tuple[int, int] | None = None) -> Plan:
        """Return the sizes for a call. `decoding`: (query heads of a key head, splits of the keys), or None."""

    def forward(self, plan: Any, query, key, value, scale, *planned) -> tuple:
        """Return (out [entries,rows,N,Hv], log_decay [2,entries,N,padded], reached).

        `log_decay` is the cumulative log-decay of each row, to base 2 and positive, as the sum of two fp32 numbers.
        """

    def d_query(self, plan: Any, query, key, value, d_out, d_log_rem, log_decay, reached, scale, *planned) -> tuple:
        """Return (d_query, the gradient of the scale for every row [B,N,padded], snapshots).

        Every element of the snapshots belongs to one head and one key tile.
        """

    def d_key_value(self, plan: Any, query, key, value, d_out, snapshots, reached, scale, *planned) -> tuple:
        """Return (d_key, d_value)."""
