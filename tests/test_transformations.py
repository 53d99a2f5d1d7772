"""Every op under every transformation of JAX and on every kind of mesh: the table of docs/transformations.md."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FORWARD, GRADIENT, assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    dispatch,
    expert_linear,
    expert_mlp,
    explain,
    merge_stick_breaking,
    route,
    stick_breaking_attention,
)

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
PAGE = Path(__file__).parent.parent / "docs" / "transformations.md"
IMPLEMENTATIONS = "reference", "xla"
B, T, N, K, H, E, F, k = 2, 6, 4, 2, 4, 3, 8, 2


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
    """The experts of the rows, from where `route` puts them."""

    def run(x, indices):
        routing = route(indices, E)
        rows = jnp.arange(routing.order.size, dtype=jnp.int32)
        experts = jnp.searchsorted(routing.offsets, rows, side="right", method="compare_all") - 1
        return x + experts[routing.inverse].reshape(x.shape).astype(x.dtype)

    return run


INDICES = np.random.default_rng(0).integers(0, E + 1, (2 * T, k)).astype(np.int32)
QUERY, KEY, VALUE = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, H + 1)
TOKENS, GATES = normal(2 * T, H), normal(2 * T, k)
ATTENTION, ROWS = P("data", None, "model"), P("data")
# Op, its arrays, and how a mesh divides each of them.
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
HAVE_NO_IMPLEMENTATIONS = "merge_stick_breaking", "route"


def value_and_gradients(f):
    """Of the arrays that have gradients, with a cotangent that is another at every place."""

    def loss(floats, others):
        out = f(*floats, *others)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return (out * like(weights, out)).sum(), out

    def run(*arrays):
        floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(floats, arrays[len(floats) :])
        return out, gradients

    return run


def like(x, y):
    """x divided as y is."""
    sharding = jax.typeof(y).sharding
    return jax.sharding.reshard(x, sharding) if AxisType.Explicit in (sharding.mesh.axis_types or ()) else x


def several(arrays):
    return [np.stack([x, x[::-1] if x.ndim else 2 * x]) for x in arrays]


def first(stacked):
    return jax.tree.map(lambda x: x[0], stacked)


def grad(f, arrays, specs):
    return jax.jit(value_and_gradients(f))(*arrays)


def vmap(f, arrays, specs):
    return first(jax.jit(jax.vmap(value_and_gradients(f)))(*several(arrays)))


def scan(f, arrays, specs):
    run = value_and_gradients(jax.checkpoint(f))
    return first(jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, run(*x)), None, xs)[1])(several(arrays)))


def mesh(kind):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:4])


def shard_map(f, arrays, specs, check_vma=True):
    out = specs[0] if specs[0] != P() else P()
    divided = jax.shard_map(f, mesh=mesh(AxisType.Auto), in_specs=specs, out_specs=out, check_vma=check_vma)
    return jax.jit(value_and_gradients(divided))(*arrays)


def on_mesh(kind, f, arrays, specs):
    where = mesh(kind)
    placed = [jax.device_put(x, NamedSharding(where, spec)) for x, spec in zip(arrays, specs, strict=True)]
    out, gradients = jax.jit(value_and_gradients(f))(*placed)
    for x, spec in zip((out, *gradients), (specs[0], *specs), strict=False) if kind is AxisType.Explicit else ():
        assert x.sharding.is_equivalent_to(NamedSharding(where, spec), x.ndim), (x.sharding, spec)
    return out, gradients


TRANSFORMATIONS = {
    "`jit`, `grad`": grad,
    "`vmap`": vmap,
    "`scan`, `checkpoint`": scan,
    "`shard_map`": shard_map,
    "`shard_map`, `check_vma=False`": functools.partial(shard_map, check_vma=False),
    "Explicit mesh": functools.partial(on_mesh, AxisType.Explicit),
    "Auto mesh": functools.partial(on_mesh, AxisType.Auto),
}


@functools.cache
def expected(op):
    """By the reference, of one device."""
    make, arrays, _ = OPS[op]
    return jax.jit(value_and_gradients(make("reference")))(*arrays)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize(
    ("op", "implementation"),
    [(op, name) for op in OPS for name in IMPLEMENTATIONS if op not in HAVE_NO_IMPLEMENTATIONS or name == "xla"],
)
def test_ops_are_themselves_under_every_transformation(op, implementation, name):
    make, arrays, specs = OPS[op]
    out, gradients = TRANSFORMATIONS[name](make(implementation), arrays, specs)
    wanted, wanted_gradients = expected(op)
    assert_close(out, wanted, FORWARD["float32"])
    for i, (gradient, other) in enumerate(zip(gradients, wanted_gradients, strict=True)):
        assert_close(gradient, other, GRADIENT["float32"], f"gradient {i}")


def explicit(*shape):
    """A mesh of Explicit axes, JAX's default, with the axes data and model."""
    return jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: np.prod(shape)])


def put(x, *spec, mesh):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def refusals():
    """Calls whose arrays are divided where the op is no map, and what is said."""
    divide = functools.partial(put, mesh=explicit(2, 2))
    tokens, weight, slots = jnp.ones((4, 8)), jnp.ones((E, 8, 8)), jnp.zeros((4, k), int)
    routing, gates = route(slots, E), jnp.ones((4, k))
    attend = functools.partial(stick_breaking_attention, value=VALUE)
    mlp = functools.partial(expert_mlp, gates=gates, activation="relu")
    return {
        "query [B,T,N,H]=[2, 6, 4, 4] is divided along T by 'model'=2, and stick_breaking_attention can be divided "
        "along B, N, K only; pass jax.sharding.reshard(query, P('data', None, None, None)) instead":
            lambda: attend(divide(QUERY, "data", "model"), KEY),
        "key [B,S,K,H]=[2, 6, 2, 4] is divided along H by 'data'=2":
            lambda: attend(QUERY, divide(KEY, None, None, None, "data")),
        "B of key [B,S,K,H]=[2, 6, 2, 4] is divided by 'model'=2, but B of query [B,T,N,H]=[2, 6, 4, 4] by 'data'=2":
            lambda: attend(divide(QUERY, "data"), divide(KEY, "model")),
        "'data'=2 divides both B of query": lambda: attend(divide(QUERY, "data"), divide(KEY, None, None, "data")),
        "K=2 of key [B,S,K,H]=[2, 6, 2, 4] is no multiple of 'data'=2 and 'model'=2, which divides N of query":
            lambda: attend(divide(QUERY, None, None, ("data", "model")), KEY),
        "x [T,D]=[4, 8] is divided along D by 'data'=2, and expert_mlp can be divided along T only":
            lambda: mlp(divide(tokens, None, "data"), weight, weight, routing),
        "x [R,D]=[8, 8] is divided along R by 'data'=2, and expert_linear of sorted rows can be divided along F only":
            lambda: expert_linear(divide(jnp.ones((8, 8)), "data"), weight, routing, grouped_in=True),
        "expert_indices [T,k]=[4, 2] is divided along T by 'data'=2, and expert_linear of sorted rows":
            lambda: expert_linear(tokens, weight, route(divide(slots, "data"), E), grouped_out=True),
    }  # fmt: skip


def test_what_is_no_map_is_refused_in_one_line():
    for message, call in refusals().items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_what_divides_one_array_divides_the_others():
    """Arrays that lie whole on every device are cut, which sends nothing."""
    divide = functools.partial(put, mesh=explicit(2, 2))
    out, rem = stick_breaking_attention(divide(QUERY, "data"), divide(KEY, None, None, "model"), VALUE)
    assert out.sharding.spec == P("data", None, "model", None) and rem.sharding.spec == P("data", None, "model")


def test_columns_of_a_linear_map_are_divided_too():
    divide = functools.partial(put, mesh=explicit(2, 2))
    _, (x, weight, bias, gates, indices), _ = OPS["expert_linear"]
    routing, whole = route(divide(indices, "data"), E), route(indices, E)
    out = expert_linear(x, divide(weight, None, None, "model"), routing, bias=bias, gates=gates)
    assert out.sharding.spec == P("data", "model")
    assert_close(out, expert_linear(x, weight, whole, bias=bias, gates=gates), FORWARD["float32"])
    np.testing.assert_array_equal(routing.counts, whole.counts)  # of all tokens


def test_explain_speaks_of_the_part_of_a_device():
    query = put(normal(2, 65, 4, 4), None, None, "model", mesh=explicit(1, 4))
    words = explain("stick_breaking_attention", query, query, query, implementation="xla")
    assert words == "stick_breaking_attention: xla (2 query tiles of 64 rows, each against all its keys), asked for"
    tokens = put(jnp.ones((256, 4)), "data", mesh=explicit(4, 1))
    routing, weight = route(jnp.zeros((256, 1), int), 1), jnp.ones((1, 4, 4))
    for x, rows in ((tokens, 64), (np.ones(tokens.shape, np.float32), 256)):
        words = explain("expert_mlp", x, weight, weight, routing, jnp.ones((256, 1)), activation="relu")
        assert f"xla ({rows} rows of every expert together" in words


def test_a_call_on_a_mesh_is_traced_once(monkeypatch):
    query = put(QUERY, "data", mesh=explicit(2, 1))
    stick_breaking_attention(query, KEY, VALUE)
    monkeypatch.setattr(dispatch, "choose", None)  # which tracing again would need
    stick_breaking_attention(query, KEY, VALUE)
