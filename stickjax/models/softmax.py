"""The attention variant "softmax" of the decoder: causal softmax attention."""

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from stickjax.config import ModelConfig


def attend(config: ModelConfig, q, k, v, context):
    """Compute causal softmax attention. Decoders whose config has `attention="softmax"` call this function.

    q [B,T,N,H] are the queries, and k and v [B,S,K,H] are the keys and values. Queries and keys already have rotary
    positions. `context` is a `Context` of `stickjax.models.attention`.

    Return (out [B,T,N,H], None). The second result of an attention variant is one minus the sum of each query's
    weights. None means that the weights always sum to 1.
    """
    c, T, S = config, q.shape[1], k.shape[1]
    # At most eight query tiles. Each computes scores only for the keys up to its end: about half of all T * S scores.
    tile = max(64, -(-T // 8)) if isinstance(context.offset, int) else T

    @jax.checkpoint  # saves q, k and v instead of the T * S weights of every head
    def attend_tile(q, k, v, mask):
        with jax.numpy_dtype_promotion("standard"):  # the function multiplies bfloat16 and float32
            return jax.nn.dot_product_attention(q, k, v, mask=mask[None], scale=c.scale)

    def attend_row(entry):
        q, k, v, segments = entry
        tiles = []
        for start in range(0, T, tile):
            queries = slice(start, start + tile)
            keys = slice(0, context.offset + start + tile if isinstance(context.offset, int) else S)
            distance = (context.offset + jnp.arange(T)[queries])[:, None] - jnp.arange(S)[keys][None, :]
            mask = distance >= 0
            if c.window is not None:
                mask &= distance <= c.window
            if segments is not None:
                mask &= segments[0][queries, None] == segments[1][None, keys]
            tiles.append(attend_tile(q[queries], k[keys], v[keys], mask))
        return jnp.concatenate(tiles)

    segments = None if context.segment_ids is None else (context.segment_ids, context.key_segment_ids)
    # On a CPU, sequences run in groups whose weights fit into the CPU cache, as in the stick-breaking op.
    group = q.shape[0]
    if platform.name() == "cpu":
        group = max(1, min(group, 2**20 // (T * q.shape[2] * S)))
    return jax.lax.map(attend_row, (q, k, v, segments), batch_size=group), None
