"""The tiles of a long call of the implementation "xla", and the range of key tiles that each query tile visits.

A long call loops over key tiles. In a short call, one key tile has all keys. `xla._is_short` decides which call it is.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import cost, platform
from .call import Call, Where

_LONG_TILES = (256, 256)  # (queries, keys) of a tile of a long call
_SKIP_TILES = (128, 256)  # (queries, keys) of a tile of a long call with skip_below
_SKIP_ROWS_ON_CPU, _SKIP_SCORES_ON_CPU = 64, 2048  # queries and scores of such a tile on a CPU


def long_tiles(call):
    """Return (number of queries, number of keys) of a tile, for a call that is computed tile by tile."""
    rows, columns = call.tiles or (_LONG_TILES if call.skip_below is None else _skip_tiles(call))
    return max(1, min(rows, call.mask.T)), max(1, min(columns, call.mask.S))


def _skip_tiles(call):
    """Return (queries, keys) of a tile of a call with `skip_below`.

    A query tile goes on until all its queries can stop, so small tiles stop earlier. On a CPU, small tiles cost little:
    with the logits of a trained model, tiles of 64 x 32 take half the time of tiles of 128 x 256. With fewer queries, a
    tile has more keys: up to 256 for the one query of a decode step.
    """
    if platform.name() != "cpu":
        return _SKIP_TILES
    rows = max(1, min(call.mask.T, _SKIP_ROWS_ON_CPU))
    return rows, min(_SKIP_TILES[1], _SKIP_SCORES_ON_CPU // rows)


def reach_of(call: Call, where: Where):
    """Return the range of key tiles that each query tile may see, as one array int32 [2, query tiles]: (start, stop).

    All batch entries have the same ranges: in every batch entry, query tile i sees only keys in the key tiles
    start[i]..stop[i]-1. `where` has the position of the first query, and the segment ids, for every batch entry.
    """
    rows, columns = long_tiles(call)
    if call.mask.static_offset is not None and where.query_segments is None:
        # The ranges are constants. NumPy computes them while JAX traces the call, because XLA took seconds to compute
        # them for T=65536.
        return jnp.asarray(_ranges(_within_mask(call, np.array([call.mask.static_offset])).any(0), np))
    needed = _within_mask(call, where.offset)
    if where.query_segments is not None:
        low_q, high_q = _segment_range(where.query_segments, rows)
        low_k, high_k = _segment_range(where.key_segments, columns)
        needed &= (low_q[:, :, None] <= high_k[:, None, :]) & (low_k[:, None, :] <= high_q[:, :, None])
    return _ranges(needed.any(0), jnp)


def _ranges(needed, xp):
    """Return (start, stop) of the key tiles that each query tile needs: int32 [2, query tiles].

    `needed` [query tiles, key tiles] says which tiles are needed. `xp` is `numpy` or `jax.numpy`.
    """
    queries, n = needed.shape
    if 0 in needed.shape:
        return xp.zeros((2, queries), xp.int32)
    any_needed = needed.any(1)
    first = xp.where(any_needed, xp.argmax(needed, axis=1), 0)
    last = xp.where(any_needed, n - xp.argmax(needed[:, ::-1], axis=1), 0)
    return xp.stack([first, last]).astype(xp.int32)


def _within_mask(call: Call, offset):
    """Return whether any query of a query tile may see any key of a key tile: bool [B, query tiles, key tiles].

    Causality and the window are considered, segment ids are not. `offset` [B] is the position of the first query among
    the keys.
    """
    mask, (rows, columns) = call.mask, long_tiles(call)
    first_q, first_k = np.arange(0, mask.T, rows), np.arange(0, mask.S, columns)
    last_q, last_k = np.minimum(first_q + rows, mask.T) - 1, np.minimum(first_k + columns, mask.S) - 1
    offset = offset[:, None, None]
    needed = offset + (last_q[:, None] - first_k)[None] >= (0 if mask.attend_current else 1)
    if mask.window is not None:
        needed &= offset + (first_q[:, None] - last_k)[None] <= mask.window
    return needed


def loop_of(call: Call):
    """Return a function like `lax.while_loop`, for the loop over the key tiles of a query tile.

    Estimates of the cost need to know how often the loop runs. So the name of the jitted loop contains an expected
    number: the mean number of key tiles that a query tile may see. If the position of the first query is a traced
    value, this number is computed as if the last query were at the position of the last key.
    """
    mask = call.mask
    offset = mask.S - mask.T if mask.static_offset is None else mask.static_offset
    trips = _within_mask(call, np.array([offset])).sum(2).mean()

    def loop(condition, body, state):
        return cost.loop(trips, partial(lax.while_loop, condition, body))(state)

    return loop


def _segment_range(segments, size):
    """Return (smallest segment id, largest segment id) of every tile of `size` queries or keys, each [B, tiles].

    `segments` [B, length] are the ids. The smallest id does not count padding, which has negative ids.
    """
    pad = -segments.shape[1] % size
    tiles = jnp.pad(segments, ((0, 0), (0, pad)), mode="edge").reshape(segments.shape[0], -1, size)
    big = jnp.asarray(jnp.iinfo(tiles.dtype).max, tiles.dtype)
    return jnp.where(tiles < 0, big, tiles).min(-1), tiles.max(-1)
