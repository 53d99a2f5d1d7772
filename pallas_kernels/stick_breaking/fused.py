"""The forward pass, the backward pass and decoding of attention, which call the kernels of Mosaic or Triton.

Decoding means few queries and many keys. For the backward pass, the forward pass saves its inputs and two results of
the kernel `forward`. One is the index of the leftmost key tile that was computed for each query tile. The other one is
the cumulative log-decay of each query row: -log2 of the part of the stick that remains, as the sum of two fp32 numbers.
The output is not saved. If the intermediate results for all heads would need too much memory, the backward pass
computes a few heads at a time. kernels.py says what the kernels take and return.
"""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .. import platform
from .call import Call, share_of
from .kernels import Kernels, Plan
from .key_ranges import key_tile_ranges

SNAPSHOTS = 2**31  # the most bytes of snapshots (see `Kernels.d_query`) that may be in memory at the same time
SPLIT = 256  # the smallest number of keys that decoding without skip_below gives to one block
ROUND = 512  # keys of the first round of decoding with skip_below; each next round has twice the number of keys
LN2 = math.log(2)


def attention(kernels: Kernels, call: Call):
    """Compute stick-breaking attention with the kernels of one backend. Return (out [B,T,N,Hv], log_rem [B,T,N], kept).

    `log_rem` is the natural logarithm of the part of each query's stick that remains. `kept` [B,K] is the number of key
    tiles computed, divided by the number of key tiles that the queries may see.

    The arrays are first padded with rows of zeros, so that the numbers of queries and of keys are multiples of
    `kernels.row_multiple`. `call.mask` has T and S without padding, so no query sees a padding key. At the end, the
    rows of the padding queries are removed from the results, so the cotangents of these rows are zero.
    """
    scale = jnp.full_like(call.query, call.scale, jnp.float32, shape=())  # varies over the same mesh axes as query
    static = call._replace(query=None, key=None, value=None, scale=None, where=None)
    arrays = (_padded(x, kernels.row_multiple) for x in (call.query, call.key, call.value))
    out, log_rem, kept = _attention(*arrays, scale, call.where, static, kernels)
    return out[:, : call.mask.T], log_rem[:, : call.mask.T], kept


def _padded(x, multiple: int):
    """Append rows of zeros to x [B, rows, ..], so that the number of rows is a multiple of `multiple`."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) if missing else x


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(query, key, value, scale, where, static, kernels):
    call = static._replace(query=query, key=key, value=value, scale=scale, where=where)
    if is_decoding(call):
        out, log_rem, kept = _decode(kernels, call)
        return _padded(out, kernels.row_multiple), _padded(log_rem, kernels.row_multiple), kept
    return _forward(query, key, value, scale, where, static, kernels)[0]


def _forward(query, key, value, scale, where, static, kernels):
    call = static._replace(query=query, key=key, value=value, scale=scale, where=where)
    plan = kernels.plan(call)
    planned = _planned(call, plan)
    out, log_decay, reached = kernels.forward(plan, query, key, value, scale, *planned)
    log_rem = -LN2 * (log_decay[0] + log_decay[1])[:, :, : query.shape[1]].swapaxes(1, 2)
    residuals = query, key, value, scale, where, log_decay, reached
    return (out, log_rem, _share_visited(plan, planned[0], reached)), residuals


def _backward(static, kernels, residuals, cotangents):
    query, key, value, scale, where, log_decay, reached = residuals
    call = static._replace(query=query, key=key, value=value, scale=scale, where=where)
    d_out, d_log_rem, _ = cotangents
    plan = kernels.plan(call, backward=True)
    planned = _planned(call, plan)
    log_decay, reached = _for_tiles_of(plan, log_decay, reached)
    d_log_rem = jnp.pad(d_log_rem.swapaxes(1, 2), ((0, 0), (0, 0), (0, plan.padded - d_log_rem.shape[1])))
    arrays = query, key, value, d_out.astype(query.dtype), d_log_rem, log_decay, reached
    dq, d_scale, dk, dv = _gradients(kernels, plan, arrays, scale, planned)
    return dq, dk, dv, d_scale.sum(), None


_attention.defvjp(_forward, _backward)


def _for_tiles_of(plan: Plan, log_decay, reached):
    """Convert `log_decay` and `reached`, results of the forward pass, to the query tiles of the backward pass.

    A query tile of the backward pass may have fewer rows than a query tile of the forward pass. `log_decay`
    [2, B, N, padded rows] is the cumulative log-decay of each query row (-log2 of the part of the stick that remains),
    as the sum of two numbers. `reached` [B, N, query tiles] is the index of the leftmost key tile that the forward pass
    computed for each query tile. `plan` has the sizes of the backward pass.
    """
    times = log_decay.shape[-1] // reached.shape[-1] // plan.row_tile
    if times == 1:
        return log_decay, reached
    return log_decay[..., : plan.padded], jnp.repeat(reached, times, -1)[..., : plan.padded // plan.row_tile]


def _gradients(kernels: Kernels, plan: Plan, arrays, scale, planned):
    """Run the kernels `d_query` and `d_key_value` of the backward pass. Return (dq, d_scale, dk, dv).

    d_scale is an array whose sum is the gradient of the scale. `arrays` are (query, key, value, d_out, d_log_rem,
    log_decay, reached), as in `Kernels.d_query`. `planned` are the arrays that describe the mask (see `_planned`).
    `d_query` writes snapshots for `d_key_value`: two numbers for each query row and key tile. If the snapshots of all
    heads need more than 2 GiB (SNAPSHOTS), the kernels run several times, for a few heads each time.
    """
    query, key, value, d_out, d_log_rem, log_decay, reached = arrays

    def gradients_of_heads(plan, query, key, value, d_out, d_log_rem, log_decay, reached, planned):
        rows = query, key, value, d_out, d_log_rem, log_decay, reached, scale
        dq, d_scale, snapshots = kernels.d_query(plan, *rows, *planned)
        dk, dv = kernels.d_key_value(plan, query, key, value, d_out, snapshots, reached, scale, *planned)
        return dq, d_scale[..., : plan.rows].sum(-1), dk, dv

    B, K, G = plan.B, plan.K, plan.N // plan.K
    per_head = G * kernels.snapshot_bytes * log_decay.shape[-1] * plan.key_tiles
    if B * K * per_head <= SNAPSHOTS:
        return gradients_of_heads(plan, *arrays, planned)
    heads = max(n for n in range(1, K + 1) if K % n == 0 and n * per_head <= max(SNAPSHOTS, per_head))

    def split(x, axis, batch):  # [.., B, .., K, ..] -> [B, K / heads, .., 1, .., heads, ..]; or with N instead of K
        x = x.reshape(*x.shape[:axis], K // heads, -1, *x.shape[axis + 1 :])
        return jnp.expand_dims(jnp.moveaxis(x, (batch, axis), (0, 1)), batch + 2)

    parts = [split(x, 2, 0) for x in (query, key, value, d_out)]
    parts += [split(d_log_rem, 1, 0), split(log_decay, 2, 1), split(reached, 1, 0)]
    flat = [x.reshape(-1, *x.shape[2:]) for x in parts]
    entries = jnp.repeat(jnp.arange(B), K // heads)
    plan = replace(plan, B=1, N=heads * G, K=heads)

    def gradients_of_part(part):
        arrays, entry = part
        return gradients_of_heads(plan, *arrays, [x[entry][None] for x in planned])

    outs = lax.map(gradients_of_part, (flat, entries))

    def join(x):  # [B * K / heads, 1, T, heads, H] -> [B, T, K, H]
        x = x.reshape(B, K // heads, *x.shape[2:])
        return jnp.moveaxis(x, 1, 2).reshape(B, x.shape[2], -1, x.shape[-1])

    dq, d_scale, dk, dv = outs
    return join(dq), d_scale, join(dk), join(dv)


def _planned(call: Call, plan: Plan, per_position: int = 1):
    """Return the arrays that describe the attention mask, in the order in which they are a kernel's last arguments.

    The arrays are the key-tile ranges [B, query tiles, 4], which say what key tiles are computed for each query tile
    (`key_tile_ranges`), and the position of the first query among the keys [B]. If the call has segments, there are
    also the segment ids of the query rows and of the keys, padded to whole tiles with -1. `per_position` is the number
    of query rows at one position: 1, or in decoding the number of query heads that share a key head.
    """
    key_ranges = key_tile_ranges(call, plan.row_tile, plan.key_tile, per_position)
    missing = plan.padded // plan.row_tile - key_ranges.shape[1]
    planned = [jnp.pad(key_ranges, ((0, 0), (0, missing), (0, 0))), call.where.offset.astype(jnp.int32)]
    if call.where.query_segments is not None:
        ids = jnp.repeat(call.where.query_segments, per_position, 1), call.where.key_segments
        planned += [
            jnp.pad(x.astype(jnp.int32), ((0, 0), (0, size - x.shape[1])), constant_values=-1)
            for x, size in zip(ids, (plan.padded, plan.key_tiles * plan.key_tile), strict=True)
        ]
    return planned


def _share_visited(plan: Plan, key_ranges, reached):
    """Return the share of the visible key tiles that the forward pass computed for each key head: [B,K].

    `key_ranges` [B, query tiles, 4] are the key-tile ranges, which say what key tiles the queries of a query tile may
    see. `reached` [B, N, query tiles] is the index of the leftmost key tile that was computed for each query tile.
    Without `skip_below`, the share is 1.
    """
    if plan.skip_below is None:
        return jnp.ones((plan.B, plan.K), jnp.float32)
    stop, start = key_ranges[:, None, :, 0], key_ranges[:, None, :, 3]
    visited = jnp.where(stop > start, stop - reached, 0).reshape(plan.B, plan.K, -1).sum(-1)
    return share_of(visited, (stop - start).sum(-1) * (plan.N // plan.K))


# Decoding. The query heads that share a key head are the rows of one tile. The keys are split over several blocks.


def is_decoding(call: Call) -> bool:
    """Return whether a call has few queries and many keys. Then `_decode` computes it, if no gradient is taken.

    The conditions are: T <= 16, S >= 512, no `tiles` are given, and the query heads that share a key head have at most
    64 queries in total.
    """
    T, rows = call.mask.T, call.mask.T * (call.query.shape[2] // call.key.shape[2])
    return call.tiles is None and T <= 16 and rows <= 64 and call.mask.S >= 2 * SPLIT


def splits(call: Call) -> int:
    """Return the number of parts P into which decoding splits the keys of a key head.

    One thread block computes one part of one key head of one batch entry, so there are B * K * P blocks. P is as large
    as possible under two conditions: there are no more blocks than multiprocessors, and each part of the S keys has at
    least 256 keys (SPLIT). P is never below 1, even if B * K is more than the number of multiprocessors. With
    `skip_below`, `_decode` computes the keys in rounds, and splits the keys of each round into P parts. Then a part may
    have fewer keys.
    """
    B, K = call.query.shape[0], call.key.shape[2]
    return max(1, min(platform.multiprocessors() // (B * K), call.mask.S // SPLIT))


def _decode(kernels: Kernels, call: Call):
    """Compute attention for few queries and many keys. Return the same results as `attention`.

    The keys are split into parts. Separate blocks compute the parts, and the results are merged. With `skip_below`, the
    keys are computed in rounds, the nearest keys first, and the keys of each round are split into parts. The rounds end
    when less than 2^skip_below remains of the stick of every query, or no keys remain.
    """
    (B, _, N, H), (K, Hv), T = call.query.shape, call.value.shape[2:], call.mask.T
    G, P = N // K, splits(call)
    plan = kernels.plan(call, decoding=(G, P))
    query = jnp.moveaxis(call.query[:, :T].reshape(B, T, K, G, H), 3, 2).reshape(B, T * G, K, H)
    query = _padded(query, kernels.row_multiple)
    key_ranges, *planned = _planned(call, plan, G)
    stop, start = key_ranges[..., 0], key_ranges[..., 3]

    def attend(high, low):
        """Compute attention to the key tiles low..high-1. Return (out [B,K,rows,Hv], log_decay [B,K,rows]) in fp32.

        `low` and `high` [B, query tiles] are indices of key tiles, one pair for each query tile. The rows of a key head
        are the T queries of all query heads that use it. `log_decay` counts these keys only: it is -log2 of the part
        that they leave of a stick of length 1.
        """
        share = jnp.arange(P + 1).reshape(-1, 1, 1)
        edges = low[None] + (high - low)[None] * share // P
        clipped = jnp.clip(key_ranges[None], edges[:-1, ..., None], edges[1:, ..., None])
        is_empty = clipped[..., :1] <= clipped[..., 3:]
        split_ranges = jnp.where(is_empty, 0, clipped).reshape(P * B, *key_ranges.shape[1:])
        out, log_decay, _ = kernels.forward(plan, query, call.key, call.value, call.scale, split_ranges, *planned)
        log_decay = log_decay.sum(0)[..., : plan.rows].reshape(P, B, K, plan.rows)
        nearer = jnp.cumsum(log_decay[::-1], 0)[::-1] - log_decay
        out = jnp.moveaxis(out[:, : plan.rows], 2, 1).reshape(P, B, K, plan.rows, Hv)
        return (out * jnp.exp2(-nearer)[..., None]).sum(0), log_decay.sum(0)

    if call.skip_below is None:
        kept = jnp.ones((B, K), jnp.float32)
        out, log_decay = attend(stop, start)
    else:
        is_padding = jnp.bool_(False)  # a padding row sees no key, so its log-decay stays 0
        if call.where.query_segments is not None:
            is_padding = planned[1][:, None, : plan.rows] < 0

        def attend_next_round(state):
            width, high, out, log_decay = state
            low = jnp.maximum(start, high - width)
            out_of_round, log_decay_of_round = attend(high, low)
            doubled, left_before = 2 * width, jnp.exp2(-log_decay)[..., None]
            return doubled, low, out + left_before * out_of_round, log_decay + log_decay_of_round

        def has_next_round(state):
            _, high, _, log_decay = state
            has_stick_left = (~is_padding & (log_decay <= -call.skip_below)).any((1, 2))
            return ((high > start).any(1) & has_stick_left).any()  # at least one batch entry needs more keys

        zeros = jnp.zeros_like(query, jnp.float32, (B, K, plan.rows))
        nothing = jnp.zeros_like(query, jnp.float32, (B, K, plan.rows, Hv))
        state = ROUND // plan.key_tile, stop, nothing, zeros
        _, reached, out, log_decay = lax.while_loop(has_next_round, attend_next_round, state)
        share = share_of((stop - reached).sum(-1), (stop - start).sum(-1))
        kept = jnp.broadcast_to(share[:, None], (B, K))
    out = jnp.moveaxis(out.reshape(B, K, T, G, Hv), 2, 1).reshape(B, T, N, Hv)
    log_rem = -LN2 * jnp.moveaxis(log_decay.reshape(B, K, T, G), 2, 1).reshape(B, T, N)
    return out.astype(call.value.dtype), log_rem, kept
