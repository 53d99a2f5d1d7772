"""The attention variant "stick_breaking" of the decoder, also for sequences that are sharded over a mesh axis."""

from pallas_kernels import stick_breaking_attention
from stickjax.config import ModelConfig
from stickjax.models.context import attention_in_context
from stickjax.parallel.collectives import size


def attend(config: ModelConfig, q, k, v, context):
    """Compute stick-breaking attention. Decoders whose config has `attention="stick_breaking"` call this function.

    q [B,T,N,H] are the queries, and k and v [B,S,K,H] are the keys and values. `context` is a `Context` of
    `stickjax.models.attention`. If the sequences are sharded over the mesh axis "context", k and v are the keys and
    values of the tokens on this device, and the function all-gathers them.

    Return (out [B,T,N,H], rest [B,T,N]). `rest` is the part of each query's stick that no key takes: one minus the sum
    of the query's weights.
    """
    c, segments = config, (context.segment_ids, context.key_segment_ids)
    options = dict(
        scale=c.scale, attend_current=c.attend_current, window=c.window, skip_below=c.skip_below,
        implementation=c.implementation,
    )  # fmt: skip
    if size("context") > 1:
        return attention_in_context(q, k, v, *segments, **options)
    named = dict(zip(("segment_ids", "key_segment_ids"), segments, strict=True))
    return stick_breaking_attention(q, k, v, query_offset=context.offset, **named, **options)
