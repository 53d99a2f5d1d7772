"""The public functions of stick-breaking attention, and the checks of their arguments."""

import math
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .. import arguments, dispatch, partition
from . import call as calls
from . import mosaic, reference, triton, xla
from .call import Call, Mask, Stats, Where

_WEIGHTS_BYTES = 2**30  # the largest size in bytes of a result of `stick_breaking_weights`


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
    r"""Compute stick-breaking attention: attention without softmax, in which nearer keys take their weight first.

    The query at position q has a stick of length 1. It visits its keys from right to left, the nearest key first. The
    key at position k breaks off a share beta[q,k] = sigmoid(z[q,k]) of the part of the stick that remains, where
    z[q,k] = scale * <query_q, key_k> is the logit:

      A[q,k] = beta[q,k] * prod_{k < m < q} (1 - beta[q,m]),   out[q] = sum_k A[q,k] value_k,
      rem[q] = prod_k (1 - beta[q,k]) = 1 - sum_k A[q,k].

    Here, a query sees the keys k < q, which is the default. In general, the sums and products are over the keys that
    the query sees. A[q,k] is the weight of key k, and rem[q] is the length of the stick that remains after all keys.
    The weights of a query and its `rem` sum to 1, so there is no normalisation. There is no position embedding. Query
    head n uses key head n // (N // K). Sums are in float32, or in float64 if the arrays are float64.

    Args:
      query: [B, T, N, H], with T queries and N query heads.
      key: [B, S, K, H], with S keys and K key heads. N must be a multiple of K.
      value: [B, S, K, Hv].
      segment_ids: [B, T], the id of the document of each query. A query sees only keys with the same id. A query with
        a negative id is padding: its out is 0, and its rem is 1.
      key_segment_ids: [B, S], the id of the document of each key. By default `segment_ids`, which needs T = S.
      query_offset: the position of the first query among the keys: one integer, or [B] integers, one for each batch
        entry. By default S - T, so that the last query is at the position of the last key.
      scale: the factor of the logits, 1 / sqrt(H) by default. If it is an array, it also gets a gradient.
      attend_current: whether a query also sees the key at its own position. By default it sees only earlier keys.
      window: a query sees only keys that are at most `window` positions before it: q - k <= window.
      skip_below: the logarithm to base 2 of a threshold, such as -24. Keys are computed tile by tile. When less than
        2^skip_below remains of the stick of every query of a query tile, the keys further left are skipped. The skipped
        weights of a query sum to less than 2^skip_below, and `rem` is the length that remains at that point. The
        implementation "reference" skips no keys.
      return_stats: whether to return also `Stats(log_rem [B,T,N], kept [B,K])`. `log_rem` is the natural logarithm of
        rem. It does not underflow, and it is differentiable. `kept` is the number of key tiles computed, divided by the
        number of key tiles that the queries may see, for each batch entry and key head. It is below 1 only with
        `skip_below`.
      implementation: "mosaic", "triton", "xla", "reference", a sequence of these names in order of preference, or None
        for the best one that can run this call (see `explain`).
      tiles: (number of queries, number of keys) of the tiles in which the scores are computed. By default the
        implementation chooses.

    Returns:
      (out [B,T,N,Hv] in the type of `value`, rem [B,T,N] in fp32 or fp64), both differentiable; with `return_stats`
      also the `Stats`.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value (the message names the axes by their letters), or an
        array is sharded along an axis other than B, N and K (docs/reference/transformations.md).
      NotImplementedError: none of the implementations named in `implementation` can run this call.
      TypeError: a forward-mode derivative (`jax.jvp`) is taken. Only the implementation "reference" supports it,
        and not on a mesh of Auto axes.

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


def stick_breaking_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, ""] | Int[Array, "B"] | None = None,
    scale: float | Float[Array, ""] | None = None,
    attend_current: bool = False,
    window: int | None = None,
) -> Float[Array, "B N T S"]:
    r"""Return the weight of every key for every query in `stick_breaking_attention`: A [B,N,T,S], float32 or float64.

      A[q,k] = beta[q,k] * prod_{k < m < q} (1 - beta[q,m]),   beta = sigmoid(scale * <query_q, key_k>).

    The product is over the keys m, nearer than key k, that query q sees. A[q,k] is zero if query q does not see key k.
    The weights of a query sum to 1 - rem, where rem is the part of the stick that remains. Use this function to inspect
    the weights of small inputs: it keeps T * S numbers in memory for each head. `stick_breaking_attention` does not.

    Args:
      query: [B, T, N, H], with T queries and N query heads.
      key: [B, S, K, H], with S keys and K key heads. N must be a multiple of K.
      segment_ids, key_segment_ids, query_offset, scale, attend_current, window: as in `stick_breaking_attention`.

    Raises:
      ValueError: the arguments do not fit, as in `stick_breaking_attention`, or the weights take more than 1 GiB.

    >>> import jax.numpy as jnp
    >>> zeros = jnp.zeros((1, 4, 1, 8))  # every beta is one half
    >>> stick_breaking_weights(zeros, zeros)[0, 0].tolist()
    [[0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0], [0.25, 0.5, 0.0, 0.0], [0.125, 0.25, 0.5, 0.0]]
    """
    call = _prepare(
        query, key, key, segment_ids=segment_ids, key_segment_ids=key_segment_ids, query_offset=query_offset,
        scale=scale, attend_current=attend_current, window=window,
    )  # fmt: skip
    (B, T, N, _), S = call.query.shape, call.mask.S
    size = B * N * T * S * max(4, call.query.dtype.itemsize)
    if size > _WEIGHTS_BYTES:
        raise ValueError(
            f"the weights of B={B}, N={N}, T={T}, S={S} take {size / 2**30:,.1f} GiB, more than the limit of "
            f"{_WEIGHTS_BYTES / 2**30:g} GiB; pass fewer heads, or a part of the queries with the query_offset of "
            "its first query"
        )
    letters = calls.letters(call)._replace(name="stick_breaking_weights", results="B N T S")
    return partition.run(letters, call, partition.Bound(_weights))


def _weights(call: Call):
    return reference.weights(call)[0]


def merge_stick_breaking(
    near: tuple[Float[Array, "*b Hv"], Float[Array, "*b"]], far: tuple[Float[Array, "*b Hv"], Float[Array, "*b"]]
) -> tuple[Float[Array, "*b Hv"], Float[Array, "*b"]]:
    """Merge two results of `stick_breaking_attention` for the same queries: over nearer keys and over further keys.

    Let o be the output, and r = exp(log_rem) the part of the stick that remains. The merged result is
    o = o_near + r_near * o_far and r = r_near * r_far. The operation is associative.

    Args:
      near: (out [..., Hv], log_rem [...]) over the keys nearer to the queries. `log_rem` is a field of `Stats`.
      far: (out [..., Hv], log_rem [...]) over the keys further left, at smaller positions.

    Returns:
      (out [..., Hv], log_rem [...]) over the keys of both results.

    Raises:
      ValueError: `near` or `far` is not a pair of arrays; the shape of out without its last axis is not the shape of
        log_rem; or the shapes in `near` and in `far` differ.

    In the example, the far keys are 0..3 and the near keys are 4..7. `query_offset` is the position of the first query,
    counted from the first key that is passed: -4 for the near keys, and 0 for the far keys.

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
    >>> def part(keys, offset):
    ...     out, _, stats = stick_breaking_attention(q, k[:, keys], v[:, keys], query_offset=offset, return_stats=True)
    ...     return out, stats.log_rem
    >>> out, _ = merge_stick_breaking(part(slice(4, 8), -4), part(slice(0, 4), 0))
    >>> bool(jnp.allclose(out, stick_breaking_attention(q, k, v)[0], atol=1e-6))
    True
    """
    parts = []
    for name, part in (("near", near), ("far", far)):
        if not isinstance(part, tuple | list) or len(part) != 2 or not all(map(arguments.is_array, part)):
            types = [type(x).__name__ for x in part] if isinstance(part, tuple | list) else None
            got = type(part).__name__ if types is None else f"({', '.join(types)})"
            raise ValueError(f"{name} must be a pair of arrays, (out [..., Hv], log_rem [...]), got {got}")
        parts.append(tuple(map(jnp.asarray, part)))
    (out_near, log_near), (out_far, log_far) = parts
    for name, (out, log_rem) in (("near", parts[0]), ("far", parts[1])):
        if out.shape[:-1] != log_rem.shape:
            raise ValueError(
                f"{name} must be (out [..., Hv], log_rem [...]) with the same axes [...], "
                f"got out.shape={out.shape} and log_rem.shape={log_rem.shape}"
            )
    if out_near.shape != out_far.shape:  # if these shapes are equal, the shapes of log_rem are too
        raise ValueError(
            f"out must have the same shape in near and far, got out.shape={out_near.shape} in near and "
            f"out.shape={out_far.shape} in far"
        )
    out = out_near.astype(log_near.dtype) + jnp.exp(log_near)[..., None] * out_far.astype(log_near.dtype)
    return out.astype(out_near.dtype), log_near + log_far


def _checked(query, key, value):
    """Raise ValueError if the shapes or dtypes of the three arrays do not fit. Return the three arrays.

    If an argument is an object with `__jax_array__`, the array of this object is checked and returned.
    """
    query = arguments.floats("query", query, "B,T,N,H")
    key, value = arguments.floats("key", key, "B,S,K,H"), arguments.floats("value", value, "B,S,K,Hv")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    (B, _, N, H), (_, S, K, _) = query.shape, key.shape
    if H == 0:
        raise ValueError(f"H=0 of query.shape={query.shape} must be at least 1")
    if key.shape[0] != B or key.shape[3] != H:
        raise ValueError(f"B={B} and H={H} of query.shape={query.shape} must be the same in key.shape={key.shape}")
    if value.shape[:3] != (B, S, K):
        raise ValueError(f"B={B}, S={S}, K={K} of key.shape={key.shape} must be the same in value.shape={value.shape}")
    if K == 0 or N % K:
        raise ValueError(f"N={N} query heads must be a multiple of K={K} key heads (query.shape={query.shape})")
    return query, key, value


def _check_segments(name, ids, shape, letters):
    """Raise ValueError if `ids`, the value of the argument `name`, is not an array of integers of shape `shape`.

    `letters` names the axes of the array in the message, such as "B,T".
    """
    arguments.integers(name, ids, letters)
    if ids.shape != shape:
        raise ValueError(f"{name} must be integers [{letters}]={list(shape)}, got {ids.dtype}{list(ids.shape)}")


def _prepare(
    query, key, value, *, segment_ids=None, key_segment_ids=None, query_offset=None, scale=None, attend_current=False,
    window=None, skip_below=None, tiles=None, return_stats=False,
) -> Call:  # fmt: skip
    """Check the arguments of `stick_breaking_attention` and fill in the defaults. Return the arguments as a `Call`."""
    arguments.flag("return_stats", return_stats)
    query, key, value = _checked(query, key, value)
    (B, T, _, H), S = query.shape, key.shape[1]
    if segment_ids is not None:
        _check_segments("segment_ids", segment_ids, (B, T), "B,T")
        if key_segment_ids is None:
            if T != S:
                raise ValueError(f"segment_ids alone needs T = S, got T={T} and S={S}; pass key_segment_ids [B,S] too")
            key_segment_ids = segment_ids
        _check_segments("key_segment_ids", key_segment_ids, (B, S), "B,S")
    elif key_segment_ids is not None:
        raise ValueError("key_segment_ids [B,S] is given without segment_ids [B,T]; pass both")
    window = None if window is None else arguments.integer("window", window, 0)
    attend_current = arguments.flag("attend_current", attend_current)
    if skip_below is not None and (not isinstance(skip_below, numbers.Real) or not skip_below < 0):
        raise ValueError(f"skip_below={skip_below} must be a negative number, the log2 of a threshold below 1")
    if tiles is not None:
        if not isinstance(tiles, tuple | list) or len(tiles) != 2:
            raise ValueError(f"tiles={tiles} must be two positive integers, the numbers of queries and keys of a tile")
        tiles = tuple(arguments.integer(f"tiles[{i}]", size, 1) for i, size in enumerate(tiles))
    scale = 1 / math.sqrt(H) if scale is None else arguments.number("scale", scale)
    static = None
    if query_offset is None or (isinstance(query_offset, int | np.integer) and not isinstance(query_offset, bool)):
        static = S - T if query_offset is None else int(query_offset)
        offset = jnp.full((B,), static, jnp.int32)
    else:
        is_array = arguments.is_array(query_offset)
        if not is_array or query_offset.shape not in ((), (B,)) or not jnp.issubdtype(query_offset.dtype, jnp.integer):
            got = f"{query_offset.dtype}{list(query_offset.shape)}" if is_array else repr(query_offset)
            raise ValueError(f"query_offset must be an int or an array of integers of shape [] or [B]=[{B}], got {got}")
        offset = jnp.broadcast_to(query_offset, (B,)).astype(jnp.int32)
    return Call(
        query, key, value, Where(offset, segment_ids, key_segment_ids), scale,
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
