"""The implementation "xla" of stick-breaking attention, in plain JAX, with memory linear in T.

Scores are computed in tiles, with the functions of tile.py. A "short call" has few queries and keys. It is computed by
an unrolled loop over query tiles. Each query tile has one key tile, with all keys that its queries may see. A "long
call" is computed by a loop over query tiles. For each query tile, a while loop visits key tiles, beginning with the
nearest keys and going to the left. The while loop ends at the leftmost key tile that the queries may see. With
`skip_below`, it also ends when every query of the tile has less than 2^skip_below of its stick left. The backward pass
does not store the attention weights, but computes them again from the queries and keys.

G = N / K is the number of query heads that use the same key head.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import platform
from ..arguments import sum_type
from . import tile
from .call import Call, share_of
from .xla_reach import long_tiles, loop_of, reach_of

_SHORT_ROWS = 64  # queries of a query tile of a short call (`_is_short`)
_SHORT_SCORES = 2**18  # largest number of scores of one query head in a query tile of a short call
_CACHED_SCORES = 2**18  # scores that fit into the cache of a CPU core: 1 MiB of fp32


def _is_short(call: Call) -> bool:
    """Return whether a call is short: it has few queries and keys, so that one key tile has all keys.

    In a short call, T is at most 512, a query tile has at most _SHORT_SCORES = 2^18 scores (its queries times all S
    keys), and `skip_below` and `tiles` are None. A call with an empty array is short too.
    """
    T, S = call.mask.T, call.mask.S
    if 0 in call.query.shape + (S,):
        return True  # an array is empty
    return call.skip_below is None and call.tiles is None and T <= 512 and min(T, _SHORT_ROWS) * S <= _SHORT_SCORES


def detail(call: Call) -> str:
    """Describe, for `explain`, the tiles in which a call is computed, such as "loop over 256 x 256 tiles"."""
    if _is_short(call):
        rows = _short_rows(call)
        tiles = -(-call.mask.T // rows)
        return f"{tiles} query tile{'' if tiles == 1 else 's'} of {rows} rows, each against all its keys"
    rows, columns = long_tiles(call)
    skip = "" if call.skip_below is None else f", skipping below 2^{call.skip_below:g}"
    return f"loop over {rows} x {columns} tiles{skip}"


def attention(call: Call):
    """Compute stick-breaking attention in plain JAX. Return (out [B,T,N,Hv], log_rem [B,T,N], kept [B,K]).

    `log_rem` is the natural logarithm of the part of the stick that remains. `kept` is the number of key tiles that
    were computed, divided by the number of key tiles that the queries may see.
    """
    dtype = sum_type(call.query)
    scale = jnp.full_like(call.query, call.scale, dtype, shape=())  # varies over the same mesh axes as query
    static = call._replace(query=None, key=None, value=None, scale=None, where=None)
    return _jitted(call.query, call.key, call.value, scale, call.where, static)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(query, key, value, scale, where, static):
    return _forward(query, key, value, scale, where, static)[0]


def _forward(query, key, value, scale, where, static):
    call = static._replace(query=query, key=key, value=value, scale=scale, where=where)
    out, log_rem, kept = _over_heads(_short_forward if _is_short(call) else _long_forward, call)
    return (_to_tokens(out).astype(value.dtype), _to_tokens(log_rem), kept), (query, key, value, scale, where)


def _backward(static, residuals, cotangents):
    query, key, value, scale, where = residuals
    call = static._replace(query=query, key=key, value=value, scale=scale, where=where)
    d_out, d_log_rem, _ = cotangents
    d_log_rem = d_log_rem.astype(sum_type(query))
    extra = (_to_heads(call, d_out), _to_heads(call, d_log_rem))
    dq, dk, dv = _over_heads(_short_backward if _is_short(call) else _long_backward, call, *extra)
    dq, dk, dv = _to_tokens(dq), dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    # z = scale * q.k. dq and dk do not contain the scale yet, so its gradient is sum(dz * q.k) = sum(dq * q).
    d_scale = (dq * query.astype(dq.dtype)).sum().astype(scale.dtype)
    return (scale * dq).astype(query.dtype), (scale * dk).astype(key.dtype), dv.astype(value.dtype), d_scale, None


_attention.defvjp(_forward, _backward)
_jitted = jax.jit(_attention, static_argnums=5)  # without a jit, the loops would be compiled at every call


def _to_heads(call, x):
    """Reshape x [B,T,N,...] to [B,K,G,T,...], where G = N / K is the number of query heads that use one key head."""
    B, T, N = x.shape[:3]
    K = call.key.shape[2]
    return jnp.moveaxis(x.reshape(B, T, K, N // K, *x.shape[3:]), 1, 3)


def _to_tokens(x):
    """Reshape x [B,K,G,T,...] to [B,T,N,...], the inverse of `_to_heads`. N is K * G."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def _over_heads(one_head, call: Call, *extra):
    """Call `one_head` for every batch entry and key head. Return its results, stacked to arrays [B, K, ..].

    Each call is `one_head(head, reach, *extra)`. `head` is a `Call` with query [G,T,H], key [S,H] and value [S,Hv].
    `reach` is a result of `reach_of`, or None for a short call. `extra` are more arrays: [B, K, ..] here, and [..]
    in the arguments of `one_head`.

    With `skip_below`, one head runs after the other, so that no head waits for another head to stop. Without
    `skip_below`, all heads of all batch entries run together. But on a CPU, only a few batch entries run together, so
    that their tiles fit into the cache of a core.
    """
    query = _to_heads(call, call.query)

    def run(where, reach, q, k, v, *more):
        return one_head(call._replace(query=q, key=k, value=v, where=where), reach, *more)

    if call.skip_below is None or _is_short(call):
        arrays = (query, call.key.swapaxes(1, 2), call.value.swapaxes(1, 2), *extra)
        reach = None if _is_short(call) else reach_of(call, call.where)
        heads = jax.vmap(run, in_axes=(None, None) + (0,) * len(arrays))
        entries = (call.where, *arrays)
        group = _entries_together(call)
        if group == call.query.shape[0]:
            return jax.vmap(lambda entry: heads(entry[0], reach, *entry[1:]))(entries)
        return lax.map(lambda entry: heads(entry[0], reach, *entry[1:]), entries, batch_size=group)
    B, K = query.shape[:2]

    def one(args):
        i, q, *more = args
        where = jax.tree.map(lambda x: x[i // K], call.where)
        own = jax.tree.map(lambda x: x[None], where)
        key, value = (_OfHead(x, i // K, i % K) for x in (call.key, call.value))
        return run(where, reach_of(call, own), q, key, value, *more)

    flat = lax.map(one, (jnp.arange(B * K), *(x.reshape(B * K, *x.shape[2:]) for x in (query, *extra))))
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), flat)


class _OfHead(NamedTuple):
    """The keys or values [S,H] of one head, inside the array of all heads.

    A decode step with `skip_below` reads only the last keys of a long cache. A copy of one head would read them all.

    `array` [B,S,K,H]: the keys or values of all batch entries and heads. `entry`, `head`: which ones to use.
    """

    array: jax.Array
    entry: jax.Array
    head: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.array.shape[1], self.array.shape[3]

    def rows(self, start, size: int):
        """Return the rows start .. start + size - 1, [size, H]."""
        first = (jnp.asarray(i, jnp.int32) for i in (self.entry, start, self.head, 0))
        return lax.dynamic_slice(self.array, tuple(first), (1, size, 1, self.shape[1])).reshape(size, -1)


def _entries_together(call: Call) -> int:
    """Return how many batch entries run at the same time: B, or on a CPU a divisor of B.

    On a CPU, the tiles of these batch entries fit into the cache of a core. If one batch entry does not fit, return 1.
    """
    B, _, N, _ = call.query.shape
    if platform.name() != "cpu":
        return B
    tile_scores = _short_rows(call) * call.mask.S if _is_short(call) else math.prod(long_tiles(call))
    most = max(1, _CACHED_SCORES // max(1, N * tile_scores))
    return max((g for g in range(1, B + 1) if B % g == 0 and g <= most), default=B)


def _short_rows(call):
    """Return the number of queries of a query tile of a short call (`_is_short`): T, but at least 1 and at most 64."""
    return max(1, min(call.mask.T, _SHORT_ROWS))


def _short_tiles(call: Call):
    """Yield (slice of the queries, slice of the keys) for every query tile of a short call (`_is_short`).

    The key slice contains all keys that causality and the window permit the queries to see. If the position of the
    first query is traced, the key slice contains all keys.
    """
    mask, rows = call.mask, _short_rows(call)
    for start in range(0, mask.T, rows):
        stop, low, high = min(start + rows, mask.T), 0, mask.S
        if mask.static_offset is not None:
            high = min(max(mask.static_offset + stop, 0), mask.S)
            if mask.window is not None:
                low = min(max(mask.static_offset + start - mask.window, 0), high)
        yield slice(start, stop), slice(low, high)


def _short_mask(call, rows, columns):
    """Return whether each query of the slice `rows` sees each key of the slice `columns`: bool [rows, columns]."""
    mask = call.mask.visible(call.where, np.arange(rows.start, rows.stop), np.arange(columns.start, columns.stop))
    # XLA for CPUs would compare the segment ids again in every loop that uses the mask, and for every head. With one
    # array of numbers for all loops, forward takes 0.85 of the time, and forward and backward 0.92 of it
    # (B=16 T=256 N=4 H=32, 2 CPU cores, 2026-12-01).
    return lax.optimization_barrier(mask.astype(jnp.float32)) > 0


def _short_forward(call: Call, reach):
    """Compute attention for one key head, without a loop over key tiles. Return (out [G,T,Hv], log_rem [G,T], kept []).

    `call` has query [G,T,H], key [S,H] and value [S,Hv]. `kept`, the share of the key tiles that were computed, is 1.
    `reach` is not used.
    """
    G, _, _ = call.query.shape
    dtype = sum_type(call.query)
    outs, sticks, kept = [], [], jnp.ones_like(call.query, jnp.float32, ())
    for rows, columns in _short_tiles(call):
        q, k, v = call.query[:, rows], call.key[columns], call.value[columns]
        log_rem = jnp.zeros_like(q, dtype, q.shape[:2])
        out, log_rem = tile.forward(q, k, v, _short_mask(call, rows, columns), log_rem, call.scale)
        outs.append(out)
        sticks.append(log_rem)
    if not outs:
        nothing = partial(jnp.zeros_like, call.query, dtype)
        return nothing((G, 0, call.value.shape[-1])), nothing((G, 0)), kept
    return jnp.concatenate(outs, 1), jnp.concatenate(sticks, 1), kept


def _short_backward(call: Call, reach, d_out, d_log_rem):
    """Compute the gradients for one key head, without a loop over key tiles. Return (dq [G,T,H], dk [S,H], dv [S,Hv]).

    dq and dk are not yet multiplied by the scale. `d_out` [G,T,Hv] and `d_log_rem` [G,T] are cotangents. `reach` is not
    used.
    """
    dtype = sum_type(call.query)
    dqs, dk, dv = [], jnp.zeros_like(call.key, dtype), jnp.zeros_like(call.value, dtype)
    for rows, columns in _short_tiles(call):
        q, k, v = call.query[:, rows], call.key[columns], call.value[columns]
        mask, entering = _short_mask(call, rows, columns), jnp.zeros_like(q, dtype, q.shape[:2])
        dq, dk_part, dv_part, _ = tile.backward(q, k, v, d_out[:, rows], mask, entering, d_log_rem[:, rows], call.scale)
        dqs.append(dq)
        dk, dv = dk.at[columns].add(dk_part), dv.at[columns].add(dv_part)
    return jnp.concatenate(dqs, 1) if dqs else jnp.zeros_like(call.query, dtype), dk, dv


def _pad(x, axis, size):
    """Return x with zeros appended to the axis `axis`, so that the length of this axis is a multiple of `size`."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, pads)


class _Tiles:
    """The arrays of one key head and its G query heads. The methods return data of one tile.

    Query tile i begins at query i * `rows`. The queries are padded to whole tiles. Key tile j has the keys from
    j * `columns` on. If the last key tile is not full, it also has the last keys of the tile before it, which the mask
    leaves out. i and j may be traced.
    """

    def __init__(self, call: Call):
        self.call, (self.rows, self.columns) = call, long_tiles(call)
        self.q = _pad(call.query, 1, self.rows)
        self.count = self.q.shape[1] // self.rows
        self.key_count = -(-call.mask.S // self.columns)
        self.dtype = sum_type(call.query)

    def zeros(self, *shape):
        """Return zeros of shape `shape`, the start of a sum. They vary over the same mesh axes as the query array."""
        return jnp.zeros_like(self.q, self.dtype, shape)

    def queries(self, i, x):
        """Return the part of x [G, padded T, ..] that belongs to query tile i: [G, rows, ..]."""
        return lax.dynamic_slice_in_dim(x, i * self.rows, self.rows, 1)

    def first_key(self, j):
        """Return the index of the first key in the arrays of key tile j."""
        start = j * self.columns
        return start if self.call.mask.S % self.columns == 0 else jnp.minimum(start, self.call.mask.S - self.columns)

    def keys(self, j):
        """Return an iterator over two arrays: the keys [columns, H] and the values [columns, Hv] of key tile j."""
        start = self.first_key(j)
        for x in (self.call.key, self.call.value):
            if isinstance(x, _OfHead):
                yield x.rows(start, self.columns)
            else:
                yield lax.dynamic_slice_in_dim(x, start, self.columns, 0)

    def mask(self, i, j):
        """Return whether each query of query tile i sees each key of key tile j: bool [rows, columns]."""
        q, k = i * self.rows + jnp.arange(self.rows), self.first_key(j) + jnp.arange(self.columns)
        visible = self.call.mask.visible(self.call.where, q, k)
        return visible if self.call.mask.S % self.columns == 0 else visible & (k >= j * self.columns)[None]

    def has_stick_left(self, i, log_rem):
        """Return whether some query of query tile i, padding excluded, has at least 2^skip_below of its stick left.

        `log_rem` [G, rows] is the natural logarithm of the part of the stick that is left. Without `skip_below`, the
        result is always True.
        """
        if self.call.skip_below is None:
            return True
        q = i * self.rows + jnp.arange(self.rows)
        is_query = q < self.call.mask.T
        if self.call.where.query_segments is not None:
            is_query &= jnp.take(self.call.where.query_segments, q, mode="clip") >= 0
        return jnp.where(is_query, log_rem, -jnp.inf).max() >= self.call.skip_below * math.log(2)


def _long_forward(call: Call, reach):
    """Compute attention for one key head, by a loop over key tiles. Return (out [G,T,Hv], log_rem [G,T], kept []).

    `reach` is a result of `reach_of`: the range of key tiles for each query tile. `kept` is the number of key tiles
    that were computed, divided by the number of key tiles in all ranges.
    """
    t, loop = _Tiles(call), loop_of(call)
    G, T = call.query.shape[:2]

    def query_tile(i):
        q, (first, last) = t.queries(i, t.q), reach[:, i]

        def key_tile(state):
            j, out, log_rem = state
            k, v = t.keys(j)
            part, log_rem = tile.forward(q, k, v, t.mask(i, j), log_rem, call.scale)
            return j - 1, out + part, log_rem

        start = (last - 1, t.zeros(G, t.rows, call.value.shape[-1]), t.zeros(G, t.rows))
        j, out, log_rem = loop(lambda s: (s[0] >= first) & t.has_stick_left(i, s[2]), key_tile, start)
        return out, log_rem, last - 1 - j

    outs, sticks, kept = lax.map(query_tile, jnp.arange(t.count))
    outs, sticks = (jnp.moveaxis(x, 0, 1).reshape(G, t.count * t.rows, *x.shape[3:])[:, :T] for x in (outs, sticks))
    return outs, sticks, share_of(kept.sum(), (reach[1] - reach[0]).sum())


def _long_backward(call: Call, reach, d_out, d_log_rem):
    """Compute the gradients for one key head, by a loop over key tiles. Return (dq [G,T,H], dk [S,H], dv [S,Hv]).

    dq and dk are not yet multiplied by the scale. `d_out` [G,T,Hv] and `d_log_rem` [G,T] are cotangents. `reach` is a
    result of `reach_of`.
    """
    t, loop = _Tiles(call), loop_of(call)
    G, T = call.query.shape[:2]
    d_out, d_log_rem = _pad(d_out, 1, t.rows), _pad(d_log_rem, 1, t.rows)

    def query_tile(grads, i):
        q, (first, last) = t.queries(i, t.q), reach[:, i]
        do, prefix = t.queries(i, d_out), t.queries(i, d_log_rem)

        # From right to left: compute log_rem on entry to every tile, and find the tile where the forward pass stopped.
        def add_log_decay(state):
            j, log_rem, sticks = state
            sticks = lax.dynamic_update_index_in_dim(sticks, log_rem, j, 0)
            return j - 1, log_rem - tile.log_decay(q, next(t.keys(j)), t.mask(i, j), call.scale), sticks

        start = (last - 1, t.zeros(G, t.rows), t.zeros(t.key_count, G, t.rows))
        j, _, sticks = loop(lambda s: (s[0] >= first) & t.has_stick_left(i, s[1]), add_log_decay, start)

        # From left to right: compute the gradients, and the prefix sums of weight * <d_out, v> that they need.
        def key_tile(state):
            j, dq, dk, dv, prefix = state
            k, v = t.keys(j)
            entering = lax.dynamic_index_in_dim(sticks, j, 0, False)
            dq_part, dk_part, dv_part, prefix = tile.backward(q, k, v, do, t.mask(i, j), entering, prefix, call.scale)
            start = t.first_key(j)
            return j + 1, dq + dq_part, _add_at(dk, dk_part, start), _add_at(dv, dv_part, start), prefix

        state = (j + 1, t.zeros(G, t.rows, q.shape[-1]), *grads, prefix)
        _, dq, dk, dv, _ = loop(lambda s: s[0] < last, key_tile, state)
        return (dk, dv), dq

    (dk, dv), dq = lax.scan(query_tile, (t.zeros(*call.key.shape), t.zeros(*call.value.shape)), jnp.arange(t.count))
    return jnp.moveaxis(dq, 0, 1).reshape(G, t.count * t.rows, -1)[:, :T], dk, dv


def _add_at(total, part, start):
    """Return `total` [S, width] with `part` [size, width] added to its rows start .. start + size - 1."""
    rows = lax.dynamic_slice_in_dim(total, start, part.shape[0])
    return lax.dynamic_update_slice_in_dim(total, rows + part, start, 0)
