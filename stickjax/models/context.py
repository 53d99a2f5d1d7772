"""Stick-breaking attention of sequences whose tokens are sharded over the mesh axis "context".

A single device would compute the same result and the same gradients, up to rounding. With n devices, a sequence is cut
into 2n pieces. Device i has the pieces i and 2n - 1 - i, counted from 0 (`stickjax.parallel.mesh.shard_batch`). So all
devices compute the same number of (query, key) pairs. The queries of a piece first attend to the keys of this piece,
while the keys and values of all pieces are all-gathered. Then the queries attend to the keys of all earlier pieces, and
`pallas_kernels.merge_stick_breaking` merges the two results.

Why an all-gather, and not a ring of devices? The gathered keys and values have only K key heads. For its backward pass,
a ring would store partial outputs with N query heads, and N is usually larger.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import cost, merge_stick_breaking, stick_breaking_attention
from stickjax.parallel.collectives import all_gather, size


def whole_sequence(x: Float[Array, "B t ..."]) -> Float[Array, "B T ..."]:
    """All-gather x along the mesh axis "context", and return the whole sequences, with their tokens in order.

    With n devices, x on device i has the pieces i and 2n - 1 - i of every sequence, which has 2n pieces. The two pieces
    have t tokens together. The result has all T = n * t tokens of every sequence.
    """
    count, (B, t) = size("context"), x.shape[:2]
    x = all_gather(x, "context", 1, x.dtype).reshape(B, count, 2, t // 2, *x.shape[2:])
    early, late = x[:, :, 0], x[:, ::-1, 1]
    return jnp.concatenate([early, late], axis=1).reshape(B, count * t, *x.shape[4:])


def attention_in_context(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B t K H"],
    v: Float[Array, "B t K H"],
    segment_ids: Int[Array, "B t"],
    key_segment_ids: Int[Array, "B T"],
    **options,
) -> tuple[Float[Array, "B t N H"], Float[Array, "B t N"]]:
    """Compute stick-breaking attention of the queries on this device to the keys of all devices. Return (out, rem).

    t is the number of tokens on this device, in two pieces of t / 2 tokens. T is the length of the whole sequence.
    `out` are the outputs of the heads. `rem` is, for every query, the part of its stick that no key takes.

    Args:
      q, k, v: the queries, keys and values of the two pieces.
      segment_ids: the segment ids of the two pieces.
      key_segment_ids: the segment ids of the whole sequence, with its tokens in order.
      options: further arguments of `pallas_kernels.stick_breaking_attention`.
    """
    count, index, (B, t) = size("context"), lax.axis_index("context"), q.shape[:2]
    C = t // 2

    def attend(q, k, v, query_offset, segment_ids, key_segment_ids):
        segments = dict(segment_ids=segment_ids, key_segment_ids=key_segment_ids)
        out, _, stats = stick_breaking_attention(
            q, k, v, query_offset=query_offset, return_stats=True, **segments, **options
        )
        return out, stats.log_rem

    def pieces(x):
        return x.reshape(2 * B, C, *x.shape[2:])

    near = attend(*map(pieces, (q, k, v)), 0, pieces(segment_ids), pieces(segment_ids))
    near = [x.reshape(B, 2, C, *x.shape[2:]) for x in near]
    keys, values = jnp.split(whole_sequence(jnp.concatenate([k, v], axis=-1)), [k.shape[-1]], axis=-1)

    def piece(which, place, reach):
        """Compute attention of the C queries of one piece to the keys of this piece and of all earlier pieces.

        Return `out` [B,C,N,H], the outputs of the heads, and `log_rem` [B,C,N], the logarithm of the part of a query's
        stick that no key takes.

        `which`: 0 for the early piece of this device, 1 for the late piece. `place`: the index of the piece in the
        sequence. `reach`: the kernel gets the keys of the first `reach` pieces, which contain all earlier pieces on
        every device. The number is the same on all devices, because they run the same program.
        """
        S = reach * C
        # Keys that are not before the piece get the segment id of padding, so that the kernel skips their key tiles.
        left = jnp.where((jnp.arange(S) < place * C)[None], key_segment_ids[:, :S], -1)
        own, segments = (x[:, which * C : (which + 1) * C] for x in (q, segment_ids))
        # For the cost estimate: the share of the computed (query, key) pairs whose key is before the piece, as a mean
        # over the devices.
        part = cost.share((reach - (count + 1) / 2) / (reach - 1 / 2), attend)
        far = part(own, keys[:, :S], values[:, :S], place * C, segments, left)
        return merge_stick_breaking(tuple(x[:, which] for x in near), far)

    early, late = piece(0, index, count), piece(1, 2 * count - 1 - index, 2 * count)
    out, log_rem = (jnp.concatenate(pair, axis=1) for pair in zip(early, late, strict=True))
    return out, jnp.exp(log_rem)
