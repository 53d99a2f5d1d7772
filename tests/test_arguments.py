"""A wrong argument of an op raises a ValueError that names the argument and says what is allowed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    expert_linear,
    expert_mlp,
    merge_stick_breaking,
    route,
    stick_breaking_attention,
    stick_breaking_weights,
)

# Stick-breaking attention.


def _bad(**changes):
    shapes = {"query": (2, 8, 4, 16), "key": (2, 8, 2, 16), "value": (2, 8, 2, 16)}
    arrays = {name: jnp.zeros(changes.pop(name, shape)) for name, shape in shapes.items()}
    return arrays | changes


IDS = jnp.zeros((2, 8), jnp.int32)
BAD = {
    "heads": (_bad(query=(2, 8, 3, 16)), r"N=3 query heads .* K=2 key heads \(query.shape=\(2, 8, 3, 16\)\)"),
    "no key heads": (_bad(key=(2, 8, 0, 16), value=(2, 8, 0, 16)), "multiple of K=0"),
    "query rank": (_bad(query=(8, 4, 16)), r"query must be \[B,T,N,H\], got query.shape=\(8, 4, 16\)"),
    "key rank": (_bad(key=(8, 2, 16)), r"key must be \[B,S,K,H\]"),
    "value rank": (_bad(value=(2, 8, 2, 16, 1)), r"value must be \[B,S,K,Hv\]"),
    "batch": (_bad(key=(3, 8, 2, 16), value=(3, 8, 2, 16)), "B=2 and H=16 of query"),
    "head size": (_bad(key=(2, 8, 2, 8)), "B=2 and H=16 of query"),
    "value length": (_bad(value=(2, 9, 2, 16)), "B=2, S=8, K=2 of key"),
    "integers": (_bad() | {"query": jnp.zeros((2, 8, 4, 16), int)}, "query must be floating point, got .*int32"),
    "types": (_bad() | {"key": jnp.zeros((2, 8, 2, 16), jnp.bfloat16)}, "one dtype, got float32, bfloat16, float32"),
    "segments": (_bad(segment_ids=IDS[:, :7]), r"segment_ids must be integers \[B,T\]=\[2, 8\], got int32\[2, 7\]"),
    "float segments": (_bad(segment_ids=jnp.zeros((2, 8))), "segment_ids must be integers"),
    "key segments": (_bad(segment_ids=IDS, key_segment_ids=IDS[:1]), r"key_segment_ids .* \[B,S\]=\[2, 8\]"),
    "key segments alone": (_bad(key_segment_ids=IDS), "key_segment_ids .* is given without segment_ids"),
    "one of two": (_bad(query=(2, 5, 4, 16), segment_ids=IDS[:, :5]), "segment_ids alone needs T = S, got T=5 and S=8"),
    "window": (_bad(window=-1), "window=-1 must be at least 0"),
    "skip_below": (_bad(skip_below=0.0), "skip_below=0.0 must be a negative number"),
    "skip_below nan": (_bad(skip_below=math.nan), "must be a negative number"),
    "tiles": (_bad(tiles=(0, 16)), r"tiles\[0\]=0 must be at least 1"),
    "three tiles": (_bad(tiles=(8, 8, 8)), "must be two positive integers"),
    "offset": (_bad(query_offset=jnp.zeros(3, int)), r"query_offset .* of shape \[\] or \[B\]=\[2\], got int32\[3\]"),
    "float offset": (_bad(query_offset=1.5), r"query_offset must be an int or an array .* \[B\]=\[2\], got 1.5"),
    "list offset": (_bad(query_offset=[1, 2]), r"query_offset must be an int or an array .* \[B\]=\[2\], got \[1, 2\]"),
    "no channels": (_bad(query=(2, 8, 4, 0), key=(2, 8, 2, 0)), r"H=0 of query.shape=\(2, 8, 4, 0\) must be"),
    "a list": (_bad() | {"key": [1.0]}, r"key must be an array \[B,S,K,H\], got list"),
    "nothing": (_bad() | {"value": None}, r"value must be an array \[B,S,K,Hv\], got None"),
    "float8": (_bad() | {"query": jnp.zeros((2, 8, 4, 16), jnp.float8_e5m2)}, "query must be float16, .*float8_e5m2"),
    "list of segments": (_bad(segment_ids=[[0]]), r"segment_ids must be integers \[B,T\], got list"),
    "float window": (_bad(window=1.5), "window must be an int, got float"),
    "word for a number": (_bad(skip_below="-24"), "skip_below=-24 must be a negative number"),
    "a tile": (_bad(tiles=16), "tiles=16 must be two positive integers"),
    "float tiles": (_bad(tiles=(16.0, 8)), r"tiles\[0\] must be an int, got float"),
    "attend_current": (_bad(attend_current=jnp.ones((), bool)), r"attend_current must be True or False, got bool\[\]"),
    "word for a scale": (_bad(scale="big"), r"scale must be a real number or a real array without axes, got str"),
    "implementations": (_bad(implementation=[None]), r"implementation=\[None\] must be the name of an"),
    "scale": (_bad(scale=jnp.ones(4)), r"scale must be a number or an array without axes, got scale.shape=\(4,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_of_attention_name_letters_and_sizes(name):
    kwargs, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        stick_breaking_attention(**kwargs)


def test_merge_refuses_what_does_not_fit():
    out, log_rem = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3))
    for part in (out, (out, log_rem, log_rem), (out, 0.0)):
        with pytest.raises(ValueError, match=r"far must be a pair of arrays, \(out \[..., Hv\], log_rem \[...\]\)"):
            merge_stick_breaking((out, log_rem), part)
    with pytest.raises(ValueError, match=r"far must be .* got out.shape=\(2, 3, 4\) and log_rem.shape=\(2, 1\)"):
        merge_stick_breaking((out, log_rem), (out, log_rem[:, :1]))
    with pytest.raises(ValueError, match=r"got out.shape=\(2, 3, 4\) in near and out.shape=\(2, 1, 4\) in far"):
        merge_stick_breaking((out, log_rem), (out[:, :1], log_rem[:, :1]))


def test_weights_that_take_much_memory_are_refused():
    x = jax.ShapeDtypeStruct((4, 16384, 12, 64), jnp.bfloat16)
    message = "the weights of B=4, N=12, T=16384, S=16384 take 48.0 GiB, more than the limit of 1 GiB; pass fewer heads"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(stick_breaking_weights, x, x)


# Experts.

R = route(jnp.zeros((6, 2), jnp.int32), 3)
X, W, W_IN, W_OUT, G = (jnp.zeros(s) for s in ((6, 4), (3, 4, 5), (3, 4, 10), (3, 5, 4), (6, 2)))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: jax.eval_shape(lambda i: route(i, 9), jax.ShapeDtypeStruct((2**29, 4), jnp.int32)),
            "T=536870912 tokens with k=4 choices make T \\* k rows, which must be below 2",
        ),
        (lambda: route(np.array([[0, 1], [4, 1]]), 3), r"expert_indices\[1,0\]=4 must be from 0 to E=3"),
        (lambda: route(np.array([[0, -1]]), 3), r"expert_indices\[0,1\]=-1 must be from 0 to E=3"),
        (lambda: route(jnp.zeros(6, int), 3), r"expert_indices must be integers \[T,k\], got int32\[6\]"),
        (lambda: route(jnp.zeros((6, 2)), 3), r"expert_indices must be integers \[T,k\], got float32\[6, 2\]"),
        (lambda: route(jnp.zeros((6, 2), int), 0), "num_experts=0 must be at least 1"),
        (lambda: route(jnp.zeros((6, 0), int), 3), "k=0 experts per token must be at least 1"),
        (lambda: expert_linear(X[0], W, R), r"x must be \[R,D\], got x.shape=\(4,\)"),
        (lambda: expert_linear(X[:5], W, R), r"x must have T or T\*k rows with T=6, k=2, got x.shape=\(5, 4\)"),
        (lambda: expert_linear(X, W, R, grouped_in=True), r"x must have T\*k rows \(because grouped_in=True\)"),
        (lambda: expert_linear(X, W[:2], R), r"weight must be \[E,D,F\] with E=3, D=4, got weight.shape=\(2, 4, 5\)"),
        (lambda: expert_linear(X, W_OUT, R), r"weight must be \[E,D,F\] with E=3, D=4"),
        (lambda: expert_linear(X, W[0], R), r"weight must be \[E,D,F\]"),
        (lambda: expert_linear(X.astype(int), W, R), "x must be floating point, got x.dtype=int32"),
        (lambda: expert_linear(X, W.astype(jnp.bfloat16), R), "x, weight must have one dtype, got float32, bfloat16"),
        (lambda: expert_linear(X, W, R, gates=G, grouped_out=True), "with gates, .* grouped_out must be False"),
        (lambda: expert_linear(X, W, R, gates=G[:, :1]), r"gates must be \[T,k\]=\[6, 2\], got gates.shape=\(6, 1\)"),
        (
            lambda: expert_linear(X, W, R, bias=jnp.zeros((3, 4))),
            r"bias must be \[E,F\]=\[3, 5\], got bias.shape=\(3, 4\)",
        ),
        (lambda: expert_mlp(X[:5], W_IN, W_OUT, R, G), r"x must be \[T,D\] with T=6 as in routing.expert_indices"),
        (lambda: expert_mlp(X, W, W_OUT, R, G), r"w_in must be \[E,D,2F\]=\[3, 4, 10\], got w_in.shape=\(3, 4, 5\)"),
        (lambda: expert_mlp(X, W_IN, W_OUT, R, G, activation="relu"), r"w_in must be \[E,D,F\]=\[3, 4, 5\]"),
        (lambda: expert_mlp(X, W_IN, W, R, G), r"w_out must be \[E,F,D\] with E=3, D=4, got w_out.shape=\(3, 4, 5\)"),
        (lambda: expert_mlp(X, W_IN, W_OUT, R, G[:, 0]), r"gates must be \[T,k\], got gates.shape=\(6,\)"),
        (lambda: expert_mlp(X, W_IN, W_OUT, R, G.astype(int)), "gates must be floating point"),
        (lambda: expert_mlp(X, W_IN, W_OUT, R, G, b_in=jnp.zeros((3, 5))), r"b_in must be \[E,2F\]=\[3, 10\]"),
        (lambda: expert_mlp(X, W_IN, W_OUT, R, G, b_out=jnp.zeros((3, 5))), r"b_out must be \[E,D\]=\[3, 4\]"),
        (
            lambda: expert_mlp(X, W_IN, W_OUT, R, G, activation="swish"),
            "activation='swish' is not one of swiglu, geglu",
        ),
        (lambda: expert_mlp(X.astype(jnp.bfloat16), W_IN, W_OUT, R, G), "x, w_in, w_out must have one dtype"),
        (lambda: route([[0, 1]], 3), r"expert_indices must be integers \[T,k\], got list"),
        (lambda: route(jnp.zeros((6, 2), int), 3.0), "num_experts must be an int, got float"),
        (lambda: expert_linear(X.tolist(), W, R), r"x must be an array \[R,D\], got list"),
        (lambda: expert_linear(X, None, R), r"weight must be an array \[E,D,F\], got None"),
        (lambda: expert_linear(X, W, R.expert_indices), r"routing must be the result of route\(.*\), got ArrayImpl"),
        (lambda: expert_linear(X, W, R, grouped_in="yes"), "grouped_in must be True or False, got str"),
        (lambda: expert_linear(X.astype(jnp.float8_e5m2), W, R), "x must be float16, .* or float64, got .*float8_e5m2"),
        (lambda: expert_linear(X, W, R, bias=1.0), r"bias must be an array \[E,F\], got float"),
        (lambda: expert_mlp(X, W_IN, W_OUT, R, None), r"gates must be an array \[T,k\], got None"),
        (lambda: expert_mlp(X, W_IN, W_OUT, R, G.astype(jnp.float8_e4m3fn)), "gates must be .*, got .*float8_e4m3fn"),
        (lambda: expert_mlp(X, W_IN, W_OUT, R, G, activation=["relu"]), r"activation=\['relu'\] is not one of"),
        (lambda: expert_mlp(X, W_IN, W_OUT, R, G, implementation=3), "implementation=3 must be the name of an"),
    ],
)
def test_bad_calls_of_experts_name_letters_and_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_indices_are_found_in_a_program_under_checks():
    with jax.enable_checks(True), pytest.raises(Exception, match=r"expert_indices\[0,1\]=7 must be from 0 to E=3"):
        jax.block_until_ready(jax.jit(lambda i: route(i, 3))(jnp.array([[0, 7]])))
        jax.effects_barrier()


# NumPy arrays, and empty arrays.


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_arrays_of_numpy_are_taken(implementation):
    """The ops accept NumPy arrays of float64 and int64, also non-contiguous ones, and return float32."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 6, 2, 8))[..., ::2]
    options = dict(segment_ids=np.zeros((2, 6), int), query_offset=np.arange(4)[::2], window=np.int64(3))
    out, rem, stats = stick_breaking_attention(
        q, k, v, scale=np.float64(0.3), return_stats=True, implementation=implementation, **options
    )
    assert out.dtype == rem.dtype == jnp.float32
    for x in merge_stick_breaking((v, stats.log_rem), (v, np.asarray(stats.log_rem))):
        assert x.dtype == jnp.float32
    routing, (x, w) = route(np.zeros((6, 2), int), np.int64(3)), (np.asarray(a, float) for a in (X, W))
    assert expert_linear(x, w, routing, implementation=implementation).dtype == jnp.float32
    arrays = (np.asarray(a, float) for a in (X, W_IN, W_OUT))
    assert expert_mlp(*arrays, routing, np.asarray(G), implementation=implementation).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.int64])
def test_indices_of_any_integer_type(dtype):
    routing = route(np.asarray([[0, 1], [100, 99]], dtype), 300)
    assert routing.order.tolist() == [0, 1, 3, 2] and routing.expert_indices.tolist() == [[0, 1], [100, 99]]


@pytest.mark.parametrize("options", [dict(implementation="reference"), {}, dict(tiles=(4, 4)), dict(skip_below=-9.0)])
@pytest.mark.parametrize("B, N, Hv", [(0, 2, 3), (1, 0, 3), (1, 2, 0)])
def test_no_entries_no_heads_no_channels(B, N, Hv, options):
    arrays = (jnp.zeros(shape) for shape in ((B, 5, N, 4), (B, 5, 1, 4), (B, 5, 1, Hv)))

    def total(*arrays):
        out, rem = stick_breaking_attention(*arrays, segment_ids=jnp.zeros((B, 5), int), **options)
        return out.sum() + rem.sum(), (out, rem)

    gradients, (out, rem) = jax.eval_shape(jax.grad(total, (0, 1, 2), has_aux=True), *arrays)
    assert out.shape == (B, 5, N, Hv) and rem.shape == (B, 5, N)
    assert [g.shape for g in gradients] == [(B, 5, N, 4), (B, 5, 1, 4), (B, 5, 1, Hv)]


# Forward mode.


def _attention(implementation):
    return lambda x: stick_breaking_attention(x[None, :, None], *X2, implementation=implementation)[0]


def _mlp(implementation):
    return lambda x: expert_mlp(x, W_IN, W_OUT, R, G + 1, implementation=implementation)


X2 = jnp.ones((2, 1, 6, 1, 4))


@pytest.mark.parametrize("op, name", [(_attention, "stick_breaking_attention"), (_mlp, "expert_mlp")])
def test_forward_mode_is_that_of_the_reference_alone(op, name):
    x = jnp.linspace(0, 1, 24).reshape(6, 4)
    for forward in (jax.jacfwd, lambda f: lambda x: jax.jvp(f, (x,), (x,))):
        with pytest.raises(TypeError, match=f"^{name} with implementation xla has no forward.*='reference', which has"):
            forward(op("xla"))(x)
    tangent = jax.jit(lambda x: jax.jvp(op("reference"), (x,), (x,))[1])(x)
    gradient = jax.jit(jax.grad(lambda x: 2 * op("xla")(x).sum()))(x)
    np.testing.assert_allclose((tangent * 2).sum(), (gradient * x).sum(), rtol=1e-5)
