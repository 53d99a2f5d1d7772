"""The public functions `expert_linear` and `expert_mlp` for sparse experts, and the checks of their arguments.

Both functions compute grouped matrix products (grouped GEMMs): for every (token, choice) pair, they multiply a row by
the weight matrix of the pair's expert.
"""

from collections.abc import Sequence

from jaxtyping import Array, Float

from .. import arguments, dispatch
from . import mosaic, reference, triton, xla
from .call import ACTIVATIONS, GATED, LinearCall, MlpCall, linear_letters, mlp_letters
from .routing import Routing


def expert_linear(
    x: Float[Array, "R D"],
    weight: Float[Array, "E D F"],
    routing: Routing,
    *,
    grouped_in: bool = False,
    grouped_out: bool = False,
    gates: Float[Array, "T k"] | None = None,
    bias: Float[Array, "E F"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "Q F"]:
    r"""Multiply the row of every (token, choice) pair by the weight of the pair's expert: a grouped matrix product.

    Let e = routing.expert_indices[t,s] be the expert of choice s of token t. Then

      y[t,s] = x[t,s] @ weight[e] + bias[e],   and with gates   out[t] = sum_s gates[t,s] * y[t,s]   (in fp32).

    If e is E, the number of experts, then choice s of token t has no expert: y[t,s] is exactly zero, and no bias is
    added. The memory grows with T * k, not with T * E.

    Args:
      x: [T, D], where row t is the input of all k choices of token t, or [T*k, D], where row t * k + s is the input of
        choice s of token t. With `grouped_in`, x is [T*k, D] and its rows are sorted by expert: row i is the input of
        the (token, choice) pair with t * k + s = routing.order[i].
      weight: [E, D, F], one matrix for each expert.
      routing: a result of `route`, which has the expert of every (token, choice) pair.
      grouped_in: whether the rows of x are sorted by expert.
      grouped_out: whether to return the rows of y sorted by expert, in the order of `routing.order`. If it is False
        and there are no gates, row t * k + s of the result is y[t,s].
      gates: [T, k], the weights for the sum of the k outputs of a token. Without gates, the outputs are not summed.
      bias: [E, F], one vector for each expert.
      implementation: "mosaic", "triton", "xla", "reference", a sequence of these names in order of preference, or None
        for the best implementation that can run this call (see `explain`).

    Returns:
      y [T*k, F], or out [T, F] with gates, in the dtype of x.

    Raises:
      ValueError: the shape or the dtype of an array does not fit the other arguments; gates are given and `grouped_out`
        is True; `implementation` has an unknown name; on a mesh of Explicit axes, an array is sharded along an axis
        other than T and F, or along T although the rows of x or of the result are sorted by expert
        (docs/reference/transformations.md).
      NotImplementedError: none of the implementations named in `implementation` can run this call.
      TypeError: a forward-mode derivative (`jax.jvp`) is taken. Only the implementation "reference" supports `jax.jvp`.
        On a mesh of Auto axes, no implementation supports it.

    Source: "Scattered Mixture-of-Experts Implementation", arXiv 2403.08245 (ParallelLinear).

    >>> import jax.numpy as jnp
    >>> from pallas_kernels import route
    >>> x, w = jnp.ones((2, 3)), jnp.arange(2.0)[:, None, None] * jnp.ones((2, 3, 4))
    >>> expert_linear(x, w, route(jnp.array([[0, 1], [1, 2]]), 2))[:, 0].tolist()
    [0.0, 3.0, 3.0, 0.0]
    """
    call = _prepare_linear(x, weight, routing, grouped_in=grouped_in, grouped_out=grouped_out, gates=gates, bias=bias)
    return dispatch.run(_linear_op, call, implementation)


def expert_mlp(
    x: Float[Array, "T D"],
    w_in: Float[Array, "E D F2"],
    w_out: Float[Array, "E F D"],
    routing: Routing,
    gates: Float[Array, "T k"],
    *,
    b_in: Float[Array, "E F2"] | None = None,
    b_out: Float[Array, "E D"] | None = None,
    activation: str = "swiglu",
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "T D"]:
    r"""Apply to every token the feed-forward networks of its k experts, and sum their outputs, weighted by the gates.

    Let e = routing.expert_indices[t,s] be the expert of choice s of token t. Then

      out[t] = sum_s gates[t,s] * (act(x[t] @ w_in[e] + b_in[e]) @ w_out[e] + b_out[e]).

    Args:
      x: [T, D], one row for each token.
      w_in: [E, D, F], or [E, D, 2F] for the gated activations "swiglu", "geglu" and "reglu". There, the first F columns
        compute a, and the last F columns compute b; `activation` explains a and b.
      w_out: [E, F, D].
      routing: a result of `route`, which has the expert of every (token, choice) pair.
      gates: [T, k], the weights for the sum of the k outputs of a token.
      b_in: [E, F], or [E, 2F] for a gated activation.
      b_out: [E, D].
      activation: the name of act: "swiglu" (silu(a) * b), "geglu" (gelu_tanh(a) * b), "reglu" (relu(a) * b), "gelu"
        (exact), "gelu_tanh" (the tanh form of gelu), "relu", "relu2" (relu squared) or "silu".
      implementation: "mosaic", "triton", "xla", "reference", a sequence of these names in order of preference, or None
        for the best implementation that can run this call (see `explain`).

    Returns:
      out [T, D], in the dtype of x. The output of a token without experts (all its expert indices are E) is exactly 0.

    Raises:
      ValueError: the shape or the dtype of an array does not fit the other arguments; the activation is unknown;
        `implementation` has an unknown name; on a mesh of Explicit axes, an array is sharded along an axis other than T
        (docs/reference/transformations.md).
      NotImplementedError: none of the implementations named in `implementation` can run this call.
      TypeError: a forward-mode derivative (`jax.jvp`) is taken. Only the implementation "reference" supports `jax.jvp`.
        On a mesh of Auto axes, no implementation supports it.

    Source: "Scattered Mixture-of-Experts Implementation", arXiv 2403.08245.

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels import route
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> x, w_in, w_out = (jax.random.normal(k, s) for k, s in zip(keys, ((5, 8), (3, 8, 32), (3, 16, 8))))
    >>> expert_mlp(x, w_in, w_out, route(jnp.zeros((5, 2), int), 3), jnp.ones((5, 2))).shape
    (5, 8)
    """
    call = _prepare_mlp(x, w_in, w_out, routing, gates, b_in=b_in, b_out=b_out, activation=activation)
    return dispatch.run(_mlp_op, call, implementation)


def _check_one_dtype(**arrays):
    """Raise ValueError if the arrays do not all have the same dtype.

    Each array is passed as a keyword argument. Its keyword is its name in the message.
    """
    dtypes = [str(a.dtype) for a in arrays.values()]
    if len(set(dtypes)) > 1:
        raise ValueError(f"{', '.join(arrays)} must have one dtype, got {', '.join(dtypes)}")


def _floats(name, a, shape, letters):
    """Check that `a` is None, or a floating-point array of the shape `shape`. Return `a`.

    Raise ValueError if the dtype or the shape is wrong. For the message, `name` is the name of the argument, and
    `letters`, such as "T,k", are the letters of its axes.
    """
    if a is None:
        return None
    a = arguments.floats(name, a, letters)
    if a.shape != shape:
        raise ValueError(f"{name} must be [{letters}]={list(shape)}, got {name}.shape={a.shape}")
    return a


def _sizes(routing):
    """Return (T, k, E) of `routing`: the number of tokens, of choices per token, and of experts.

    Raise ValueError if `routing` is not a `Routing`, the result of `route`.
    """
    if not isinstance(routing, Routing):
        raise ValueError(f"routing must be the result of route(expert_indices, E), got {type(routing).__name__}")
    return *routing.expert_indices.shape, routing.num_experts


def _prepare_linear(x, weight, routing, *, grouped_in=False, grouped_out=False, gates=None, bias=None) -> LinearCall:
    """Check the arguments of `expert_linear`, and return them as a `LinearCall`, a named tuple."""
    (T, k, E), grouped_in = _sizes(routing), arguments.flag("grouped_in", grouped_in)
    grouped_out = arguments.flag("grouped_out", grouped_out)
    x = arguments.floats("x", x, "R,D")
    weight = arguments.floats("weight", weight, "E,D,F")
    _check_one_dtype(x=x, weight=weight)
    if weight.shape[0] != E or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must be [E,D,F] with E={E}, D={x.shape[1]}, got weight.shape={weight.shape}")
    allowed = (T * k,) if grouped_in else (T, T * k)
    if x.shape[0] not in allowed:
        names = "T*k rows (because grouped_in=True)" if grouped_in else "T or T*k rows"
        raise ValueError(f"x must have {names} with T={T}, k={k}, got x.shape={x.shape}")
    if gates is not None and grouped_out:
        raise ValueError("with gates, the k outputs of each token are summed, so grouped_out must be False, got True")
    gates, bias = _floats("gates", gates, (T, k), "T,k"), _floats("bias", bias, (E, weight.shape[2]), "E,F")
    x_rows = "sorted" if grouped_in else "token" if x.shape[0] == T else "pair"
    out_rows = "token" if gates is not None else "sorted" if grouped_out else "pair"
    return LinearCall(x, weight, bias, gates, routing, x_rows, out_rows)


def _prepare_mlp(x, w_in, w_out, routing, gates, *, b_in=None, b_out=None, activation="swiglu") -> MlpCall:
    """Check the arguments of `expert_mlp`, and return them as an `MlpCall`, a named tuple."""
    T, k, E = _sizes(routing)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    letters = "E,D,2F" if activation in GATED else "E,D,F"
    x, w_in = arguments.floats("x", x, "T,D"), arguments.floats("w_in", w_in, letters)
    w_out = arguments.floats("w_out", w_out, "E,F,D")
    _check_one_dtype(x=x, w_in=w_in, w_out=w_out)
    if x.shape[0] != T:
        raise ValueError(f"x must be [T,D] with T={T} as in routing.expert_indices, got x.shape={x.shape}")
    D = x.shape[1]
    if w_out.shape[0] != E or w_out.shape[2] != D:
        raise ValueError(f"w_out must be [E,F,D] with E={E}, D={D}, got w_out.shape={w_out.shape}")
    width = w_out.shape[1] * (2 if activation in GATED else 1)
    w_in = _floats("w_in", w_in, (E, D, width), letters)
    gates = _floats("gates", arguments.floats("gates", gates, "T,k"), (T, k), "T,k")
    b_in = _floats("b_in", b_in, (E, width), letters.replace("D,", ""))
    return MlpCall(x, w_in, w_out, b_in, _floats("b_out", b_out, (E, D), "E,D"), gates, routing, activation)


def _refuses_nothing(call) -> None:
    return None


def _register(name, prepare, letters, mosaic_run, triton_run, xla_run, reference_run):
    """Register `expert_linear` or `expert_mlp` in `dispatch`, which chooses an implementation for each call.

    Return the `dispatch.Op`. A call is a `LinearCall` or an `MlpCall`: the checked arguments of the public function.

    `name`: the name of the public function.
    `prepare`: takes the arguments of the public function, checks them, and returns them as a call.
    `letters`: takes a call, and returns a `partition.Letters`: the letters of the axes of every array, such as "T D"
      for x, and which of these axes may be sharded over a mesh.
    `mosaic_run`, `triton_run`, `xla_run`, `reference_run`: take a call, and return the result of the public function.
    """
    implementations = {
        "mosaic": dispatch.Implementation(mosaic_run, mosaic.refuses, mosaic.detail),
        "triton": dispatch.Implementation(triton_run, triton.refuses, triton.detail),
        "xla": dispatch.Implementation(xla_run, _refuses_nothing, xla.detail),
        "reference": dispatch.Implementation(reference_run, _refuses_nothing),
    }
    return dispatch.register(dispatch.Op(name, prepare, implementations, letters))


_linear_op = _register(
    "expert_linear", _prepare_linear, linear_letters, mosaic.linear, triton.linear, xla.linear, reference.linear
)
_mlp_op = _register("expert_mlp", _prepare_mlp, mlp_letters, mosaic.mlp, triton.mlp, xla.mlp, reference.mlp)
