"""Stick-breaking attention of sequences that are divided among devices; exact in the forward and the backward pass.

Every device has two pieces of a sequence, one from its beginning and one from its end (`mesh.shard_batch`). So all
devices attend to equally many keys. A piece first attends to itself, while the keys and values of all pieces are
gathered. Then it attends to the pieces on its left, and the merge rule combines the two results.

Keys and values are all-gathered instead of passed around a ring. They have only K heads. A ring would have to store
partial results with N heads for its backward pass.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import cost, merge_stick_breaking, stick_breaking_attention
from stickjax.parallel.collectives import all_gather, size


def whole_sequence(x: Float[Array, "B t ..."]) -> Float[Array, "B T ..."]:
    """All-gather x along the mesh axis "context", and return the whole sequence in its order.

    Every device has two pieces of the sequence in x, together t tokens. The result has T = t * (number of devices)
    tokens.
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
    """Compute (out, rem) of `stick_breaking_attention` for the queries of this device and the keys of all devices.

    t is the number of tokens on this device, in two pieces of t / 2 tokens. T is the length of the whole sequence.
    `out` are the outputs of the heads, and `rem` is the rest of the stick of every query.

    Args:
      q, k, v: the queries, keys and values of the two pieces.
      segment_ids: the segment ids of the two pieces.
      key_segment_ids: the segment ids of the whole sequence, in order.
      options: further arguments of `stick_breaking_attention`.
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
        """Return (out, log_rem) of one piece, which attends to its own keys and to all keys on its left.

        `out` are the outputs of the heads, and `log_rem` is the log of the rest of the stick of every query.

        `which` is 0 for the early and 1 for the late piece of this device, and `place` is its index in the sequence.
        `reach` is the same on all devices: the keys on the left are always among the first `reach` pieces.
        """
        S = reach * C
        # A key that is not left of the piece counts as padding, so its tiles are never visited.
        left = jnp.where((jnp.arange(S) < place * C)[None], key_segment_ids[:, :S], -1)
        own, segments = (x[:, which * C : (which + 1) * C] for x in (q, segment_ids))
        # The share of these keys that are left of the piece, on average over the devices.
        part = cost.share((reach - (count + 1) / 2) / (reach - 1 / 2), attend)
        far = part(own, keys[:, :S], values[:, :S], place * C, segments, left)
        return merge_stick_breaking(tuple(x[:, which] for x in near), far)

    early, late = piece(0, index, count), piece(1, 2 * count - 1 - index, 2 * count)
    out, log_rem = (jnp.concatenate(pair, axis=1) for pair in zip(early, late, strict=True))
    return out, jnp.exp(log_rem)
