"""Runs an op on arrays that are sharded over the devices of a mesh.

An op is a public function of this package, such as `stick_breaking_attention`. It names every axis of its arrays by a
letter, such as B, T, N, H. It also says which axes may be sharded. Along such an axis, every device can compute its
shard of the results without communication. What the op does depends on the type of the mesh axes:

- Explicit axes: the types of the arrays (`jax.typeof`) contain their shardings. The op wraps itself in `jax.shard_map`.
  If an array is sharded along an axis that must not be sharded, the op raises an error.
- Auto axes, if all axes of the mesh are Auto: the types of the arrays do not contain their shardings. For XLA, the op
  is one operation of the program. XLA chooses the shardings, and then asks for the program of one device
  (`automatic.py`).
- Manual axes, inside a `jax.shard_map` of the caller: the op computes with the shards of this device. An array varies
  over a mesh axis if it may differ between the devices along this axis. If at least one array varies over a mesh axis,
  the op marks all its arrays as varying over this axis. So JAX sums the gradients of the newly marked arrays over this
  axis. If the mesh also has Auto axes with more than one device, the GPU kernels refuse the call.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, get_abstract_mesh

from . import automatic

# Marks that stand in place of the letters of an argument. STATIC: the argument is not an array. RECOMPUTED: it is an
# array that every device computes with `Letters.inside`.
STATIC, RECOMPUTED = "static", "anew"


class Letters(NamedTuple):
    """The letters of all array axes in one call of an op, and which of these axes may be sharded over a mesh.

    `name`: the name of the op, for messages.
    `call`: a pytree with the structure of the checked arguments of the call. It has a string for every argument: the
      letters of an array, such as "B T N H" for an array with four axes; STATIC for an argument that is not an array;
      or RECOMPUTED for an array that every device computes itself, from its shards of the other arrays.
    `results`: a pytree with the letters of every result.
    `maps`: {letter: group} for the axes that may be sharded. A group is a name. Axes in the same group are sharded over
      the same mesh axes: the axis N of query heads and the axis K of key heads, for example.
    `inside`: a function that computes the RECOMPUTED arrays on one device. It takes the arguments of the op with None
      in place of these arrays, and returns the complete arguments.
    """

    name: str
    call: Any
    results: Any
    maps: dict[str, str]
    inside: Callable[[Any], Any] = lambda call: call


class Bound(NamedTuple):
    """A function with fixed last arguments: `Bound(f, static)(*values)` is `f(*values, *static)`.

    Two `Bound`s with the same function and the same static values are equal, so that jit compiles them once.
    """

    function: Callable
    static: tuple = ()

    def __call__(self, *values):
        return self.function(*values, *self.static)


class _Array(NamedTuple):
    """An array argument of an op: its name, the letters of its axes, and its value. Printed as "x [T,D]=[4, 8]"."""

    name: str
    letters: tuple[str, ...]
    value: Any

    def __str__(self):
        return f"{self.name} [{','.join(self.letters)}]={list(self.value.shape)}"


class _Part(NamedTuple):
    """The program of one device: `part(*shards)` returns the results of the op on this device.

    `shards` are the shards of the op's arrays on this device. The program builds the arguments of the op from them, and
    calls `compute`.

    `compute`: returns the results of the op for its arguments.
    `inside`: computes the arrays that are marked RECOMPUTED in `Letters`, and adds them to the arguments.
    `tree`: the pytree structure of the arguments.
    `static`: one entry for every leaf of the arguments. A RECOMPUTED array has the entry None. Any other array has the
      entry `_Array` (the class): its shard takes this position. The entry of any other leaf is its value.
    """

    compute: Callable[[Any], Any]
    inside: Callable[[Any], Any]
    tree: Any
    static: tuple

    def __call__(self, *values):
        values = iter(alike(*values))
        leaves = [next(values) if leaf is _Array else leaf for leaf in self.static]
        return self.compute(self.inside(jax.tree.unflatten(self.tree, leaves)))


def run(letters: Letters, call: Any, compute: Callable[[Any], Any]) -> Any:
    """Return `compute(call)`, the results of an op. On a mesh, every device runs `compute` on its shards of the arrays.

    Args:
      letters: the letters of all array axes in the call, and which of these axes may be sharded.
      call: a NamedTuple of the arrays and settings of one call of the op.
      compute: a hashable function of `call`, for example a `Bound`. Two functions that do the same work must compare
        equal, so that they are compiled only once.

    Raises:
      ValueError: the mesh has Explicit axes, and at least one of these is true. `Letters.maps` explains the groups.
        - An array is sharded along an axis that is not in a group.
        - Two axes of the same group are sharded over different mesh axes.
        - Two axes of different groups are sharded over the same mesh axis.
        - The size of an axis is not a multiple of the number of shards.
        - `jax.vmap` maps over a sharded axis.
    """
    arrays, part = _arrays(letters, call, compute)
    mesh = _mesh(arrays)
    if _is_automatic(mesh):
        words = tuple(" ".join(array.letters) for array in arrays)
        node = automatic.Node(part, words, letters.results, tuple(letters.maps.items()), mesh)
        return automatic.run(node, tuple(array.value for array in arrays))
    if AxisType.Explicit not in mesh.axis_types:
        values, tree = jax.tree.flatten(call)
        return compute(tree.unflatten(alike(*values)))
    axes = _axes(letters, arrays, mesh)
    spec = functools.partial(_spec, letters.maps, axes)
    ins = tuple(spec(array.letters) for array in arrays)
    outs = jax.tree.map(lambda result: spec(result.split()), letters.results)
    return _over_mesh(part, mesh, ins, _Specs(outs), *(array.value for array in arrays))


def look(letters: Letters, call: Any, compute: Callable[[Any], Any]) -> Any:
    """Return `compute(call)`. `compute` may read only the shapes and dtypes of the arrays in `call`.

    Nothing is executed on a device. `dispatch.explain` uses this function: its `compute` returns a description of the
    chosen implementation. `letters` and `call` are as in `run`. On a mesh of Explicit axes, `compute` receives the
    arguments with tracers in place of the arrays. The tracers have the shapes of one device's shards. On a mesh of Auto
    axes, the tracers have the global shapes, because XLA shards arrays only when it compiles. Otherwise, `compute`
    receives `call` itself.
    """
    arrays, part = _arrays(letters, call, compute)
    mesh = _mesh(arrays)
    if AxisType.Explicit not in mesh.axis_types and not _is_automatic(mesh):
        return compute(call)
    axes, seen = {} if _is_automatic(mesh) else _axes(letters, arrays, mesh), []
    shapes = []
    for array in arrays:
        parts = [math.prod(mesh.shape[a] for a in axes.get(letters.maps.get(at), ())) for at in array.letters]
        shape = tuple(size // n for size, n in zip(array.value.shape, parts, strict=True))
        shapes.append(jax.ShapeDtypeStruct(shape, array.value.dtype))
    jax.eval_shape(lambda *values: seen.append(part(*values)), *shapes)
    return seen[0]


def whole(function: Callable, x, *static) -> Any:
    """Return `function(x, *static)`. On a mesh of Explicit axes, every device computes it from the complete array `x`.

    If `x` is sharded over such axes, it is all-gathered first.
    """
    mesh = _mesh([_Array("", (), x)])
    if AxisType.Explicit not in mesh.axis_types:
        return function(x, *static)
    return _over_mesh(Bound(function, static), mesh, (PartitionSpec(),), _Specs(PartitionSpec()), x)


def alike(*values) -> list:
    """Mark all arrays among `values` as varying over the same mesh axes. Return all values as a list.

    Inside `jax.shard_map`, an array varies over a mesh axis if it may differ between the devices along this axis. If at
    least one array varies over a mesh axis, all arrays are marked as varying over this axis. Values that are not arrays
    are returned unchanged.
    """
    axes = [_varying(x) for x in values]
    every = frozenset().union(*axes)
    missing = [tuple(sorted(every - own)) if _is_array(x) else () for x, own in zip(values, axes, strict=True)]
    return [lax.pcast(x, more, to="varying") if more else x for x, more in zip(values, missing, strict=True)]


def _is_array(x) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _varying(x) -> frozenset:
    """Return the names of the Manual mesh axes over which `x` varies, that is, may differ between devices.

    If `x` is not an array, return an empty set.
    """
    return jax.typeof(x).manual_axis_type.varying if _is_array(x) else frozenset()


def _mesh(arrays: list[_Array]) -> AbstractMesh:
    """Return the mesh on which an op runs: the mesh of the context, or else the mesh of the first array with a mesh.

    If neither the context nor an array has a mesh, return a mesh without axes. Its `axis_types` is an empty tuple, not
    None.
    """
    meshes = [get_abstract_mesh(), *(jax.typeof(array.value).sharding.mesh for array in arrays)]
    return next((mesh for mesh in meshes if mesh.axis_names), AbstractMesh((), (), axis_types=()))


def _is_automatic(mesh: AbstractMesh) -> bool:
    """Return whether the mesh has more than one device and all its axes are of type Auto."""
    return mesh.size > 1 and set(mesh.axis_types) == {AxisType.Auto}


class _Specs(NamedTuple):
    """A pytree of PartitionSpecs, wrapped in a hashable tuple so that it can be a static argument of jit."""

    tree: Any


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _over_mesh(function, mesh, ins, outs, *values):
    """Return `function(*values)`, computed by `jax.shard_map` over the Explicit axes of the mesh.

    `ins` has the PartitionSpec of every value. `outs` has the PartitionSpecs of the results. `function` receives one
    device's shard of every value.
    """
    values = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(values, ins, strict=True)]
    # By default, shard_map makes all mesh axes Manual, except those over which vmap runs.
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Explicit}
    names = dict(axis_names=explicit) if AxisType.Auto in mesh.axis_types else {}

    def on_device(*values):
        kinds = zip(get_abstract_mesh().axis_names, get_abstract_mesh().axis_types, strict=True)
        if left := [name for name, kind in kinds if kind is AxisType.Explicit]:
            raise ValueError(
                f"this op does not support jax.vmap over an array axis that is sharded over {_sizes(mesh, left)}; "
                "merge this array axis into the axis B or T of the op instead of using jax.vmap"
            )
        return function(*values)

    return jax.shard_map(on_device, mesh=mesh, in_specs=ins, out_specs=outs.tree, **names)(*values)


def _arrays(letters: Letters, call, compute) -> tuple[list[_Array], _Part]:
    """Return (arrays, part): the arrays in one call of an op, and the program that one device runs, a `_Part`.

    `part` is a function of this device's shards of `arrays`. `letters`, `call` and `compute` are the arguments of
    `run`.
    """
    named, tree = jax.tree.flatten_with_path(letters.call)
    arrays, static = [], []
    for (path, word), value in zip(named, tree.flatten_up_to(call), strict=True):
        if word not in (STATIC, RECOMPUTED) and _is_array(value):
            arrays.append(_Array(path[-1].name, tuple(word.split()), value))
            static.append(_Array)
        else:
            static.append(None if word == RECOMPUTED else value)
    return arrays, _Part(compute, letters.inside, tree, tuple(static))


def _divided(array: _Array) -> dict[str, tuple[str, ...]]:
    """Return {letter of an axis: names of the mesh axes over which it is sharded}, for the sharded axes of an array."""
    entries = jax.typeof(array.value).sharding.spec
    entries = [(axes,) if isinstance(axes, str) else axes for axes in entries]
    return {at: tuple(axes) for at, axes in zip(array.letters, entries, strict=True) if isinstance(axes, tuple)}


def _sizes(mesh: AbstractMesh, axes) -> str:
    """Return the names and sizes of mesh axes as words for a message: "the mesh axis 'data' of size 2"."""
    return " and ".join(f"the mesh axis {axis!r} of size {mesh.shape[axis]}" for axis in axes)


def _spec(maps, axes, letters) -> PartitionSpec:
    """Return the PartitionSpec of an array. `letters` are the letters of its axes.

    `maps` is {letter: group}, as in `Letters`. `axes` is {group: names of mesh axes}: the array axes of the group are
    sharded over these mesh axes.
    """
    entries = (axes.get(maps.get(at), ()) for at in letters)
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def _axes(letters: Letters, arrays: list[_Array], mesh) -> dict[str, tuple[str, ...]]:
    """Return {group: names of mesh axes}: the mesh axes over which the array axes of each group are sharded.

    A group is a name in `letters.maps`, which is {letter of an axis: group}. A group without a sharded axis is left
    out. The shardings are read from the types of the arrays. Raise ValueError if the op cannot run with these
    shardings.
    """
    maps, found, owners = letters.maps, {}, {}

    sizes = functools.partial(_sizes, mesh)
    for array in arrays:
        divided = _divided(array)
        for at, axes in divided.items():
            if at not in maps:
                allowed = _spec({letter: letter for letter in maps}, divided, array.letters)
                raise ValueError(
                    f"{array} is sharded along {at} over {sizes(axes)}, but {letters.name} can be sharded only along "
                    f"{', '.join(maps)}; pass jax.sharding.reshard({array.name}, {allowed}) instead"
                )
            owner = owners.setdefault(maps[at], (at, array))
            if found.setdefault(maps[at], axes) != axes:
                raise ValueError(
                    f"{at} of {array} is sharded over {sizes(axes)}, but {owner[0]} of {owner[1]} is sharded over "
                    f"{sizes(found[maps[at]])}; shard both over the same mesh axes with jax.sharding.reshard"
                )
    for at, axes in found.items():
        for other, more in found.items():
            shared = [axis for axis in axes if axis in more]
            if at < other and shared:
                pair = " and ".join(f"{letter} of {array}" for letter, array in (owners[at], owners[other]))
                raise ValueError(
                    f"both {pair} are sharded over {sizes(shared)}, but only one of them may be sharded in this way; "
                    "reshard one of the arrays with jax.sharding.reshard"
                )
    for array in arrays:
        for at, size in zip(array.letters, array.value.shape, strict=True):
            axes = found.get(maps.get(at), ())
            if size % math.prod(mesh.shape[axis] for axis in axes):
                owner = owners[maps[at]]
                raise ValueError(
                    f"{at}={size} of {array} must be sharded like {owner[0]} of {owner[1]}, over {sizes(axes)}, but "
                    f"{size} is not a multiple of the number of shards; shard {owner[1].name} over fewer devices "
                    "with jax.sharding.reshard"
                )
    return found
