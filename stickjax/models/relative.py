"""Softmax attention for self-attention and for cross-attention.

Self-attention can have trainable relative positions. Cross-attention has none.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from stickjax.models.layers import dropout


def relative_scores(q: Float[Array, "B T K X H"], relative: Float[Array, "K H P"], S: int) -> Float[Array, "B K X T S"]:
    """Compute the scores q_i . R[j - i] of every query i and key j: the part of the scores from relative positions.

    In `q`, X query heads share each of the K key heads. `relative` is R. For every key head, R has P = 2 * clip - 1
    vectors of dimension H, one for each distance j - i from 1 - clip to clip - 1. A distance above clip - 1 uses the
    vector of clip - 1, and a distance below 1 - clip uses the vector of 1 - clip. `S` is the number of keys.

    >>> scores = relative_scores(jnp.ones((1, 2, 1, 1, 1)), jnp.array([[[-1.0, 0.0, 1.0]]]), 3)
    >>> scores[0, 0, 0].tolist()
    [[0.0, 1.0, 1.0], [-1.0, 0.0, 1.0]]
    """
    T, far = q.shape[1], relative.shape[-1] // 2
    # The table has a column for every distance from 1 - T to S. Row i of the result begins at column T - 1 - i.
    table = relative[:, :, jnp.clip(jnp.arange(T + S) - (T - 1), -far, far) + far]
    scores = jnp.einsum("BTKXH,KHP->BKXTP", q, table, preferred_element_type=jnp.float32)
    flat = scores.reshape(*scores.shape[:3], -1)[..., T - 1 :]
    return flat[..., : T * (T + S - 1)].reshape(*scores.shape[:4], -1)[..., :S]


def softmax_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | Bool[Array, "B 1 S"],
    scale: float,
    relative: Float[Array, "K H P"] | None = None,
    rate: float = 0.0,
    key=None,
) -> Float[Array, "B T N H"]:
    """Compute sum_j softmax_j(scale * q_i . (k_j + R[j - i])) v_j for every query i, with the softmax in fp32.

    The sum runs over the keys j for which `mask` is True. If `mask` is True for no key of a query, as for padding, the
    output of this query is finite, but has no meaning. `relative` is R, trainable vectors for the distances j - i
    (see `relative_scores`); None: R is zero. With a random `key`, dropout is applied to the weights: a weight becomes
    zero with the probability `rate`.
    """
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    q = scale * q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKXH,BSKH->BKXTS", q, k, preferred_element_type=jnp.float32)
    if relative is not None:
        scores += relative_scores(q, relative, S)
    # The score of a masked key is finite, so that a query without keys gives no NaN.
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1), rate, key).astype(v.dtype)
    return jnp.einsum("BKXTS,BSKH->BTKXH", weights, v).reshape(B, T, N, H)
