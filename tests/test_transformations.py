"""Every op works with the JAX transformations and meshes that docs/reference/transformations.md lists in its table."""

import contextlib
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FORWARD, GRADIENT, assert_close
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    dispatch,
    expert_linear,
    expert_mlp,
    explain,
    merge_stick_breaking,
    platform,
    route,
    stick_breaking_attention,
)

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
PAGE = Path(__file__).parent.parent / "docs" / "reference" / "transformations.md"
IMPLEMENTATIONS = "reference", "xla", "mosaic"
B, T, N, K, H, E, F, k = 2, 6, 4, 2, 32, 3, 8, 2


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def attention(implementation):
    def run(query, key, value, scale):
        out, rem = stick_breaking_attention(query, key, value, scale=scale, implementation=implementation)
        return out + rem[..., None]

    return run


def linear(implementation):
    def run(x, weight, bias, gates, indices):
        options = dict(gates=gates, bias=bias, implementation=implementation)
        return expert_linear(x, weight, route(indices, E), **options)

    return run


def mlp(implementation):
    def run(x, w_in, w_out, gates, indices):
        return expert_mlp(x, w_in, w_out, route(indices, E), gates, implementation=implementation)

    return run


def merge(_):
    return lambda *arrays: merge_stick_breaking(arrays[:2], arrays[2:])[0]


def routed(_):
    """Return a function (x, indices) that adds to each element of x the index of its expert.

    The function computes the index from the results of `route`. The argument of `routed`, the name of an
    implementation, is not used: `route` has only one implementation.
    """

    def run(x, indices):
        routing = route(indices, E)
        rows = jnp.arange(routing.order.size, dtype=jnp.int32)
        experts = jnp.searchsorted(routing.offsets, rows, side="right", method="compare_all") - 1
        return x + experts[routing.inverse].reshape(x.shape).astype(x.dtype)

    return run


INDICES = np.random.default_rng(0).integers(0, E + 1, (2 * T, k)).astype(np.int32)
QUERY, KEY, VALUE = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, 64)
TOKENS, GATES = normal(2 * T, H), normal(2 * T, k)
ATTENTION, ROWS = P("data", None, "model"), P("data")
# For each op: its function, its arrays, and how a mesh divides each array.
OPS = {
    "stick_breaking_attention": (attention, (QUERY, KEY, VALUE, np.float32(0.4)), (ATTENTION,) * 3 + (P(),)),
    "merge_stick_breaking": (
        merge, (QUERY, -abs(normal(B, T, N)), normal(B, T, N, H), normal(B, T, N)), (ATTENTION,) * 4
    ),
    "route": (routed, (GATES, INDICES), (ROWS, ROWS)),
    "expert_linear": (
        linear, (TOKENS, normal(E, H, F), normal(E, F), GATES, INDICES), (ROWS, P(), P(), ROWS, ROWS)
    ),
    "expert_mlp": (mlp, (TOKENS, normal(E, H, 2 * F), normal(E, F, H), GATES, INDICES), (ROWS, P(), P(), ROWS, ROWS)),
}  # fmt: skip
COMMUNICATION = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
SEGMENTS = np.zeros((B, T), np.int32)
HAVE_NO_IMPLEMENTATIONS = "merge_stick_breaking", "route"


def loss(f, floats, others):
    """Return (a weighted sum of f's output, the output).

    The weights differ, so that the cotangent differs at every element. `floats` are the arguments with gradients, and
    `others` the integer arguments.
    """
    out = f(*floats, *others)
    weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
    return (out * like(weights, out)).sum(), out


def value_and_gradients(f):
    """Return a function of f's arguments that returns f's output and the gradients of `loss`.

    The gradients are for the floating-point arguments, which come first.
    """

    def run(*arrays):
        floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
        function = functools.partial(loss, f, others=arrays[len(floats) :])
        (_, out), gradients = jax.value_and_grad(function, has_aux=True)(floats)
        return out, gradients

    return run


def like(x, y):
    """Return x with the sharding of y if y is on a mesh with Explicit axes, else x itself."""
    sharding = jax.typeof(y).sharding
    return jax.sharding.reshard(x, sharding) if AxisType.Explicit in (sharding.mesh.axis_types or ()) else x


def several(x):
    """Stack two different arrays with the shape of x. If x is a ShapeDtypeStruct, return the one of the stack."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
    return np.stack([x, x[::-1] if x.ndim else 2 * x])


def mesh(kind, arrays=()):
    """Return a 2 x 2 mesh with axes "data" and "model" of type `kind`, on the first four devices of this machine.

    If one of `arrays` is a ShapeDtypeStruct, the mesh is for Hopper GPUs instead, which this machine may not have. JAX
    can then trace a program, but not run it.
    """
    absent = any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays)
    make = functools.partial(AbstractMesh, abstract_device=platform.HOPPER) if absent else jax.make_mesh
    return make(
        (2, 2), ("data", "model"), axis_types=(kind,) * 2, **({} if absent else dict(devices=jax.devices()[:4]))
    )


def put(x, *spec, mesh):
    place = NamedSharding(mesh, P(*spec))
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.device_put(x, place)


# The transformations. Each returns, for an op, a function of its value and gradients, and the function's arguments.


def grad(f, arrays, specs):
    return value_and_gradients(f), arrays


def jvp(f, arrays, specs):
    def run(*arrays):
        floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
        function = functools.partial(loss, f, others=arrays[len(floats) :])
        _, change, out = jax.jvp(function, (floats,), (jax.tree.map(jnp.ones_like, floats),), has_aux=True)
        return out, change

    return run, arrays


def vmap(f, arrays, specs):
    run = jax.vmap(value_and_gradients(f))
    return lambda *xs: jax.tree.map(lambda x: x[0], run(*xs)), [several(x) for x in arrays]


def scan(f, arrays, specs):
    run = value_and_gradients(jax.checkpoint(f))

    def loop(*xs):
        results = jax.lax.scan(lambda c, x: (c, run(*x)), None, xs)[1]
        return jax.tree.map(lambda x: x[0], results)

    return loop, [several(x) for x in arrays]


def shard_map(f, arrays, specs, check_vma=True):
    where = mesh(AxisType.Auto, arrays)
    f = jax.shard_map(f, mesh=where, in_specs=specs, out_specs=specs[0], check_vma=check_vma)
    return value_and_gradients(f), arrays


def on_mesh(kind, f, arrays, specs):
    where = mesh(kind, arrays)
    return value_and_gradients(f), [put(x, *spec, mesh=where) for x, spec in zip(arrays, specs, strict=True)]


TRANSFORMATIONS = {
    "`jit`, `grad`": grad,
    "`jvp`": jvp,
    "`vmap`": vmap,
    "`scan`, `checkpoint`": scan,
    "`shard_map`": shard_map,
    "`shard_map`, `check_vma=False`": functools.partial(shard_map, check_vma=False),
    "Explicit mesh": functools.partial(on_mesh, AxisType.Explicit),
    "Auto mesh": functools.partial(on_mesh, AxisType.Auto),
}


@functools.cache
def expected(op):
    """Return the output and the gradients of the op's reference implementation on one device."""
    make, arrays, _ = OPS[op]
    return jax.jit(value_and_gradients(make("reference")))(*arrays)


ROWS_OF_TABLE = [
    *((op, name) for op in OPS if op not in HAVE_NO_IMPLEMENTATIONS for name in IMPLEMENTATIONS),
    *((op, "") for op in HAVE_NO_IMPLEMENTATIONS),
]


def is_exhaustive(op: str, implementation: str, transformation: str) -> bool:
    """Return whether only `make test-all` tests a cell of the table.

    expert_linear and expert_mlp have the same rules of vmap and of partitioning. The reference is plain JAX.
    """
    kept = {
        ("stick_breaking_attention", "reference"): ("`jvp`", "`scan`, `checkpoint`", "`shard_map`"),
        ("stick_breaking_attention", "mosaic"): ("`jvp`", "`vmap`", "`shard_map`", "Explicit mesh"),
        ("expert_linear", "reference"): ("`jvp`",),
        ("expert_linear", "xla"): ("`jvp`", "Explicit mesh"),
        ("expert_linear", "mosaic"): ("`jvp`",),
        ("expert_mlp", "reference"): ("`vmap`", "Auto mesh"),
        ("expert_mlp", "xla"): ("`jvp`", "`vmap`", "`scan`, `checkpoint`", "`shard_map`", "Explicit mesh", "Auto mesh"),
        ("expert_mlp", "mosaic"): ("`scan`, `checkpoint`", "Auto mesh"),
    }
    return transformation not in kept.get((op, implementation), TRANSFORMATIONS)


EXHAUSTIVE = {"test_ops_are_themselves_under_every_transformation": is_exhaustive}


def outcome(op: str, implementation: str, transformation: str) -> str:
    """Test an op with a transformation; return the cell that the page's table must have: "yes", "traced" or "no"."""
    make, arrays, specs = OPS[op]
    transform = functools.partial(TRANSFORMATIONS[transformation], make(implementation))
    try:
        if implementation == "mosaic":
            return traced(transform, arrays, specs)
        function, placed = transform(arrays, specs)
        compiled = jax.jit(function).lower(*placed).compile()
    except TypeError as error:
        assert "forward-mode" in str(error) and "\n" not in str(error)
        return "no"
    out, gradients = compiled(*placed)
    wanted, wanted_gradients = expected(op)
    assert_close(out, wanted, FORWARD["float32"])
    if transformation == "`jvp`":
        gradients, wanted_gradients = [gradients], [sum(x.sum() for x in wanted_gradients)]
    for i, (gradient, other) in enumerate(zip(gradients, wanted_gradients, strict=True)):
        assert_close(gradient, other, GRADIENT["float32"], f"gradient {i}")
    if transformation == "Auto mesh" and op not in HAVE_NO_IMPLEMENTATIONS:
        assert set(COMMUNICATION.findall(compiled.as_text())) <= {"all-reduce"}  # for the gradients of weights
    if transformation == "Explicit mesh":
        for x, like, spec in zip((out, *gradients), (out, *placed), (specs[0], *specs), strict=False):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh(AxisType.Explicit), spec), like.ndim), (x, spec)
    return "yes"


def traced(transform, arrays, specs) -> str:
    """Trace a transformed op with its kernels for a Hopper GPU, which this machine may not have. Return "traced".

    If the trace has a forward-mode derivative of a kernel, JAX cannot compile it: return "no".

    Args:
      transform: a function of (arrays, specs) that returns a function to trace and its arguments.
      arrays: the arguments of the op, of which only the shapes and types are used.
      specs: the partition of each array on a mesh.
    """
    types = {np.dtype(np.float32): jnp.bfloat16}
    absent = [jax.ShapeDtypeStruct(x.shape, types.get(x.dtype, x.dtype) if x.ndim else x.dtype) for x in arrays]
    function, placed = transform(absent, specs)
    is_on_mesh = any(x.sharding is not None for x in placed)
    with contextlib.nullcontext() if is_on_mesh else platform.absent_gpu():
        program = str(jax.jit(function).trace(*placed).jaxpr)
    assert "_flops_" in program  # the name of a kernel
    return "no" if "custom_lin" in program else "traced"  # a forward-mode derivative that lowering will refuse


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def written() -> tuple[str, str, str]:
    """Return the page in three parts: the text before the table, the table, and the text after it.

    The page is docs/reference/transformations.md.
    """
    before, rest = PAGE.read_text().split("<!-- table -->\n")
    between, after = rest.split("<!-- end of table -->")
    return before, between, after


@functools.cache
def cells() -> dict[tuple[str, str, str], str]:
    """Return the cells of the page's table as a dict by (op, implementation, transformation)."""
    head, _, *lines = [row[2:-2].split(" | ") for row in written()[1].splitlines()]
    return {
        (op.strip("`"), name, by): cell for op, name, *found in lines for by, cell in zip(head[2:], found, strict=True)
    }


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize(("op", "implementation"), ROWS_OF_TABLE)
def test_ops_are_themselves_under_every_transformation(op, implementation, transformation):
    assert outcome(op, implementation, transformation) == cells()[op, implementation, transformation]


def test_the_page_runs():
    """The Python code of the page runs, and its table has a cell for every tested combination."""
    assert list(cells()) == [(*row, name) for row in ROWS_OF_TABLE for name in TRANSFORMATIONS]
    exec(PAGE.read_text().split("```python\n")[1].split("```")[0], {})


@pytest.mark.parametrize(
    ("options", "gradients"),
    [
        (dict(tiles=(2, 2), skip_below=-20.0), False),  # runs a map over the heads
        (dict(tiles=(2, 2)), True),
    ],
    ids=str,
)
def test_nothing_is_sent_on_an_auto_mesh(options, gradients):
    """On a mesh with Auto axes, attention that is partitioned along batch and heads needs no collectives.

    The output is partitioned in the same way.
    """

    def attend(query, key, value, segments):
        return stick_breaking_attention(query, key, value, segment_ids=segments, return_stats=True, **options)

    def gradient(*arrays):
        return jax.grad(lambda *arrays: attend(*arrays)[0].sum(), (0, 1, 2))(*arrays)

    divide = functools.partial(put, mesh=mesh(AxisType.Auto))
    arrays = [divide(x, *ATTENTION) for x in (QUERY, KEY, VALUE)]
    compiled = jax.jit(gradient if gradients else attend).lower(*arrays, divide(SEGMENTS, "data")).compile()
    assert not COMMUNICATION.findall(compiled.as_text())
    assert jax.tree.leaves(compiled.output_shardings)[0].spec == ATTENTION


def explicit(*shape):
    """Return a mesh of the shape `shape` with axes "data" and "model" of type Explicit, JAX's default."""
    return jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: np.prod(shape)])


def refusals():
    """Return a dict from the beginning of an error message to a call that must raise this error.

    In each call, an array is partitioned along an axis that the op does not support, or two arrays do not fit together.
    """
    divide = functools.partial(put, mesh=explicit(2, 2))
    tokens, weight, slots, gates = normal(4, 8), normal(E, 8, 8), INDICES[:4], normal(4, k)
    attend = functools.partial(stick_breaking_attention, value=VALUE)
    mlp = functools.partial(expert_mlp, gates=gates, activation="relu")
    return {
        "query [B,T,N,H]=[2, 6, 4, 32] is sharded along T over the mesh axis 'model' of size 2, but "
        "stick_breaking_attention can be sharded only along B, N, K; pass jax.sharding.reshard(query, P('data', None, "
        "None, None)) instead":
            lambda: attend(divide(QUERY, "data", "model"), KEY),
        "key [B,S,K,H]=[2, 6, 2, 32] is sharded along H over the mesh axis 'data' of size 2":
            lambda: attend(QUERY, divide(KEY, None, None, None, "data")),
        "B of key [B,S,K,H]=[2, 6, 2, 32] is sharded over the mesh axis 'model' of size 2, but B of query [B,T,N,H]="
        "[2, 6, 4, 32] is sharded over the mesh axis 'data' of size 2":
            lambda: attend(divide(QUERY, "data"), divide(KEY, "model")),
        "both B of query [B,T,N,H]=[2, 6, 4, 32] and K of key [B,S,K,H]=[2, 6, 2, 32] are sharded over the mesh axis "
        "'data' of size 2, but only one of them may be sharded in this way":
            lambda: attend(divide(QUERY, "data"), divide(KEY, None, None, "data")),
        "K=2 of key [B,S,K,H]=[2, 6, 2, 32] must be sharded like N of query [B,T,N,H]=[2, 6, 4, 32], over the mesh "
        "axis 'data' of size 2 and the mesh axis 'model' of size 2, but 2 is not a multiple of the number of shards":
            lambda: attend(divide(QUERY, None, None, ("data", "model")), KEY),
        "x [T,D]=[4, 8] is sharded along D over the mesh axis 'data' of size 2, but expert_mlp can be sharded only "
        "along T;":
            lambda: mlp(divide(tokens, None, "data"), weight, weight, route(slots, E)),
        "x [R,D]=[8, 8] is sharded along R over the mesh axis 'data' of size 2, but expert_linear of sorted rows can "
        "be sharded only along F;":
            lambda: expert_linear(divide(normal(8, 8), "data"), weight, route(slots, E), grouped_in=True),
        "expert_indices [T,k]=[4, 2] is sharded along T over the mesh axis 'data' of size 2, but expert_linear of "
        "sorted rows can be sharded only along F;":
            lambda: expert_linear(tokens, weight, route(divide(slots, "data"), E), grouped_out=True),
        "this op does not support jax.vmap over an array axis that is sharded over the mesh axis 'model' of size 2;":
            lambda: jax.vmap(lambda x: attend(x, KEY))(divide(normal(2, B, T, N, H), "model", "data")),
    }  # fmt: skip


def test_what_is_no_map_is_refused_in_one_line():
    for message, call in refusals().items():
        with pytest.raises(ValueError) as error:
            jax.eval_shape(call)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_some_axes_manual_and_others_automatic():
    """An op works inside a shard_map over some mesh axes, while XLA partitions along the other axes, of type Auto."""
    _, arrays, specs = OPS["expert_mlp"]
    where = mesh(AxisType.Auto)
    some = jax.shard_map(mlp("xla"), mesh=where, in_specs=specs, out_specs=ROWS, axis_names={"data"})
    out = jax.jit(some)(*(jax.device_put(x, NamedSharding(where, spec)) for x, spec in zip(arrays, specs, strict=True)))
    assert_close(out, expected("expert_mlp")[0], FORWARD["float32"])


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_forward_mode_on_a_mesh_is_refused_in_one_line(kind):
    query = put(QUERY, "data", mesh=mesh(kind))
    attend = functools.partial(stick_breaking_attention, key=KEY, value=VALUE, implementation="xla")
    with pytest.raises(TypeError, match="^stick_breaking_attention .* no forward-mode derivative .*jax.jacrev"):
        jax.jvp(attend, (query,), (query,))


def test_what_divides_one_array_divides_the_others():
    """If one argument is partitioned along an axis and another is replicated, the result is partitioned.

    Partitioning a replicated array needs no communication.
    """
    divide = functools.partial(put, mesh=explicit(2, 2))
    out, rem = stick_breaking_attention(divide(QUERY, "data"), divide(KEY, None, None, "model"), VALUE)
    assert out.sharding.spec == P("data", None, "model", None) and rem.sharding.spec == P("data", None, "model")


def test_columns_of_a_linear_map_are_divided_too():
    """The weights of expert_linear can be partitioned along their columns, and the indices along the tokens.

    The counts of `route` then include the rows of all devices.
    """
    divide = functools.partial(put, mesh=explicit(2, 2))
    _, (x, weight, bias, gates, indices), _ = OPS["expert_linear"]

    @jax.jit
    def run(weight, indices):
        routing = route(indices, E)
        return expert_linear(x, weight, routing, bias=bias, gates=gates), routing.counts

    out, counts = run(divide(weight, None, None, "model"), divide(indices, "data"))
    assert out.sharding.spec == P("data", "model")
    assert_close(out, expected("expert_linear")[0], FORWARD["float32"])
    assert counts.tolist() == np.bincount(indices.ravel(), minlength=E)[:E].tolist()


def test_explain_speaks_of_the_part_of_a_device():
    query = put(normal(2, 65, 4, 4), None, None, "model", mesh=explicit(1, 4))
    words = explain("stick_breaking_attention", query, query, query, implementation="xla")
    assert words == "stick_breaking_attention: xla (2 query tiles of 64 rows, each against all its keys), asked for"
    tokens, weight = np.ones((256, 4), np.float32), np.ones((1, 4, 4), np.float32)
    arguments = weight, weight, jax.eval_shape(lambda: route(np.zeros((256, 1), int), 1)), tokens[:, :1]
    for x, rows in ((put(tokens, "data", mesh=explicit(4, 1)), 64), (tokens, 256)):
        words = explain("expert_mlp", x, *arguments, activation="relu")
        assert f"xla ({rows} rows of every expert together" in words


def test_a_call_on_a_mesh_is_traced_once(monkeypatch):
    query = put(QUERY, "data", mesh=explicit(2, 1))
    stick_breaking_attention(query, KEY, VALUE)
    monkeypatch.setattr(dispatch, "choose", None)  # would fail if the op were traced again
    stick_breaking_attention(query, KEY, VALUE)


if __name__ == "__main__":
    before, _, after = written()
    table = [line("", "", *TRANSFORMATIONS), "|---" * (len(TRANSFORMATIONS) + 2) + "|"]
    for op, implementation in ROWS_OF_TABLE:
        found = (outcome(op, implementation, name) for name in TRANSFORMATIONS)
        table.append(line(f"`{op}`", implementation, *found))
    PAGE.write_text(f"{before}<!-- table -->\n{chr(10).join(table)}\n<!-- end of table -->{after}")
