"""How an op runs when its arrays are divided over the devices of a mesh.

An op names the axes of its arrays by letters. It also names the letters along which it is a map: along these axes,
every device computes its own part without communication. The types of the arrays (`jax.typeof`) say how the arrays are
divided:
- On Explicit axes of a mesh, the op wraps itself in `jax.shard_map`. A division along any other letter is an error.
- On a mesh of Auto axes, the types do not say how the arrays are divided. There the op is one node of the program for
  XLA's partitioner. The partitioner decides the division and then asks for the program of one device (`automatic.py`).
- On Manual axes, inside a shard_map of the caller, the op runs on the part that it is given. First, all arrays are
  marked as varying over every axis over which at least one of them varies. Then JAX sums the gradients of the arrays
  that did not vary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, get_abstract_mesh

from . import automatic

# Values in place of letters. STATIC: not an array. RECOMPUTED: `Letters.inside` computes it on every device.
STATIC, RECOMPUTED = "static", "anew"


class Letters(NamedTuple):
    """The letters of the axes of all arrays in one call of an op: "B T N H" for an array with four axes.

    `name`: the name of the op, for messages. `call`: a tree with the structure of the call, whose leaves are letters,
    STATIC or RECOMPUTED. `results`: the letters of every result. `maps`: {letter: group} for the letters along which
    the op is a map; the letters of one group are divided together. `inside(call)`: completes the call of one device,
    where the leaves marked RECOMPUTED are still None.
    """

    name: str
    call: Any
    results: Any
    maps: dict[str, str]
    inside: Callable[[Any], Any] = lambda call: call


class Bound(NamedTuple):
    """A function of `values` that returns `function(*values, *static)`.

    Two `Bound`s with the same function and the same static values are equal, so that jit compiles them once.
    """

    function: Callable
    static: tuple = ()

    def __call__(self, *values):
        return self.function(*values, *self.static)


class _Array(NamedTuple):
    name: str
    letters: tuple[str, ...]
    value: Any

    def __str__(self):
        return f"{self.name} [{','.join(self.letters)}]={list(self.value.shape)}"


class _Part(NamedTuple):
    """Rebuilds the call of one device from the values of its arrays, and runs `compute` on it."""

    compute: Callable[[Any], Any]
    inside: Callable[[Any], Any]
    tree: Any
    static: tuple

    def __call__(self, *values):
        values = iter(alike(*values))
        leaves = [next(values) if leaf is _Array else leaf for leaf in self.static]
        return self.compute(self.inside(jax.tree.unflatten(self.tree, leaves)))


def run(letters: Letters, call: Any, compute: Callable[[Any], Any]) -> Any:
    """Run `compute(call)`. On a mesh, every device runs it on its part of the arrays.

    Args:
      compute: a hashable function, such as a `Bound`. Two functions that do the same work must be equal, so that they
        are compiled once.

    Raises:
      ValueError: an array is divided along a letter that is not in `maps`, or two arrays are divided differently.
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
    """Return the result of `compute` for the call that `run` would give to one device.

    On Explicit or Auto axes, `compute` receives tracers, so nothing is executed.
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
    """Return `function(x, *static)`. On an Explicit mesh, every device computes it from the whole of x."""
    mesh = _mesh([_Array("", (), x)])
    if AxisType.Explicit not in mesh.axis_types:
        return function(x, *static)
    return _over_mesh(Bound(function, static), mesh, (PartitionSpec(),), _Specs(PartitionSpec()), x)


def alike(*values) -> list:
    """Return the values. Every array is marked as varying over each shard_map axis over which at least one varies."""
    axes = [_varying(x) for x in values]
    every = frozenset().union(*axes)
    missing = [tuple(sorted(every - own)) if _is_array(x) else () for x, own in zip(values, axes, strict=True)]
    return [lax.pcast(x, more, to="varying") if more else x for x, more in zip(values, missing, strict=True)]


def _is_array(x) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _varying(x) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying if _is_array(x) else frozenset()


def _mesh(arrays: list[_Array]) -> AbstractMesh:
    """Return the mesh of the context, else of the arrays, else an empty mesh. Its `axis_types` is always a tuple."""
    meshes = [get_abstract_mesh(), *(jax.typeof(array.value).sharding.mesh for array in arrays)]
    return next((mesh for mesh in meshes if mesh.axis_names), AbstractMesh((), (), axis_types=()))


def _is_automatic(mesh: AbstractMesh) -> bool:
    return mesh.size > 1 and set(mesh.axis_types) == {AxisType.Auto}


class _Specs(NamedTuple):
    """A hashable tree of PartitionSpecs."""

    tree: Any


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _over_mesh(function, mesh, ins, outs, *values):
    values = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(values, ins, strict=True)]
    # By default shard_map makes all axes Manual, except the axes that vmap has taken.
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Explicit}
    names = dict(axis_names=explicit) if AxisType.Auto in mesh.axis_types else {}

    def on_device(*values):
        kinds = zip(get_abstract_mesh().axis_names, get_abstract_mesh().axis_types, strict=True)
        if left := [name for name, kind in kinds if kind is AxisType.Explicit]:
            raise ValueError(
                f"jax.vmap runs over an axis that {_sizes(mesh, left)} divides, which the op cannot see; "
                "make that axis a part of B or T of the op instead"
            )
        return function(*values)

    return jax.shard_map(on_device, mesh=mesh, in_specs=ins, out_specs=outs.tree, **names)(*values)


def _arrays(letters: Letters, call, compute) -> tuple[list[_Array], _Part]:
    """Return the arrays of a call, and the function that computes with their values."""
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
    """Return {letter: the mesh axes that divide this axis} for an array."""
    entries = jax.typeof(array.value).sharding.spec
    entries = [(axes,) if isinstance(axes, str) else axes for axes in entries]
    return {at: tuple(axes) for at, axes in zip(array.letters, entries, strict=True) if isinstance(axes, tuple)}


def _sizes(mesh: AbstractMesh, axes) -> str:
    return " and ".join(f"{axis!r}={mesh.shape[axis]}" for axis in axes)


def _spec(maps, axes, letters) -> PartitionSpec:
    entries = (axes.get(maps.get(at), ()) for at in letters)
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def _axes(letters: Letters, arrays: list[_Array], mesh) -> dict[str, tuple[str, ...]]:
    """Return {group: the mesh axes that divide it}. Raise ValueError if the op cannot run with this division."""
    maps, found, owners = letters.maps, {}, {}

    sizes = functools.partial(_sizes, mesh)
    for array in arrays:
        divided = _divided(array)
        for at, axes in divided.items():
            if at not in maps:
                allowed = _spec({letter: letter for letter in maps}, divided, array.letters)
                raise ValueError(
                    f"{array} is divided along {at} by {sizes(axes)}, and {letters.name} can be divided along "
                    f"{', '.join(maps)} only; pass jax.sharding.reshard({array.name}, {allowed}) instead"
                )
            owner = owners.setdefault(maps[at], (at, array))
            if found.setdefault(maps[at], axes) != axes:
                raise ValueError(
                    f"{at} of {array} is divided by {sizes(axes)}, but {owner[0]} of {owner[1]} by "
                    f"{sizes(found[maps[at]])}; give both the same division by jax.sharding.reshard"
                )
    for at, axes in found.items():
        for other, more in found.items():
            if at < other and set(axes) & set(more):
                pair = " and ".join(f"{letter} of {array}" for letter, array in (owners[at], owners[other]))
                raise ValueError(f"{sizes(axes)} divides both {pair}; change one of them by jax.sharding.reshard")
    for array in arrays:
        for at, size in zip(array.letters, array.value.shape, strict=True):
            axes = found.get(maps.get(at), ())
            if size % math.prod(mesh.shape[axis] for axis in axes):
                owner = owners[maps[at]]
                raise ValueError(
                    f"{at}={size} of {array} is no multiple of {sizes(axes)}, which divides {owner[0]} of {owner[1]}; "
                    f"change the division of {owner[1].name} by jax.sharding.reshard"
                )
    return found
