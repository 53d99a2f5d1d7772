"""Key-tile ranges: which key tiles must be computed for each query tile, and which of them need no mask.

The ranges consider everything that hides keys from queries: causality, window, offset, segments, and the padding of the
last tiles. So a GPU kernel has only two loop bodies: one with a mask and one without a mask.
"""

import jax.numpy as jnp
import numpy as np

from .call import Call


def key_tile_ranges(call: Call, rows: int, columns: int, per_position: int = 1):
    """Return the key-tile range of every query tile, (stop, whole_stop, whole_start, start): int32 [B, query tiles, 4].

    The four numbers of a range are indices of key tiles, in descending order. A kernel computes the key tiles
    start..stop-1 for the query tile. Among them, the key tiles whole_start..whole_stop-1 need no mask, because every
    query of the query tile sees every key of these tiles. An empty range is four zeros.

    Args:
      call: the checked arguments of the op.
      rows: the number of query rows of a query tile.
      columns: the number of keys of a key tile.
      per_position: the number of query rows at one position. It is 1, except in decoding, where all query heads that
        share a key head are rows at the same position.
    """
    mask, where = call.mask, call.where
    T = mask.T * per_position
    first_q, first_k = np.arange(0, T, rows), np.arange(0, mask.S, columns)
    last_q = (np.minimum(first_q + rows, T) - 1) // per_position
    first_q, last_k = first_q // per_position, np.minimum(first_k + columns, mask.S) - 1
    offset, nearest = where.offset[:, None, None], 0 if mask.attend_current else 1
    reached = offset + (last_q[:, None] - first_k)[None] >= nearest
    whole = (offset + (first_q[:, None] - last_k)[None] >= nearest) & (first_k + columns <= mask.S)[None, None]
    if mask.window is not None:
        reached &= offset + (first_q[:, None] - last_k)[None] <= mask.window
        whole &= offset + (last_q[:, None] - first_k)[None] <= mask.window
    if where.query_segments is not None:
        low_q, high_q, pad_q = _segment_range(jnp.repeat(where.query_segments, per_position, 1), rows)
        low_k, high_k, pad_k = _segment_range(where.key_segments, columns)
        reached &= (low_q[:, :, None] <= high_k[:, None]) & (low_k[:, None] <= high_q[:, :, None])
        is_one_segment = (
            (low_q == high_q)[:, :, None] & (low_q[:, :, None] == low_k[:, None]) & (low_k == high_k)[:, None]
        )
        whole &= is_one_segment & ~pad_q[:, :, None] & ~pad_k[:, None]
    whole &= reached
    n, tile = len(first_k), jnp.arange(len(first_k))[None, None]
    if n == 0:
        return jnp.zeros((reached.shape[0], len(first_q), 4), jnp.int32)
    stop = jnp.where(reached, tile + 1, 0).max(-1)
    start = jnp.minimum(jnp.where(reached, tile, n).min(-1), stop)
    # There may be several sequences of neighbouring key tiles that need no mask. Take the rightmost sequence.
    whole_stop = jnp.where(whole, tile + 1, 0).max(-1)
    broken = jnp.where(~whole & (tile < whole_stop[..., None]), tile + 1, 0).max(-1)
    is_empty = whole_stop <= start
    whole_stop = jnp.where(is_empty, start, whole_stop)
    whole_start = jnp.where(is_empty, start, jnp.maximum(broken, start))
    return jnp.stack([stop, whole_stop, whole_start, start], -1).astype(jnp.int32)


def query_tile_ranges(key_ranges, reached, key_tiles: int):
    """Return, for every key tile and query head, the range of the query tiles for which the key tile is computed.

    The result is int32 [B, N, key tiles, 4]. The four numbers of a range, (first, whole_first, whole_stop, stop), are
    indices of query tiles, in ascending order. The key tile is computed without a mask for the query tiles
    whole_first..whole_stop-1. For the other query tiles in first..stop-1, it is computed with a mask or not at all. For
    query tiles outside first..stop-1, it is not computed. An empty range is four zeros.

    Args:
      key_ranges: a result of `key_tile_ranges`, [B, query tiles, 4].
      reached: [B, N, query tiles], the index of the leftmost key tile that the forward pass computed for a query tile.
      key_tiles: the number of key tiles.
    """
    stop, whole_stop, whole_start, start = (key_ranges[:, None, :, None, which] for which in range(4))
    start, key = jnp.maximum(start, reached[..., None]), jnp.arange(key_tiles)[None, None, None]
    visits = (start <= key) & (key < stop)
    whole = visits & (whole_start <= key) & (key < whole_stop)
    n = key_ranges.shape[1]
    tile = jnp.arange(n)[None, None, :, None]
    last = jnp.where(visits, tile + 1, 0).max(2)
    first = jnp.minimum(jnp.where(visits, tile, n).min(2), last)
    whole_first = jnp.minimum(jnp.where(whole, tile, n).min(2), last)
    broken = jnp.where(~whole & (tile >= whole_first[:, :, None]), tile, n).min(2)
    return jnp.stack([first, whole_first, jnp.minimum(broken, last), last], -1).astype(jnp.int32)


def _segment_range(segments, size):
    """Return (smallest segment id, largest segment id, whether there is padding) of every tile, each [B, tiles].

    `segments` [B, length] are the segment ids of the queries or of the keys, and `size` is the number of ids of a tile.
    Padding has negative ids. The smallest id of a tile does not count padding. If a tile has only padding, its smallest
    id is the largest integer of the dtype.
    """
    pad = -segments.shape[1] % size
    tiles = jnp.pad(segments, ((0, 0), (0, pad)), mode="edge").reshape(segments.shape[0], -1, size)
    big = jnp.asarray(jnp.iinfo(tiles.dtype).max, tiles.dtype)
    return jnp.where(tiles < 0, big, tiles).min(-1), tiles.max(-1), (tiles < 0).any(-1)
