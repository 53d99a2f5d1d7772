"""Runs an op on a mesh of Auto axes, where XLA decides during compilation how arrays are divided over the devices.

An op is a public function of this package, such as `stick_breaking_attention`. Here each call of an op becomes one
node: one operation of the program, with a rule that tells XLA's partitioner along which axes it may divide the arrays.
The partitioner decides how the arrays are divided. Then it asks for the program of one device. This program is the op
again, applied to the device's part of the arrays. The partitioner must not divide the code inside the op: then every
device would run all steps of a `lax.map` over a divided axis, and every array that a kernel reads would be
all-gathered.

The forward pass of a node saves only the arguments of the op for the backward pass. It saves no residuals of a kernel,
because XLA has no rule for dividing such residuals. So the backward pass runs the forward pass again.
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
    """One call of an op as one operation of the program, which XLA's partitioner divides over the devices of a mesh.

    `function`: computes the results of one device, from this device's part of the arrays: `function(*arrays)`.
    `letters`: the letters of the axes of every array, such as "B T N H".
    `results`: a tree with the letters of every result.
    `maps`: a pair (letter, group) for each letter along which the arrays may be divided, because every device can then
      compute its part of the results alone. A group is a name. Axes whose letters have the same group are divided over
      the same mesh axes: query heads N and key heads K, for example.
    `mesh`: the mesh of the arrays.
    """

    function: Callable
    letters: tuple[str, ...]
    results: Any
    maps: tuple[tuple[str, str], ...]
    mesh: AbstractMesh


def is_tracing_part() -> bool:
    """Return whether JAX is now tracing the program of one device, at the request of XLA's partitioner.

    This happens on a mesh of Auto axes. The arrays of this program have the shapes of one device's part, but their
    types (`jax.typeof`) still name the whole mesh. Kernels can run in this program, although they cannot run elsewhere
    on a mesh of Auto axes. So `hopper.mesh_refuses` calls this function.
    """
    return _is_tracing_part.get()


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(node: Node, arrays: tuple):
    """Run a node (one call of an op) in a program that XLA's partitioner divides over the mesh, and return the results.

    `arrays` are the undivided arrays, in the order of `node.letters`. `jax.grad` and `jax.vjp` work for every
    floating-point array.
    """
    return _divided(node, *arrays)


def _forward(node, arrays):
    return _divided(node, *arrays), arrays


def _backward(node, arrays, cotangents):
    """Run the backward pass of a node (one call of an op). Return the gradients of `arrays`, the arguments of the op.

    `cotangents` are the cotangents of the results of the op. The gradients are the results of a second node, whose
    function is `_pull`. So XLA's partitioner divides the backward pass too. The gradient of an integer array is None.
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
    """Return the gradients of the floating-point arrays of a node (one call of an op), computed on one device.

    `floats` are the indices of these arrays in `node.letters`. `values` are one device's part of all arrays of
    the node, followed by the cotangents of its results. The function of the node runs again to make the residuals.
    """
    arrays, cotangents = values[: len(node.letters)], values[len(node.letters) :]

    def function(*float_arrays):
        changed = dict(zip(floats, float_arrays, strict=True))
        return node.function(*(changed.get(i, x) for i, x in enumerate(arrays)))

    _, pull = jax.vjp(function, *(arrays[i] for i in floats))
    return pull(jax.tree.unflatten(jax.tree.structure(node.results), cotangents))


def _divided(node: Node, *arrays):
    """Run a node (one call of an op) as an operation that XLA's partitioner divides. Return the results.

    `arrays` are the undivided arrays of the node. `jax.vmap` turns the node into another node, whose mapped arrays have
    one more axis in front. XLA may divide this axis too.
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
    """Return a node (one call of an op) as a function of its arrays that XLA's partitioner can divide over the mesh.

    XLA calls `_rule` to learn which axes it may divide. Then it calls `partition`, a function inside this one, to get
    the program of one device.
    """
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
    """Run the function of a node (one call of an op) on one device's part of its arrays. Return this device's results.

    While the function runs, `is_tracing_part` returns True.
    """
    token = _is_tracing_part.set(True)
    try:
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=node.mesh.abstract_device)):
            # The partitioner refuses a function that has constants, but it takes a jitted function that has them.
            return jax.jit(lambda *arrays: node.function(*arrays))(*arrays)
    finally:
        _is_tracing_part.reset(token)


def _dimensions(node: Node, shapes) -> Iterator[tuple[int, str | None, int]]:
    """Yield (index, group, size) for every axis of every array and every result of a node (one call of an op).

    `shapes` are the shapes of all arrays, then of all results, and `index` is an index into `shapes`. `group` is the
    group of the axis in `node.maps`: the axes of one group are divided over the same mesh axes. It is None for an axis
    that must not be divided. `size` is the size of the axis.
    """
    maps = dict(node.maps)
    for i, (letters, shape) in enumerate(zip((*node.letters, *jax.tree.leaves(node.results)), shapes, strict=True)):
        for at, size in zip(letters.split(), shape, strict=True):
            yield i, maps.get(at), size


def _rule(node: Node, mesh, values, results) -> SdyShardingRule:
    """Return the rule that tells XLA's partitioner which axes it may divide, and which axes it must divide together.

    `values` and `results` are the types of the arrays and of the results of the node; only their shapes are read. The
    axes of one group of `node.maps` are divided over the same mesh axes. The size of each of these axes is a multiple
    of the smallest size in the group: N query heads are a multiple of K key heads. XLA may divide all axes of the
    group, into at most as many parts as the smallest axis has elements. An axis without a group is not divided.
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
    """Return {group: the names of the mesh axes over which the axes of this group are divided}.

    A group is a name in `node.maps`: all its axes are divided over the same mesh axes. `shaped` has all arrays and then
    all results of the node, with the shardings that XLA proposes. Each sharding proposes mesh axes for the axes of an
    array. For every group, this function takes the first proposal that fits. A proposal fits if the sizes of all axes
    of the group are multiples of the number of devices along the proposed mesh axes, and if none of these mesh axes
    divides another group already.
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
    """Return the PartitionSpec of an array whose axes have the letters `letters`, such as "B T N H".

    `axes` is the result of `_axes`: {group: the names of the mesh axes over which the axes of this group are divided}.
    """
    maps = dict(node.maps)
    return PartitionSpec(*(axes.get(maps.get(at)) for at in letters.split()))
