"""The routing of tokens to experts: `route` sorts the (token, choice) pairs by expert.

A layer calls `route` once and passes the result to all its calls of `expert_linear` and `expert_mlp`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .. import arguments, partition

# With E experts and R (token, choice) pairs: if (E + 1) * R is below this number, an expert index and a pair number
# together fit into one int32, and `_sorted` sorts these numbers.
_PACKED_BELOW = 2**31


class Routing(NamedTuple):
    """The result of `route`: the R = T * k (token, choice) pairs of T tokens with k choices each, sorted by expert.

    Choice s of token t is the pair with the number t * k + s. The sorted row of a pair is its index in the sorted list,
    from 0 to R - 1. Pairs without an expert are sorted last. Their expert index is E, the number of experts.

    `order`: [R], the number of the pair at every sorted row.
    `inverse`: [R], the sorted row of every pair: inverse[t * k + s] is the sorted row of choice s of token t.
    `offsets`: [E+1]. Expert e has the sorted rows from offsets[e] to offsets[e+1] - 1.
    `expert_indices`: [T,k], the expert of every pair, from 0 to E.

    On a mesh, `order`, `inverse` and `offsets` describe the pairs of all devices. If the arrays of an expert op are
    sharded along T, each device sorts the pairs of its tokens again.
    """

    order: jax.Array
    inverse: jax.Array
    offsets: jax.Array
    expert_indices: jax.Array

    @property
    def num_experts(self) -> int:
        """The number of experts, E."""
        return self.offsets.shape[-1] - 1

    @property
    def counts(self) -> jax.Array:
        """The number of (token, choice) pairs of every expert, [E]."""
        return jnp.diff(self.offsets)


def _check_indices(indices, E: int) -> None:
    """Raise ValueError if one of the expert indices, `indices` [T,k], is below 0 or above E."""
    wrong = np.argwhere((indices < 0) | (indices > E))
    if len(wrong):
        t, s = wrong[0]
        raise ValueError(f"expert_indices[{t},{s}]={indices[t, s]} must be from 0 to E={E}, where E means no expert")


def route(expert_indices: Int[Array, "T k"], num_experts: int) -> Routing:
    """Sort the T * k (token, choice) pairs by expert, for `expert_linear` and `expert_mlp`.

    The sort is stable: the pairs of one expert stay in the order of their numbers t * k + s.

    Args:
      expert_indices: [T, k], the expert of choice s of token t, from 0 to E. E means no expert: the output of the pair
        is zero, the gradient of its gate is zero, and the pair adds nothing to the gradient of x. In a JAX array, an
        index outside 0..E also means no expert, because a check would wait for the device.
      num_experts: the number E of experts.

    Returns:
      A `Routing`, which `expert_linear` and `expert_mlp` take as an argument.

    Raises:
      ValueError: expert_indices is no array of integers [T, k]; E or k is below 1; T * k is 2^31 or more; an index in
        a NumPy array is below 0 or above E. With `jax_enable_checks`, the indices of a JAX array are checked too, when
        the program runs.

    Source: "Scattered Mixture-of-Experts Implementation", arXiv 2403.08245.

    >>> import jax.numpy as jnp
    >>> r = route(jnp.array([[1, 0], [2, 1]]), 2)
    >>> r.order.tolist(), r.offsets.tolist()
    ([1, 0, 3, 2], [0, 1, 3])
    """
    arguments.integers("expert_indices", expert_indices, "T,k")
    num_experts = arguments.integer("num_experts", num_experts, 1)
    if expert_indices.shape[1] < 1:
        shape = expert_indices.shape
        raise ValueError(f"k={shape[1]} experts per token must be at least 1, got expert_indices.shape={shape}")
    (T, k), E = expert_indices.shape, num_experts
    if T * k >= 2**31:
        raise ValueError(
            f"T={T} tokens with k={k} choices make T * k rows, which must be below 2^31: route fewer tokens at once"
        )
    if isinstance(expert_indices, np.ndarray):
        _check_indices(expert_indices, E)
    elif jax.config.jax_enable_checks:
        jax.debug.callback(_check_indices, expert_indices, E)
    if expert_indices.dtype.itemsize < 4:  # a smaller type may be unable to hold E
        expert_indices = expert_indices.astype(jnp.int32)
    expert_indices = jnp.asarray(expert_indices)
    exists = (expert_indices >= 0) & (expert_indices < E)
    expert_indices = jnp.where(exists, expert_indices, E).astype(jnp.int32)
    return Routing(*partition.whole(_sorted, expert_indices, E), expert_indices)


def _sorted(expert_indices, num_experts: int):
    """Sort the (token, choice) pairs by expert. Return (order, inverse, offsets), the fields of a `Routing`.

    `expert_indices` [T,k] has the expert of every pair, from 0 to E = `num_experts`, where E means no expert. `order`
    [R] lists the numbers t * k + s of the pairs, sorted by expert. `inverse` [R] has, for every pair, its index in
    `order`. `offsets` [E+1] has, for every expert, the index in `order` at which its pairs begin. The last entry,
    offsets[E], is the number of pairs that have an expert.
    """
    experts = expert_indices.reshape(-1)
    rows = experts.shape[0]
    pairs = jnp.arange(rows, dtype=jnp.int32)
    if (num_experts + 1) * rows < _PACKED_BELOW:
        # One sort of expert * R + pair is stable by construction, and twice as fast as a sort with two keys.
        packed = jnp.sort(experts * rows + pairs)
        order = packed % max(rows, 1)
    else:
        order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(pairs, unique_indices=True)
    firsts = jnp.arange(num_experts + 1, dtype=jnp.int32)
    return order, inverse, first_positions(experts[order], firsts)


def first_positions(rows, values, *, after: bool = False):
    """Search each of `values` in the sorted array `rows`. Return the index of the first element that equals the value.

    With `after`, return the index after the last element that equals the value. A value that is not in `rows` gets the
    index at which it would be inserted. `jnp.searchsorted` does the same, but raises an error in a shard_map over only
    some axes of a mesh (JAX 0.12.0). The steps of the binary search are unrolled, because in a loop each step would be
    a separate kernel on a GPU.
    """
    low, high = jnp.zeros_like(values, jnp.int32), jnp.full_like(values, rows.shape[0], jnp.int32)
    for _ in range(rows.shape[0].bit_length()):
        middle = low + (high - low) // 2
        row = rows[jnp.minimum(middle, rows.shape[0] - 1)]
        is_further = (low < high) & (row <= values if after else row < values)
        low, high = jnp.where(is_further, middle + 1, low), jnp.where(is_further, high, middle)
        # Without the barrier, XLA on a CPU fuses all steps into one loop and compiles it again for every use of `low`.
        low, high = jax.lax.optimization_barrier((low, high))
    return low
