"""An op on a mesh of Auto axes: one node for XLA's partitioner, with a rule that says which axes may be divided.

While XLA compiles, it decides how the arrays are divided. Then it asks for the program of one device. This program is
the op again, applied to the device's part of the arrays. XLA must not partition the code inside the op: XLA would run a
`lax.map` over a divided axis one step after the other, and would all-gather every array that a kernel reads.

The forward pass of a node saves only the arguments of the op, and no residuals of a kernel, because XLA has no rule for
dividing such residuals. So the backward pass runs the forward pass again.
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
    """An op as one node of the program that XLA's partitioner divides.

    `function(*arrays)` computes the results of one device from its part of the arrays. `letters` has the letters of the
    axes of every array, such as "B T N H". `results` has the letters of every result. `maps` has a pair (letter, group)
    for each letter along which the op is a map, as in `partition.Letters`. The axes of one group are divided over the
    same mesh axes. `mesh` is the mesh of the arrays.
    """

    function: Callable
    letters: tuple[str, ...]
    results: Any
    maps: tuple[tuple[str, str], ...]
    mesh: AbstractMesh


def is_tracing_part() -> bool:
    """Return whether JAX now traces the program of one device, for which XLA's partitioner asked.

    In this program, the arrays are the parts of one device, but their types (`jax.typeof`) still have the whole mesh.
    """
    return _is_tracing_part.get()


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(node: Node, arrays: tuple):
    """Return the results of a node for these arrays. They are differentiable in every floating-point array."""
    return _divided(node, *arrays)


def _forward(node, arrays):
    return _divided(node, *arrays), arrays


def _backward(node, arrays, cotangents):
    """Return the gradients of the arrays. They are the results of another node, whose function is `_pull`."""
    floats = tuple(i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating))
    letters = (*node.letters, *jax.tree.leaves(node.results))
    back = node._replace(
        function=functools.partial(_pull, node, floats), letters=letters, results=tuple(node.letters[i] for i in floats)
    )
    gradients = dict(zip(floats, _divided(back, *arrays, *jax.tree.leaves(cotangents)), strict=True))
    return (tuple(gradients.get(i) for i in range(len(arrays))),)


run.__wrapped__.defvjp(_forward, _backward)


def _pull(node, floats, *values):
    """Return the gradients of the arrays of a node whose indices are in `floats`, on one device.

    `values` holds all arrays of the node, then the cotangents of its results.
    """
    arrays, cotangents = values[: len(node.letters)], values[len(node.letters) :]

    def function(*float_arrays):
        changed = dict(zip(floats, float_arrays, strict=True))
        return node.function(*(changed.get(i, x) for i, x in enumerate(arrays)))

    _, pull = jax.vjp(function, *(arrays[i] for i in floats))
    return pull(jax.tree.unflatten(jax.tree.structure(node.results), cotangents))


def _divided(node: Node, *arrays):
    """Return the results of a node, computed by the program that XLA's partitioner makes of it.

    `jax.vmap` turns the node into a node whose arrays have one more axis, which may be divided too.
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
    """Return the node as a function of its arrays, with the rule by which XLA's partitioner divides it."""
    function = custom_partitioning(functools.partial(_as_part, node))

    def partition(mesh, arrays, results):
        axes = _axes(node, mesh, [*arrays, *jax.tree.leaves(results)])

        def sharding(letters):
            return NamedSharding(mesh, _spec(node, axes, letters))

        def summed(letters, x):  # psum of a gradient over the mesh axes that do not divide it
            mapped = {group for at, group in node.maps if at in letters.split()}
            others = tuple(axis for group, names in axes.items() if group not in mapped for axis in names)
            return lax.psum(x, others) if others else x

        def run_part(*arrays):
            return jax.tree.map(summed, node.results, _as_part(node, *arrays))

        return mesh, run_part, jax.tree.map(sharding, node.results), tuple(map(sharding, node.letters))

    function.def_partition(partition, sharding_rule=functools.partial(_rule, node))
    return function


def _as_part(node: Node, *arrays):
    """Return the results of one device: the node's function of the parts of the arrays that this device has."""
    token = _is_tracing_part.set(True)
    try:
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=node.mesh.abstract_device)):
            # The partitioner refuses a function that has constants, but it takes a jitted function that has them.
            return jax.jit(lambda *arrays: node.function(*arrays))(*arrays)
    finally:
        _is_tracing_part.reset(token)


def _dimensions(node: Node, shapes) -> Iterator[tuple[int, str | None, int]]:
    """For every axis of the arrays and results of a node, yield (index of the array, group and size of the axis).

    `shapes`: the shapes of all arrays, then of all results. The group is None if the op is not a map along the axis.
    """
    maps = dict(node.maps)
    for i, (letters, shape) in enumerate(zip((*node.letters, *jax.tree.leaves(node.results)), shapes, strict=True)):
        for at, size in zip(letters.split(), shape, strict=True):
            yield i, maps.get(at), size


def _rule(node: Node, mesh, values, results) -> SdyShardingRule:
    """Return the rule that tells the partitioner which axes it may divide, and which of them it must divide together.

    The axes of one group are divided together. The size of each of them is a multiple of the smallest size in the
    group: N query heads are a multiple of K key heads. An axis along which the op is not a map stays whole.
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
    """Return {group: the names of the mesh axes that divide the axes of this group}.

    `shaped`: the arrays and results, with the shardings that XLA proposes. The first of them that is divided along an
    axis of a group decides for the group. Its mesh axes count only if their size divides the sizes of all axes of the
    group, and if they do not divide another group already.
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
    """Return the PartitionSpec of an array with these letters. `axes`: {group: mesh axes}, as in `_axes`."""
    maps = dict(node.maps)
    return PartitionSpec(*(axes.get(maps.get(at)) for at in letters.split()))
