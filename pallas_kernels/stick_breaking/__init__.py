"""Stick-breaking attention: the public function, its checks, and the merge rule."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .. import dispatch
from . import call as calls
from . import mosaic, reference, triton, xla
from .call import Call, Mask, Stats, Where

__all__ = ["Stats", "merge_stick_breaking", "stick_breaking_attention"]


def stick_breaking_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, ""] | Int[Array, "B"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    attend_current: bool = False,
    window: int | None = None,
    skip_below: float | None = None,
    return_stats: bool = False,
    implementation: str | Sequence[str] | None = None,
    tiles: tuple[int, int] | None = None,
):
    r"""Attention whose weights break a stick from the nearest key leftward.

    With z[q,k] = scale * <query_q, key_k> and beta = sigmoid(z), query q takes the share beta of what the keys nearer
    to it have left of a stick of length one:

      A[q,k] = beta[q,k] * prod_{k < m < q} (1 - beta[q,m]),   out[q] = sum_k A[q,k] value_k,
      rem[q] = prod_k (1 - beta[q,k]) = 1 - sum_k A[q,k].

    The weights and `rem` sum to one; there is no normalisation and no position. Query head n reads key head
    n // (N // K). Sums run in fp32 (fp64 for fp64), whatever the type of the inputs.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], N a multiple of K.
      value: [B, S, K, Hv].
      segment_ids: [B, T], attention stays within equal ids. A negative id is padding: out 0, rem 1.
      key_segment_ids: [B, S], by default `segment_ids` (when T = S).
      query_offset: position of the first query among the keys, an int or [B]; S - T by default.
      scale: multiplier of the logits, 1 / sqrt(H) by default; differentiable.
      attend_current: also break off a piece for the key at the query's own position.
      window: attend only to keys with q - k <= window.
      skip_below: a log2 threshold, such as -24. Keys further left are skipped once every row of a query tile has less
        than 2^skip_below of its stick left; what is skipped weighs less than that, and `rem` is the stick at the exit.
      return_stats: also return `Stats(log_rem [B,T,N], kept [B,K])`: the natural logarithm of the stick left, which
        does not underflow and is differentiable, and the share of the key tiles in reach that were computed.
      implementation: "mosaic", "triton", "xla", "reference", a sequence of them in order of preference, or None for
        the best one that takes this call (see `explain`).
      tiles: (query rows, key columns) of a tile, instead of the implementation's own choice.

    Returns:
      (out [B,T,N,Hv] in the type of `value`, rem [B,T,N] in fp32 or fp64), both differentiable; with `return_stats`
      a third.

    Raises:
      ValueError: shapes or dtypes that do not fit, named by their letters.
      NotImplementedError: a named implementation cannot run this call.

    Source: "Scaling Stick-Breaking Attention", arXiv 2410.17980.

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
    >>> out, rem = stick_breaking_attention(q, k, v)
    >>> out.shape, bool((out[:, 0] == 0).all()), bool((rem[:, 0] == 1).all())
    ((1, 8, 2, 16), True, True)
    """
    call = _prepare(
        query, key, value, segment_ids=segment_ids, key_segment_ids=key_segment_ids, query_offset=query_offset,
        scale=scale, attend_current=attend_current, window=window, skip_below=skip_below, tiles=tiles,
    )  # fmt: skip
    out, log_rem, kept = dispatch.run(_op, call, implementation)
    rem = jnp.exp(log_rem)
    return (out, rem, Stats(log_rem, jax.lax.stop_gradient(kept))) if return_stats else (out, rem)


def merge_stick_breaking(
    near: tuple[Float[Array, "*b Hv"], Float[Array, "*b"]], far: tuple[Float[Array, "*b Hv"], Float[Array, "*b"]]
) -> tuple[Float[Array, "*b Hv"], Float[Array, "*b"]]:
    """Join the attention of the same queries over two runs of keys, the nearer one first.

    With (o, r) the output and the stick left: o = o_near + r_near * o_far, r = r_near * r_far. Associative.

    Args:
      near: (out [..., Hv], log_rem [...]) over the nearer keys; log_rem is the natural logarithm.
      far: the same over the keys left of those.

    Returns:
      (out, log_rem) over both.

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
    >>> def part(keys, offset):
    ...     out, _, stats = stick_breaking_attention(q, k[:, keys], v[:, keys], query_offset=offset, return_stats=True)
    ...     return out, stats.log_rem
    >>> out, _ = merge_stick_breaking(part(slice(4, 8), -4), part(slice(0, 4), 0))
    >>> bool(jnp.allclose(out, stick_breaking_attention(q, k, v)[0], atol=1e-6))
    True
    """
    (out_near, log_near), (out_far, log_far) = near, far
    if out_near.shape != out_far.shape or log_near.shape != log_far.shape or out_near.shape[:-1] != log_near.shape:
        raise ValueError(
            f"merge_stick_breaking joins out [..., Hv] and log_rem [...] of equal shapes, "
            f"got near {out_near.shape}, {log_near.shape} and far {out_far.shape}, {log_far.shape}"
        )
    out = out_near.astype(log_near.dtype) + jnp.exp(log_near)[..., None] * out_far.astype(log_near.dtype)
    return out.astype(out_near.dtype), log_near + log_far


def _check_arrays(query, key, value):
    for name, x, letters in (("query", query, "B,T,N,H"), ("key", key, "B,S,K,H"), ("value", value, "B,S,K,Hv")):
        if len(x.shape) != 4:
            raise ValueError(f"{name} must be [{letters}], got {name}.shape={x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {name}.dtype={x.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    (B, _, N, H), (_, S, K, _) = query.shape, key.shape
    if key.shape[0] != B or key.shape[3] != H:
        raise ValueError(f"B={B} and H={H} of query.shape={query.shape} must be those of key.shape={key.shape}")
    if value.shape[:3] != (B, S, K):
        raise ValueError(f"B={B}, S={S}, K={K} of key.shape={key.shape} must be those of value.shape={value.shape}")
    if K == 0 or N % K:
        raise ValueError(f"N={N} query heads must be a multiple of K={K} key heads (query.shape={query.shape})")


def _check_segments(name, ids, shape, letters):
    if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers [{letters}]={list(shape)}, got {ids.dtype}{list(ids.shape)}")


def _prepare(
    query, key, value, *, segment_ids=None, key_segment_ids=None, query_offset=None, scale=None, attend_current=False,
    window=None, skip_below=None, tiles=None, return_stats=False,
) -> Call:  # fmt: skip
    del return_stats  # accepted so that `explain` takes any call
    _check_arrays(query, key, value)
    (B, T, _, H), S = query.shape, key.shape[1]
    if segment_ids is not None:
        _check_segments("segment_ids", segment_ids, (B, T), "B,T")
        if key_segment_ids is None:
            if T != S:
                raise ValueError(f"T={T} queries and S={S} keys need key_segment_ids [B,S] next to segment_ids [B,T]")
            key_segment_ids = segment_ids
        _check_segments("key_segment_ids", key_segment_ids, (B, S), "B,S")
    elif key_segment_ids is not None:
        raise ValueError("key_segment_ids needs segment_ids")
    if window is not None and window < 0:
        raise ValueError(f"window={window} must not be negative")
    if skip_below is not None and not skip_below < 0:
        raise ValueError(f"skip_below={skip_below} is a log2 of the stick left and must be negative")
    if tiles is not None and (len(tiles) != 2 or min(tiles) < 1):
        raise ValueError(f"tiles={tiles} must be two positive sizes, query rows and key columns")
    if np.shape(scale) != ():
        raise ValueError(f"scale must be a number or an array [], got scale.shape={np.shape(scale)}")
    static = None
    if query_offset is None or isinstance(query_offset, int | np.integer):
        static = S - T if query_offset is None else int(query_offset)
        offset = jnp.full((B,), static, jnp.int32)
    else:
        dtype, shape = jnp.result_type(query_offset), np.shape(query_offset)
        if shape not in ((), (B,)) or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"query_offset must be an int or integers [B]=[{B}], got {dtype}{list(shape)}")
        offset = jnp.broadcast_to(query_offset, (B,))
    return Call(
        query, key, value, Where(offset, segment_ids, key_segment_ids), 1 / math.sqrt(H) if scale is None else scale,
        Mask(T, S, attend_current, window, static), skip_below, tiles,
    )  # fmt: skip


def _refuses_nothing(call: Call) -> None:
    return None


_op = dispatch.register(
    dispatch.Op(
        "stick_breaking_attention",
        _prepare,
        {
            "mosaic": dispatch.Implementation(mosaic.attention, mosaic.refuses, mosaic.detail),
            "triton": dispatch.Implementation(triton.attention, triton.refuses, triton.detail),
            "xla": dispatch.Implementation(xla.attention, _refuses_nothing, xla.detail),
            "reference": dispatch.Implementation(reference.attention, _refuses_nothing),
        },
        calls.letters,
    )
)
