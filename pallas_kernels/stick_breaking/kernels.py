"""What Mosaic and Triton each give to `fused`: a set of attention kernels, and the static sizes of their calls."""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from .. import cost
from .call import Call

CACHED = 16 * 2**20  # bytes of keys and values that the level-2 cache of a GPU certainly holds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Static sizes of one call of a kernel. A set of kernels adds the sizes that it alone needs."""

    B: int
    rows: int  # query rows of a head: T, or T * G where the heads of a group are packed (decoding)
    S: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: jnp.dtype
    row_tile: int  # query rows of a tile, each with a key-tile range of its own
    key_tile: int  # keys of a tile
    attend_current: bool
    window: int | None
    skip_below: float | None
    segments: bool  # whether the call has segment ids
    per_position: int = 1  # query rows at one position
    splits: int = 1  # parts of the keys; each is a batch entry of its own in the key-tile ranges and in the results
    out_dtype: jnp.dtype | None = None  # None: dtype

    @staticmethod
    def sizes_of(call: Call) -> dict[str, Any]:
        """The fields that follow from a call alone."""
        (B, _, N, H), (K, Hv), mask = call.query.shape, call.value.shape[2:], call.mask
        return dict(
            B=B, rows=mask.T, S=mask.S, N=N, K=K, H=H, Hv=Hv, dtype=call.query.dtype, window=mask.window,
            attend_current=mask.attend_current, skip_below=call.skip_below,
            segments=call.where.query_segments is not None,
        )  # fmt: skip

    def decoding(self, G: int, splits: int, **sizes: Any) -> "Plan":
        """The plan for decoding. The G query heads of a key head become rows of one head, and the keys are split."""
        return replace(
            self, rows=self.rows * G, N=self.K, per_position=G, splits=splits, out_dtype=jnp.float32, skip_below=None,
            **sizes,
        )  # fmt: skip

    @property
    def block_rows(self) -> int:
        """Query rows of a head that one block computes."""
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
        """Batch entries of the results."""
        return self.B * self.splits

    @property
    def heads_together(self) -> int:
        """The number of heads that blocks work on at the same time, so that their keys and values share the cache."""
        heads = self.entries * self.N
        most = max(1, CACHED // max(1, self.S * (self.H + self.Hv) * jnp.dtype(self.dtype).itemsize))
        return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)

    @property
    def scores(self) -> int:
        """(query, key) pairs inside the mask, if the last query stands at the last key."""
        rows, window = self.rows // self.per_position, self.window
        scores = cost.visible_scores(rows, self.S, attend_current=self.attend_current, window=window)
        return self.B * self.N * self.per_position * scores


@runtime_checkable
class Kernels(Protocol):
    """The attention kernels of one backend. They are hashable: `jax.custom_vjp` takes them as a static argument.

    All kernels take `*planned` last: the key-tile ranges [entries, query tiles, 4], the offsets [B], and, where a call
    has segments, the ids of its queries [B, padded] and of its keys [B, key_tiles * key_tile]. A head has
    padded / row_tile query tiles. `reached` [entries, N, query tiles] is the first key tile that each of them visited.
    """

    snapshot_bytes: int  # of one query row and one key tile
    row_multiple: int  # the kernels take arrays whose numbers of queries and of keys are multiples of this

    def plan(self, call: Call, *, backward: bool = False, decoding: tuple[int, int] | None = None) -> Plan:
        """The sizes for a call. `decoding`: (the query heads of a key head, the splits of the keys)."""

    def forward(self, plan: Any, query, key, value, scale, *planned) -> tuple:
        """(out [entries,rows,N,Hv], log_decay [2,entries,N,padded], reached).

        `log_decay` is the cumulative log-decay of each row, to base 2 and positive, as the sum of two fp32 numbers.
        """

    def d_query(self, plan: Any, query, key, value, d_out, d_log_rem, log_decay, reached, scale, *planned) -> tuple:
        """(d_query, the gradient of the scale for every row [B,N,padded], snapshots).

        Every element of the snapshots belongs to one head and one key tile.
        """

    def d_key_value(self, plan: Any, query, key, value, d_out, snapshots, reached, scale, *planned) -> tuple:
        """(d_key, d_value)."""
