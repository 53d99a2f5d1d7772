"""Stick-breaking attention as the decoder calls it, on one device or along the mesh axis "context"."""

from pallas_kernels import stick_breaking_attention
from stickjax.config import ModelConfig
from stickjax.models.context import attention_in_context
from stickjax.parallel.collectives import size


def attend(config: ModelConfig, q, k, v, context):
    """Compute stick-breaking attention, as an `AttentionVariant` of `stickjax.config.attention`.

    Return (out [B,T,N,H], rest [B,T,N]). The rest is the part of the stick of a query that no key has taken.
    `context` is a `Context` of `stickjax.models.attention`.
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
