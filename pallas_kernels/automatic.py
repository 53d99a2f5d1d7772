"""Runs an op on a mesh of Auto axes, where XLA's partitioner chooses during compilation how arrays are sharded.

An op is a public function of this package, such as `stick_breaking_attention`. This module makes each call of an op one
operation of the compiled program, called a node. The node has a rule that tells XLA which array axes may be sharded.
XLA chooses the shardings, and then asks the node for the program of one device. This program is the op again, applied
to the shards of the arrays on this device.

Without the node, XLA would shard the code inside the op. Then every device would run all steps of a `lax.map` over a
sharded axis, and every array that a kernel reads would be all-gathered.

For the backward pass, a node saves only the arguments of the op. It saves no residuals of a kernel, because XLA has no
rule for sharding such residuals. So the backward pass runs the forward pass again.
"""

import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

_is_tracing_part = contextvars.ContextVar("is_tracing_part", default=False)


class Node(NamedTuple):
    """One call of an op as one operation of the program. XLA's partitioner shards the arrays of the call over the mesh.

    `function`: `function(*arrays)` computes the results on one device. `arrays` are the shards of this device.
    `letters`: one string for every array of the call: the letters of its axes, such as "B T N H".
    `results`: a pytree with one such string for every result of the op.
    `maps`: pairs (letter, group) for the axes that may be sharded. Along such an axis, every device can compute its
      shard of the results without communication. A group is a name. Axes in the same group are sharded over the same
      mesh axes: the axis N of query heads and the axis K of key heads, for example.
    `mesh`: the mesh of the arrays.
    """

    function: Callable
    letters: tuple[str, ...]
    results: Any
    maps: tuple[tuple[str, str], ...]
    mesh: AbstractMesh


def is_tracing_part() -> bool:
    """Return whether JAX is now tracing the program of one device for an op on a mesh of Auto axes.

    JAX first traces this program with the global shapes of the arrays, to learn the shapes of the results. In this
    trace, the type of an array (`jax.typeof`) still names the complete mesh. During compilation, XLA chooses how the
    arrays are sharded. Then it makes JAX trace the program again, with the shapes of one device's shards. This function
    returns True in both traces. On a mesh of Auto axes, GPU kernels are accepted only in these traces.
    """
    return _is_tracing_part.get()


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(node: Node, arrays: tuple):
    """Run one call of an op (`node`) on a mesh of Auto axes, and return the results of the op.

    XLA chooses how all arrays are sharded. `arrays` are the arrays of the call, with their global shapes and in the
    order of `node.letters`. `jax.grad` and `jax.vjp` work for every floating-point array.
    """
    return _divided(node, *arrays)


def _forward(node, arrays):
    return _divided(node, *arrays), arrays


def _backward(node, arrays, cotangents):
    """Return the gradients of `arrays`, the arguments of one call of an op (`node`).

    This is the backward pass of `run`. `cotangents` are the cotangents of the results of the op. A second node computes
    the gradients, with the function `_pull`. So XLA's partitioner chooses the shardings in the backward pass too. The
    gradient of an integer array is None.
    """
    floats = tuple(i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating))
    letters = (*node.letters, *jax.tree.leaves(node.results))
    back = node._replace(
        function=functools.partial(_pull, node, floats), letters=letters, results=tuple(node.letters[i] for i in floats)
    )
    gradients = dict(zip(floats, _divided(back, *arrays, *jax.tree.leaves(cotangents)), strict=True))
    return (tuple(gradients.get(i) for i in range(len(arrays))),)


run.__wrapped__.defvjp(_forward, _backward)


def _pull(node, floats, *values):
    """Return the gradients of the floating-point arrays in one call of an op (`node`), on one device.

    `floats`: the indices of the floating-point arrays among all arrays of the call.
    `values`: the shards of all arrays of the call on this device, followed by the cotangents of the results on this
      device.

    The forward pass of the op runs again, because its residuals were not saved.
    """
    arrays, cotangents = values[: len(node.letters)], values[len(node.letters) :]

    def function(*float_arrays):
        changed = dict(zip(floats, float_arrays, strict=True))
        return node.function(*(changed.get(i, x) for i, x in enumerate(arrays)))

    _, pull = jax.vjp(function, *(arrays[i] for i in floats))
    return pull(jax.tree.unflatten(jax.tree.structure(node.results), cotangents))


def _divided(node: Node, *arrays):
    """Run one call of an op (`node`) as an operation that XLA's partitioner can shard. Return the results of the op.

    `arrays` are the arrays of the call, with their global shapes. Under `jax.vmap`, the mapped arrays have one more
    axis in front. XLA may shard this axis too.
    """

    @jax.custom_batching.custom_vmap
    def one(*arrays):
        return _partitioned(node)(*arrays)

    @one.def_vmap
    def several(size, is_mapped, *arrays):
        new = f"V{len(node.maps)}"
        many = node._replace(
            function=jax.vmap(node.function, [0 if mapped else None for mapped in is_mapped]),
            letters=tuple(f"{new} {at}" if mapped else at for at, mapped in zip(node.letters, is_mapped, strict=True)),
            results=jax.tree.map(lambda at: f"{new} {at}", node.results),
            maps=(*node.maps, (new, new)),
        )
        return _divided(many, *arrays), jax.tree.map(lambda _: True, node.results)

    return one(*arrays)


def _partitioned(node: Node) -> Callable:
    """Return a function `f(*arrays)` that runs one call of an op (`node`) and that XLA's partitioner can shard.

    During compilation, XLA first calls `_rule`, which says which array axes may be sharded. Then XLA chooses the
    shardings, and calls the inner function `partition`, which returns the program of one device.
    """
    function = custom_partitioning(functools.partial(_as_part, node))

    def partition(mesh, arrays, results):
        axes = _axes(node, mesh, [*arrays, *jax.tree.leaves(results)])

        def sharding(letters):
            return NamedSharding(mesh, _spec(node, axes, letters))

        def summed(letters, x):  # psum of a gradient over the mesh axes that shard only other arrays of the node
            mapped = {group for at, group in node.maps if at in letters.split()}
            others = tuple(axis for group, names in axes.items() if group not in mapped for axis in names)
            return lax.psum(x, others) if others else x

        def run_part(*arrays):
            return jax.tree.map(summed, node.results, _as_part(node, *arrays))

        return mesh, run_part, jax.tree.map(sharding, node.results), tuple(map(sharding, node.letters))

    function.def_partition(partition, sharding_rule=functools.partial(_rule, node))
    return function


def _as_part(node: Node, *arrays):
    """Run one call of an op (`node`) on one device. Return the results on this device.

    JAX may trace this function several times. In the first trace, XLA has not yet chosen the shardings, and `arrays`
    have their global shapes. In later traces, `arrays` are the shards of this device. In all traces,
    `is_tracing_part()` is True.
    """
    token = _is_tracing_part.set(True)
    try:
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=node.mesh.abstract_device)):
            # The partitioner refuses a function with captured constants, but accepts a jitted function with them.
            return jax.jit(lambda *arrays: node.function(*arrays))(*arrays)
    finally:
        _is_tracing_part.reset(token)


def _dimensions(node: Node, shapes) -> Iterator[tuple[int, str | None, int]]:
    """Yield (index, group, size) for every axis of every array and of every result in one call of an op (`node`).

    `shapes` has the shapes of all arrays, followed by the shapes of all results.

    `index`: the axis belongs to the shape `shapes[index]`.
    `group`: a name from `node.maps`. Axes in the same group are sharded over the same mesh axes. None means that the
      axis must not be sharded.
    `size`: the number of elements along the axis.
    """
    maps = dict(node.maps)
    for i, (letters, shape) in enumerate(zip((*node.letters, *jax.tree.leaves(node.results)), shapes, strict=True)):
        for at, size in zip(letters.split(), shape, strict=True):
            yield i, maps.get(at), size


def _rule(node: Node, mesh, values, results) -> SdyShardingRule:
    """Return the rule that tells XLA's partitioner which axes it may shard in one call of an op (`node`).

    `values` and `results` are the types of the arrays and of the results; only their shapes are read. `node.maps` puts
    axes into groups. Axes in the same group are sharded over the same mesh axes. In a group, every size is a multiple
    of the smallest size: for example, the number N of query heads is a multiple of the number K of key heads. XLA
    shards all axes of a group as it shards the smallest axis, so the number of shards is at most the smallest size. An
    axis without a group is not sharded.
    """
    shapes = [tuple(value.shape) for value in (*values, *results)]
    least, factors, whole, sizes = {}, [[] for _ in shapes], [], {}
    for _, group, size in _dimensions(node, shapes):
        least[group] = min(size, least.get(group, size))
    for i, group, size in _dimensions(node, shapes):
        if group is not None and size == least[group]:
            factors[i].append(group)
            continue
        whole.append(other := f"W{len(whole)}")
        factors[i].append(other if group is None else CompoundFactor(group, other))
        if group is not None:
            sizes[other] = size // least[group]
    mappings = [ArrayMapping(*each) for each in factors]
    arrays, others = tuple(mappings[: len(values)]), tuple(mappings[len(values) :])
    return SdyShardingRule(arrays, others, need_replication_factors=tuple(whole), **sizes)


def _axes(node: Node, mesh, shaped) -> dict[str, tuple[str, ...]]:
    """Choose the mesh axes over which the array axes of each group are sharded. Return {group: names of mesh axes}.

    A group is a name in `node.maps`: array axes in the same group are sharded over the same mesh axes. `shaped` has the
    types of all arrays, followed by the types of all results. Each type has the sharding that XLA proposes. Every group
    takes the first proposal that meets two conditions: the size of every axis in the group is a multiple of the number
    of shards, and no other group has already taken a mesh axis of this proposal. A group without such a proposal is
    left out of the result, and its axes are not sharded.
    """
    found, taken = {}, set()
    sizes = list(_dimensions(node, [x.shape for x in shaped]))
    specs = [[*x.sharding.spec, *[None] * x.ndim][: x.ndim] for x in shaped]
    for (_, group, _), entry in zip(sizes, (entry for spec in specs for entry in spec), strict=True):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        parts = math.prod(mesh.shape[axis] for axis in axes)
        fits = all(size % parts == 0 for _, other, size in sizes if other == group)
        if axes and group is not None and group not in found and fits and not taken & set(axes):
            found[group] = axes
            taken |= set(axes)
    return found


def _spec(node: Node, axes, letters: str) -> PartitionSpec:
    """Return the PartitionSpec of an array. `letters` are the letters of its axes, such as "B T N H".

    `node.maps` has the group of each letter that may be sharded. `axes` is {group: names of mesh axes}, the result of
    `_axes`.
    """
    maps = dict(node.maps)
    return PartitionSpec(*(axes.get(maps.get(at)) for at in letters.split()))
