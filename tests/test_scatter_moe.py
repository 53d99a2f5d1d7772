"""Test every implementation of the experts' grouped GEMMs against a NumPy loop over the experts in float64."""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EXPERT_IMPLEMENTATIONS, EXPERTS, Experts
from conftest import FORWARD, GRADIENT, assert_close
from jax import lax
from jax.extend.core import jaxprs_in_params

from pallas_kernels import expert_linear, expert_mlp, route
from pallas_kernels.scatter_moe import call, xla
from pallas_kernels.scatter_moe import routing as routing_module
from pallas_kernels.testing import differences

QUICK = {"xla_backend_optimization_level": 0}
every_implementation = pytest.mark.parametrize("implementation", EXPERT_IMPLEMENTATIONS)


# `make test` runs the cases that differ in kind. Cases of one size share a compiled program.
HARD = "plain", "all-idle", "odd", "one-token", "no-tokens", "many-experts", "skewed", "one-takes-all", "some-idle"
ORDERS = {
    "xla some-idle": ("token-token", "token-sorted", "sorted-token", "pair-pair", "sorted-sorted"),
    "xla few-rows": ("token-token", "pair-sorted"),
    "reference some-idle": ("token-sorted", "sorted-token", "pair-pair"),
}
EXHAUSTIVE = {
    "test_mlp_is_the_loop_over_experts": lambda implementation, name: (
        name not in (HARD if implementation == "xla" else ("odd", "no-tokens", "skewed", "some-idle"))
    ),
    # The other activations are parts of these, or are in another test of this file.
    "test_every_activation": lambda activation: activation not in ("geglu", "reglu", "gelu"),
    "test_half_precision": lambda implementation, dtype: (implementation == "xla") != (dtype == "bfloat16"),
    "test_many_rows_are_taken_in_pieces": lambda E: E == 2,
    "test_linear_in_every_order": lambda rows_in, rows_out, name, implementation: (
        f"{rows_in}-{rows_out}" not in ORDERS[f"{implementation} {name}"]
    ),
    "test_rows_that_no_expert_reads_may_hold_anything": lambda T, implementation: T == 120 and implementation != "xla",
    "test_routing_is_a_stable_sort": lambda name, wide: name not in (("skewed", "no-tokens") if wide else HARD),
    "test_transformations": lambda implementation, T: (implementation == "xla") == (T == 5),
}


_erf = np.vectorize(math.erf, otypes=[float])


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


POINTWISE = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
GATED = {"swiglu": "silu", "geglu": "gelu_tanh", "reglu": "relu"}
ACTIVATIONS = (*POINTWISE, *GATED)


def _activate(name, h):
    """Return act(h) for the activation `name`, and a function from the cotangent of act(h) to the cotangent of h.

    `h` is [rows, columns]. A gated activation takes the gate and the value from the two halves of the columns.
    """
    f = POINTWISE[GATED.get(name, name)]

    def slope(x):
        return (f(x + 1e-5) - f(x - 1e-5)) / 2e-5

    if name not in GATED:
        return f(h), lambda d: d * slope(h)
    gate, up = np.split(h, 2, axis=1)
    return f(gate) * up, lambda d: np.concatenate([d * up * slope(gate), d * f(gate)], 1)


def loop_linear(x, weight, bias, indices, dy):
    """Return y, dx, d_weight and d_bias of a linear map per expert, for the cotangent `dy` of y.

    Row r uses the expert e = indices[r]: y[r] = x[r] @ weight[e] + bias[e]. A row whose index is no expert gives zeros.
    """
    y, dx, d_weight, d_bias = (np.zeros(s) for s in (dy.shape, x.shape, weight.shape, bias.shape))
    for e in range(len(weight)):
        rows = indices == e
        y[rows] = x[rows] @ weight[e] + bias[e]
        dx[rows] = dy[rows] @ weight[e].T
        d_weight[e], d_bias[e] = x[rows].T @ dy[rows], dy[rows].sum(0)
    return y, dx, d_weight, d_bias


def loop_mlp(x, w_in, w_out, gates, b_in, b_out, indices, activation, d_out):
    """Return the output of the expert networks, and for the cotangent `d_out` the gradients of the first six arguments.

    The gradients come in the order x, w_in, w_out, gates, b_in, b_out. `indices` [T, k] are the experts of each token.
    """
    T, k = indices.shape
    flat, slots = indices.reshape(-1), np.repeat(x, k, 0)
    h, *_ = loop_linear(slots, w_in, b_in, flat, np.zeros((T * k, w_in.shape[2])))
    a, back = _activate(activation, h)
    dy = (gates[..., None] * d_out[:, None]).reshape(T * k, d_out.shape[1])
    y, da, d_w_out, d_b_out = loop_linear(a, w_out, b_out, flat, dy)
    _, dx, d_w_in, d_b_in = loop_linear(slots, w_in, b_in, flat, back(da))
    y = y.reshape(T, k, y.shape[1])
    out = (gates[..., None] * y).sum(1)
    d_gates = (y * d_out[:, None]).sum(-1)
    return out, dx.reshape(T, k, dx.shape[1]).sum(1), d_w_in, d_w_out, d_gates, d_b_in, d_b_out


MLP_NAMES = "out", "x", "w_in", "w_out", "gates", "b_in", "b_out"


@lru_cache
def mlp_inputs(case: Experts, activation: str, dtype="float32", positive=False):
    """Return random x, w_in, w_out, gates, b_in, b_out and a cotangent of the output, of type `dtype`.

    `case` gives the sizes. If `positive`, all numbers are positive.
    """
    rng = np.random.default_rng(0)
    width = case.F * (2 if activation in GATED else 1)
    shapes = {
        "x": (case.T, case.D), "w_in": (case.E, case.D, width), "w_out": (case.E, case.F, case.D),
        "gates": (case.T, case.k), "b_in": (case.E, width), "b_out": (case.E, case.D), "d_out": (case.T, case.D),
    }  # fmt: skip
    arrays = (0.7 * rng.standard_normal(s) for s in shapes.values())
    return tuple(jnp.asarray(abs(x) if positive else x, dtype) for x in arrays)


@partial(jax.jit, static_argnames=("E", "activation", "implementation"), compiler_options=QUICK)
def run_mlp(inputs, indices, d_out, E, activation, implementation):
    def function(x, w_in, w_out, gates, b_in, b_out):
        options = {"b_in": b_in, "b_out": b_out, "activation": activation, "implementation": implementation}
        return expert_mlp(x, w_in, w_out, route(indices, E), gates, **options)

    out, vjp = jax.vjp(function, *inputs)
    return out, *vjp(d_out)


def check_mlp(case, implementation, activation="swiglu", dtype="float32", indices=None, positive=False):
    *inputs, d_out = mlp_inputs(case, activation, dtype, positive)
    indices = case.indices() if indices is None else indices
    values = run_mlp(inputs, indices, d_out, case.E, activation, implementation)
    wide = [np.asarray(x, np.float64) for x in inputs]
    wanted = loop_mlp(*wide, indices, activation, np.asarray(d_out, np.float64))
    for name, value, want in zip(MLP_NAMES, values, wanted, strict=True):
        assert value.dtype == dtype
        assert_close(value, want, (FORWARD if name == "out" else GRADIENT)[dtype], name)
    idle = (indices == case.E).all(1)
    assert (np.asarray(values[0])[idle] == 0).all() and (np.asarray(values[1])[idle] == 0).all()


@every_implementation
@pytest.mark.parametrize("name", EXPERTS)
def test_mlp_is_the_loop_over_experts(name, implementation):
    check_mlp(EXPERTS[name], implementation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    check_mlp(EXPERTS["odd"], "xla", activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_activations(activation, x64):
    rng = np.random.default_rng(0)
    d, *halves = jnp.asarray(3 * rng.standard_normal((3 if activation in GATED else 2, 200)))

    @jax.jit
    def both(d, *halves):
        _, vjp = jax.vjp(partial(call.activate, activation), *halves)
        return tuple(call.d_activate(activation, d, *halves)), vjp(d)

    for got, want in zip(*both(d, *halves), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@every_implementation
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, implementation):
    check_mlp(EXPERTS["skewed"], implementation, "gelu", dtype)


def test_sums_over_many_blocks_are_not_rounded_to_half_precision():
    """For bfloat16 inputs, the gradient of a weight is summed in float32 over all blocks of rows.

    One expert has the rows of 400 blocks. A sum in bfloat16 would have an error of 5e-2.
    """
    case = Experts(T=6400, k=2, E=400, D=4, F=4)
    check_mlp(case, "xla", "relu2", "bfloat16", np.zeros((6400, 2), np.int32), positive=True)


@every_implementation
def test_double_precision(implementation, x64):
    check_mlp(EXPERTS["some-idle"], implementation, "silu", "float64")


@pytest.mark.parametrize("E", [2, 3])
def test_many_rows_are_taken_in_pieces(E):
    """The XLA implementation is correct if it cuts the first C rows of each expert into several pieces.

    The first C rows of every expert are computed together, as batched products. Expert 0 has more than C rows, so its
    remaining rows are computed in blocks. A quarter of the tokens have no expert.
    """
    case = Experts(T=1300 * E, k=1, E=E, D=4, F=4)
    T = np.arange(case.T)[:, None]
    assert xla.plan(case.rows, E).pieces > 1
    check_mlp(case, "xla", indices=np.where(T < case.T // 4, E, np.where(T % 5, 0, T % E)).astype(np.int32))


def test_only_pieces_with_rows_run():
    counts = np.array([0, 70, 201, 0, 400, 0, 0])  # two of six experts run together, or one of seven
    for E, trips in ((6, [1, 1, 3, 3, 4, 4]), (7, [0, 1, 3, 0, 4, 0, 0])):
        run = lambda w, p, end: ((p[:, None],), jnp.ones(()))  # noqa: E731
        ends = jnp.cumsum(jnp.asarray(counts[:E]))
        (rows,), sums = xla._together(run, jnp.zeros(E), ends - counts[:E], ends, 800, 8)
        assert sums.tolist() == trips and rows.shape == (E, 800, 1)
        assert (rows[2, :201, 0] == 70 + jnp.arange(201)).all()


def test_the_cases_reach_both_parts_of_the_algorithm():
    """Some test cases use only the first part of the XLA implementation, some only the second part, and some both.

    The first part computes the first C rows of every expert together, as batched products. The second part is a loop
    over blocks of the remaining rows.
    """
    reached = set()
    for case in EXPERTS.values():
        if case.T:
            C = xla.plan(case.rows, case.E).together
            counts = np.bincount(case.indices().reshape(-1), minlength=case.E + 1)[: case.E]
            reached.add((C > 0, bool((counts > C).any())))
    assert {(True, False), (False, True), (True, True)} <= reached


def _sorted(indices):
    return np.argsort(indices.reshape(-1), kind="stable")


def check_linear(case: Experts, rows_in: str, rows_out: str, implementation: str, dtype="float32") -> None:
    rng = np.random.default_rng(0)
    T, k, E, D, F = case.T, case.k, case.E, case.D, case.F
    indices = case.indices()
    order = _sorted(indices)
    gated = rows_out == "token"
    shapes = (T if rows_in == "token" else T * k, D), (E, D, F), (E, F), (T, k), (T if gated else T * k, F)
    arrays = [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]
    x, weight, bias, gates, dy = (np.asarray(a, np.float64) for a in arrays)

    slots = np.repeat(x, k, 0) if rows_in == "token" else x
    if rows_in == "sorted":
        slots = np.empty_like(x)
        slots[order] = x
    d_slots = np.repeat(dy, k, 0) * gates.reshape(-1, 1) if gated else dy
    if rows_out == "sorted":
        d_slots = np.empty_like(dy)
        d_slots[order] = dy
    y, dx, d_weight, d_bias = loop_linear(slots, weight, bias, indices.reshape(-1), d_slots)
    y_slots = y.reshape(T, k, F)
    d_gates = (y_slots * dy[:, None]).sum(-1) if gated else np.zeros((T, k))
    y = (gates[..., None] * y_slots).sum(1) if gated else y[order] if rows_out == "sorted" else y
    dx = dx.reshape(T, k, D).sum(1) if rows_in == "token" else dx[order] if rows_in == "sorted" else dx

    @partial(jax.jit, compiler_options=QUICK)
    def run(x, weight, bias, gates, dy):
        def function(x, weight, bias, gates):
            return expert_linear(
                x, weight, route(indices, E), grouped_in=rows_in == "sorted", grouped_out=rows_out == "sorted",
                gates=gates if gated else None, bias=bias, implementation=implementation,
            )  # fmt: skip

        out, vjp = jax.vjp(function, x, weight, bias, gates)
        return out, *vjp(dy)

    values = run(*arrays)
    wanted = y, dx, d_weight, d_bias, d_gates
    for name, value, want in zip(("out", "x", "weight", "bias", "gates"), values, wanted, strict=True):
        assert_close(value, want, GRADIENT[dtype], name)
    if not gated:
        idle = indices.reshape(-1)[order] if rows_out == "sorted" else indices.reshape(-1)
        assert (np.asarray(values[0])[idle == E] == 0).all()


@pytest.mark.parametrize(
    "name, implementation", [("some-idle", "xla"), ("few-rows", "xla"), ("some-idle", "reference")]
)
@pytest.mark.parametrize("rows_in", ["token", "pair", "sorted"])
@pytest.mark.parametrize("rows_out", ["token", "pair", "sorted"])
def test_linear_in_every_order(rows_in, rows_out, name, implementation):
    check_linear(EXPERTS[name], rows_in, rows_out, implementation)


@every_implementation
def test_grouped_up_then_grouped_down_is_the_mlp(implementation):
    case = EXPERTS["skewed"]
    x, w_in, w_out, gates, *_ = mlp_inputs(case, "relu")
    routing = route(case.indices(), case.E)

    @partial(jax.jit, compiler_options=QUICK)
    def both(x, w_in, w_out, routing, gates):
        hidden = expert_linear(x, w_in, routing, grouped_out=True, implementation=implementation)
        out = expert_linear(
            jax.nn.relu(hidden), w_out, routing, grouped_in=True, gates=gates, implementation=implementation
        )
        return out, expert_mlp(x, w_in, w_out, routing, gates, activation="relu", implementation=implementation)

    assert_close(*both(x, w_in, w_out, routing, gates), FORWARD["float32"])


@every_implementation
@pytest.mark.parametrize("T", [6, 120])
def test_rows_that_no_expert_reads_may_hold_anything(T, implementation):
    case = Experts(T=T, E=3)
    *inputs, d_out = mlp_inputs(case, "swiglu")
    indices = case.indices()
    indices[1::3] = case.E
    poisoned = [inputs[0].at[1::3].set(jnp.nan).at[1].set(jnp.inf), *inputs[1:]]
    values = run_mlp(poisoned, indices, d_out, case.E, "swiglu", implementation)
    clean = run_mlp(inputs, indices, d_out, case.E, "swiglu", implementation)
    for name, value, want in zip(MLP_NAMES, values, clean, strict=True):
        assert_close(value, want, FORWARD["float32"], name)
    assert (np.asarray(values[0])[1::3] == 0).all()


# Routing.


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", EXPERTS)
def test_routing_is_a_stable_sort(name, wide, monkeypatch):
    if wide:  # as if E * T * k were above 2^31
        monkeypatch.setattr(routing_module, "_PACKED_BELOW", 0)
    case = EXPERTS[name]
    indices = case.indices()
    r = route(jnp.asarray(indices), case.E)
    order = _sorted(indices)
    counts = np.bincount(indices.reshape(-1), minlength=case.E + 1)[: case.E]
    np.testing.assert_array_equal(r.order, order)
    np.testing.assert_array_equal(r.inverse, np.argsort(order))
    np.testing.assert_array_equal(r.counts, counts)
    np.testing.assert_array_equal(r.offsets, [0, *np.cumsum(counts)])
    assert r.num_experts == case.E and {a.dtype for a in r[:3]} == {np.dtype("int32")}


def test_routing_of_many_rows_does_not_pack():
    """`route` sorts the (token, choice) pairs as int32 numbers; with too many pairs, it uses argsort instead.

    Each int32 number packs the expert and the index of a pair, so (E + 1) * T * k must be below 2^31.
    """

    def packs(T, E):
        indices = jax.ShapeDtypeStruct((T, 8), jnp.int32)
        return "argsort" not in str(jax.make_jaxpr(lambda i: route(i, E))(indices))

    assert packs(2**16, 128) and not packs(2**21, 128)


# Transformations, determinism, memory.

TRANSFORMATIONS = {
    "vmap": jax.vmap,
    "scan of a checkpoint": lambda f: lambda *xs: lax.map(lambda x: jax.checkpoint(f)(*x), xs),
}


@pytest.mark.parametrize("T", [5, 60])
@every_implementation
def test_transformations(implementation, T):
    """Values and gradients under vmap, and under scan with checkpoint, equal the results of separate calls.

    Each transformation maps over the leading axis of all arguments, including the expert indices.
    """
    cases = Experts(T=T, E=4, share=0.5), Experts(T=T, E=4, used=2)
    indices = jnp.stack([case.indices() for case in cases])
    inputs = [jnp.stack([x, 0.5 * x]) for x in mlp_inputs(cases[0], "swiglu")[:4]]

    def one(x, w_in, w_out, gates, indices):
        return expert_mlp(x, w_in, w_out, route(indices, 4), gates, implementation=implementation)

    def compiled(function):
        loss = lambda *inputs: jnp.sin(function(*inputs)).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)), compiler_options=QUICK)

    single = compiled(one)
    each = [single(*(x[i] for x in inputs), indices[i]) for i in range(2)]
    wanted = sum(value for value, _ in each), jax.tree.map(lambda *x: jnp.stack(x), *(gradient for _, gradient in each))
    for name, transform in TRANSFORMATIONS.items():
        values = compiled(transform(one))(*inputs, indices)
        for value, want in zip(jax.tree.leaves(values), jax.tree.leaves(wanted), strict=True):
            assert_close(value, want, GRADIENT["float32"], name)


@every_implementation
def test_two_runs_are_bitwise_equal(implementation):
    case = EXPERTS["skewed"]
    *inputs, d_out = mlp_inputs(case, "swiglu")
    first, second = (run_mlp(inputs, case.indices(), d_out, case.E, "swiglu", implementation) for _ in range(2))
    for name, a, b in zip(MLP_NAMES, first, second, strict=True):
        assert (np.asarray(a) == np.asarray(b)).all(), name


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def test_the_work_does_not_grow_with_the_number_of_experts():
    """No array in the forward and the backward pass has about T * E rows, so the work does not grow with E.

    The program must not contain ragged_dot, because XLA by default computes all experts for all rows of a ragged_dot.
    """
    T, E, k, D, F = 2048, 64, 2, 64, 64
    shapes = (T, D), (E, D, 2 * F), (E, F, D), (T, k)
    inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    indices = jax.ShapeDtypeStruct((T, k), jnp.int32)

    def loss(x, w_in, w_out, gates, indices):
        return expert_mlp(x, w_in, w_out, route(indices, E), gates).sum()

    equations = list(_equations(jax.make_jaxpr(jax.grad(loss, (0, 1, 2, 3)))(*inputs, indices).jaxpr))
    largest = max(math.prod(v.aval.shape) for equation in equations for v in equation.outvars)
    useful = T * k * max(D, 2 * F) + E * D * 2 * F
    assert largest <= 1.5 * useful < T * E * F / 4
    names = {equation.primitive.name for equation in equations}
    assert "dot_general" in names and not any("ragged" in name for name in names)


@every_implementation
def test_traced_indices_outside_of_the_experts_are_no_expert(implementation):
    """Traced expert indices outside of 0 to E-1 mean "no expert", as the index E does.

    These choices contribute nothing to the output or to the gradient of x, and the gradients of their gates are zero.
    """
    case = Experts(T=6, E=5)
    *inputs, d_out = mlp_inputs(case, "swiglu")
    clean = case.indices()
    clean[0], clean[2, 1], clean[4, 0] = case.E, case.E, case.E
    wild = clean.copy()
    wild[0], wild[2, 1], wild[4, 0] = (-1, case.E + 1), -(2**31), 2**31 - 1
    got, want = (run_mlp(inputs, indices, d_out, case.E, "swiglu", implementation) for indices in (wild, clean))
    for name, x, y in zip(MLP_NAMES, got, want, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)
    out, dx, d_gates = got[0], got[1], got[4]
    assert (out[0] == 0).all() and (dx[0] == 0).all()
    assert (d_gates[0] == 0).all() and d_gates[2, 1] == d_gates[4, 0] == 0


@pytest.mark.parametrize("D", [8, xla._WIDE])
def test_the_backward_pass_keeps_the_inputs_and_in_wide_models_the_pre_activation(D):
    """The XLA implementation saves the inputs and the routing for the backward pass.

    If D is large, it also saves the pre-activation, so that the backward pass need not compute it again.
    Under jax.checkpoint, the pre-activation is saved only if the checkpoint policy names `call.PRE_ACTIVATION`.
    """
    T, F, E, k = 6, 20, 4, 2
    routing = route(np.array([[0, 1], [1, 2], [3, 0], [0, 3], [2, 1], [1, 0]]), E)
    rng = np.random.default_rng(0)
    x, w_in, w_out, gates = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((T, D), (E, D, 2 * F), (E, F, D), (T, k))
    )

    def f(*arguments):
        return expert_mlp(*arguments[:3], routing, arguments[3], implementation="xla")

    def pre_activations(f):
        """Return how many pre-activations the function `f` saves for its backward pass. They are found by their shape.

        Also assert that every other saved array has the shape of an input or of the routing, or has one element.
        """
        inputs = {a.shape for a in (x, w_in, w_out, gates, gates.reshape(-1, 1), *jax.tree.leaves(routing))}
        kept = jax.eval_shape(lambda *arrays: jax.vjp(f, *arrays)[1], x, w_in, w_out, gates)
        shapes = [a.shape for a in jax.tree.leaves(kept)]
        other = [s for s in shapes if s not in inputs and np.prod(s) > 1]
        assert set(other) <= {(T * k, 2 * F)}, other
        return len(other)

    named = jax.checkpoint_policies.save_only_these_names(call.PRE_ACTIVATION)
    wide = int(D >= xla._WIDE)
    assert pre_activations(f) == pre_activations(jax.checkpoint(f, policy=named)) == wide
    assert pre_activations(jax.checkpoint(f)) == 0

    if wide:  # the other tests have small D
        found = differences(expert_mlp, x, w_in, w_out, routing, gates, implementation="xla")
        assert found.ok, found


@pytest.mark.parametrize("after", [False, True])
def test_positions_are_those_of_searchsorted(after):
    side = "right" if after else "left"
    for size in (0, 1, 2, 7, 8, 33):
        rows = np.sort(np.random.default_rng(size).integers(0, 9, size)).astype(np.int32)
        values = np.arange(-1, 11, dtype=np.int32)
        np.testing.assert_array_equal(
            routing_module.first_positions(jnp.asarray(rows), values, after=after), np.searchsorted(rows, values, side)
        )
