"""An op on a mesh of Auto axes: one node for XLA's partitioner, with a rule that says which axes may be divided.

While XLA compiles, it decides how the arrays are divided. Then it asks for the program of one device. This program is
the op again, applied to the device's part of the arrays. XLA must not partition the code inside the op: it would run a
map over a divided axis one step after the other, and it would all-gather every array that a kernel reads.

A node has no residuals, because XLA has no rule for dividing them. So the backward pass runs the forward pass again.
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
    """One op with its static description.

    `function(*arrays)` computes the results of one device from its part of the arrays. `letters` and `results` name the
    axes of the arrays and of the results. `maps` has a pair (letter, group) for each letter along which the op is a
    map, as in `partition.Letters`. The axes of one group are divided together.
    """

    function: Callable
    letters: tuple[str, ...]
    results: Any
    maps: tuple[tuple[str, str], ...]
    mesh: AbstractMesh


def is_tracing_part() -> bool:
    """Return whether the code being traced is the program of one device.

    In this program, the types of the arrays (`jax.typeof`) still have the whole mesh.
    """
    return _is_tracing_part.get()


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(node: Node, arrays: tuple):
    """Return the results of a node. They are differentiable with respect to the floating-point arrays."""
    return _divided(node, *arrays)


def _forward(node, arrays):
    return _divided(node, *arrays), arrays


def _backward(node, arrays, cotangents):
    floats = tuple(i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating))
    letters = (*node.letters, *jax.tree.leaves(node.results))
    back = node._replace(
        function=functools.partial(_pull, node, floats), letters=letters, results=tuple(node.letters[i] for i in floats)
    )
    gradients = dict(zip(floats, _divided(back, *arrays, *jax.tree.leaves(cotangents)), strict=True))
    return (tuple(gradients.get(i) for i in range(len(arrays))),)


run.__wrapped__.defvjp(_forward, _backward)


def _pull(node, floats, *values):
    """Return the gradients of the arrays whose indices are in `floats`.

    `values` holds all arrays, then the cotangents.
    """
    arrays, cotangents = values[: len(node.letters)], values[len(node.letters) :]

    def function(*float_arrays):
        changed = dict(zip(floats, float_arrays, strict=True))
        return node.function(*(changed.get(i, x) for i, x in enumerate(arrays)))

    _, pull = jax.vjp(function, *(arrays[i] for i in floats))
    return pull(jax.tree.unflatten(jax.tree.structure(node.results), cotangents))


def _divided(node: Node, *arrays):
    """Run the node through XLA's partitioner.

    `jax.vmap` turns the node into a node with one more axis, which may be divided too.
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
    """Apply the node's function to the arrays of one device of the mesh."""
    token = _is_tracing_part.set(True)
    try:
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=node.mesh.abstract_device)):
            # The partitioner refuses a function that has constants, but it takes a jitted function that has them.
            return jax.jit(lambda *arrays: node.function(*arrays))(*arrays)
    finally:
        _is_tracing_part.reset(token)


def _dimensions(node: Node, shapes) -> Iterator[tuple[int, str | None, int]]:
    """For every axis of every array and result, yield (index of the array, group of the axis, size of the axis).

    The group is None if the op is not a map along the axis.
    """
    maps = dict(node.maps)
    for i, (letters, shape) in enumerate(zip((*node.letters, *jax.tree.leaves(node.results)), shapes, strict=True)):
        for at, size in zip(letters.split(), shape, strict=True):
            yield i, maps.get(at), size


def _rule(node: Node, mesh, values, results) -> SdyShardingRule:
    """Return the rule that tells the partitioner which axes it may divide, and which of them it must divide together.

    The axes of one group are divided together. Their sizes are multiples of the smallest one, as N is a multiple of K.
    An axis along which the op is not a map stays whole.
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
    """Return the mesh axes that divide each group.

    The first array that is divided along an axis of a group decides. Its mesh axes count only if they divide the sizes
    of all axes of the group, and if they do not divide another group already.
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
    maps = dict(node.maps)
    return PartitionSpec(*(axes.get(maps.get(at)) for at in letters.split()))
