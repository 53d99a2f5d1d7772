"""Sparse experts in plain JAX: grouped matrix products, for any routing and on any device.

`_grouped` applies a function of one expert, such as its feed-forward network, to the rows of every expert:
- The first C rows of every expert are computed together, as one batched product that reads every weight in place. C is
  usually a little above the mean number of rows of an expert.
- The other rows of an expert are computed block by block in a loop. If no expert has more than C rows, as with
  balanced experts, the loop has nothing to do. With few rows (decoding), C is 0, and the loop computes only the experts
  that have rows.
The cost is at most a fixed factor times the useful work, and no array has size T * E.

The backward pass applies the derivative of the function in the same way. If x has 256 columns or more, the forward pass
of a feed-forward network saves the pre-activation, sorted by expert. Its name for remat policies is PRE_ACTIVATION
(call.py). With fewer columns, the backward pass computes the pre-activation again. The hidden layer, which is the
result of the activation, is always computed again. The gradient of x is first computed for every (token, choice) pair,
and then the k rows of a token are summed. So no scatter-add is needed.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .. import cost, platform
from ..arguments import sum_type
from .call import ACTIVATIONS, PRE_ACTIVATION, LinearCall, MlpCall
from .routing import Routing, first_positions

_MANY_ROWS = 512  # if C is this or more, a CPU computes two experts at a time, in pieces of this number of rows or more
_WIDE = 256  # columns of x; with fewer, recomputing the pre-activation is faster on a CPU than saving it


class _Plan(NamedTuple):
    """How many rows of an expert are computed at the same time.

    `together`: C. The first C rows of every expert are computed together with the first C rows of the other experts, as
      batched products.
    `block`: the other rows of an expert are computed in blocks of this number of rows.
    `pieces`: on a CPU, the first C rows may be cut into this number of pieces, of C / `pieces` rows each, which are
      computed one after the other (`_together`).
    """

    together: int
    block: int
    pieces: int = 1


def plan(rows: int, experts: int) -> _Plan:
    """Return how many rows of an expert are computed at the same time, for `rows` rows in total and `experts` experts.

    A row is a (token, choice) pair. The result depends on the mean number of rows of an expert, by a rule that comes
    from measurements on CPUs. With a mean above 16, C is at least 48 (or all rows, if there are fewer), because batched
    products of fewer rows are slow on CPUs.
    """
    mean = rows / experts
    if mean < 4:
        return _Plan(0, max(1, min(rows, 32)))
    together = max(48, math.ceil((mean + math.sqrt(mean)) / 16) * 16) if mean > 16 else 32
    together = min(together, rows)
    pieces = max(1, together // _MANY_ROWS)
    return _Plan(math.ceil(together / pieces) * pieces, min(together, max(32, together // 128 * 16), 128), pieces)


def detail(call: LinearCall | MlpCall) -> str:
    """Describe for `explain` how a call runs, such as "48 rows of every expert together, the rest in blocks of 32"."""
    together, block, _ = plan(call.routing.order.shape[0], call.routing.num_experts)
    return f"{together} rows of every expert together, the rest in blocks of {block}"


def _dot(x, w):
    """Return x @ w at the highest precision, in fp32, or in fp64 for fp64 arrays."""
    dtype = sum_type(x)
    return jnp.matmul(x, w, precision="highest", preferred_element_type=dtype)


def _affine(x, w, b):
    """Return x @ w + b for rows x [rows, D], a weight w [D, F] and a bias b [F]. A bias of None is zero."""
    y = _dot(x, w)
    return y if b is None else y + b.astype(y.dtype)[None]


def _gated(gate, y):
    """Return y [rows, F] with every row multiplied by its gate. `gate` is [rows, 1], or None for a factor of 1."""
    return y if gate is None else gate.astype(y.dtype) * y


def _affine_backward(x, w, b, gate, dy):
    """Return the gradients (dx, dw, db, dgate) of y = gate * (x @ w + b), given the cotangent dy of y.

    Shapes: x [rows, D], w [D, F], b [F] or None, gate [rows, 1] or None, dy [rows, F]. The gradient of a gate is
    <x @ w + b, dy> = <x, dy @ w^T> + <b, dy>, so x @ w is not computed again.
    """
    dx, gated, d_gate, d_b = _dot(dy.astype(x.dtype), w.T), _gated(gate, dy), None, None
    if gate is not None:
        d_gate = (x.astype(dx.dtype) * dx).sum(-1, keepdims=True)
        if b is not None:
            d_gate += (b.astype(dy.dtype)[None] * dy).sum(-1, keepdims=True)
        d_gate = d_gate.astype(gate.dtype)
    if b is not None:
        d_b = gated.sum(0)
    return _gated(gate, dx), _dot(x.T, gated.astype(x.dtype)), d_b, d_gate


class _Function(NamedTuple):
    """A function of the weights and rows of one expert, with its derivative. `_grouped` applies it to all experts.

    `forward`: (weights, rows) -> (y, saved). y are the result rows. `saved` is a tuple of intermediate arrays, with one
      row for each result row. Only the first len(saved_rows) of them are kept until the backward pass.
    `backward`: (weights, rows, kept, dy) -> (d_weights, d_rows), the gradients. `kept` are the arrays that were kept,
      and dy is the cotangent of y. `backward` computes again all arrays that were not kept.
    `in_rows`: for each array in `rows`, the order of its rows: "token", "pair" or "sorted", as in `call.Rows`.
    `out_rows`: the order of the rows of y.
    `saved_rows`: for each array that is kept, the order of its rows.
    """

    forward: object
    backward: object
    in_rows: tuple
    out_rows: str
    saved_rows: tuple = ()


def _linear_forward(weights, rows):
    weight, bias = weights
    x, gate = rows
    y = _gated(gate, _affine(x, weight, bias))
    return (y.astype(x.dtype) if gate is None else y), ()  # with gates, y is in fp32 until the k rows are summed


def _linear_backward(weights, rows, saved, dy):
    (x, gate), () = rows, saved
    dx, d_weight, d_bias, d_gate = _affine_backward(x, *weights, gate, dy)
    return (d_weight, d_bias), (dx.astype(x.dtype), d_gate)


def _mlp_forward(activation, weights, rows):
    w_in, b_in, w_out, b_out = weights
    x, gate = rows
    pre = _affine(x, w_in, b_in)
    hidden = ACTIVATIONS[activation](pre).astype(x.dtype)
    return _gated(gate, _affine(hidden, w_out, b_out)), (pre.astype(x.dtype),)


def _mlp_backward(activation, weights, rows, saved, dy):
    w_in, b_in, w_out, b_out = weights
    x, gate = rows
    pre = saved[0] if saved else _affine(x, w_in, b_in)
    hidden, d_activation = jax.vjp(ACTIVATIONS[activation], pre.astype(dy.dtype))
    d_hidden, d_w_out, d_b_out, d_gate = _affine_backward(hidden.astype(x.dtype), w_out, b_out, gate, dy)
    dx, d_w_in, d_b_in, _ = _affine_backward(x, w_in, b_in, None, *d_activation(d_hidden))
    return (d_w_in, d_b_in, d_w_out, d_b_out), (dx.astype(x.dtype), d_gate)


# One object for each activation, so that jit finds the program that it compiled for this activation.
_MLP = {name: (partial(_mlp_forward, name), partial(_mlp_backward, name)) for name in ACTIVATIONS}


def linear(call: LinearCall):
    """Compute `expert_linear` in plain JAX. Return its result: [T*k, F], or [T, F] with gates."""
    gates = None if call.gates is None else call.gates.reshape(-1, 1)
    out_rows = "pair" if call.out_rows == "token" else call.out_rows
    function = _Function(_linear_forward, _linear_backward, (call.x_rows, "pair"), out_rows)
    y = _jitted(function, (call.weight, call.bias), (call.x, gates), call.routing)
    return _sum_over_choices(y, call.routing).astype(call.x.dtype) if call.out_rows == "token" else y


def mlp(call: MlpCall):
    """Compute `expert_mlp` in plain JAX. Return its result [T, D]."""
    saved = ("sorted",) if call.x.shape[1] >= _WIDE else ()
    function = _Function(*_MLP[call.activation], ("token", "pair"), "pair", saved)
    weights = (call.w_in, call.b_in, call.w_out, call.b_out)
    y = _jitted(function, weights, (call.x, call.gates.reshape(-1, 1)), call.routing)
    return _sum_over_choices(y, call.routing).astype(call.x.dtype)


def _sum_over_choices(y, routing):
    """Return the sum of the k rows of each token, [T, F]. Row t * k + s of y [T*k, F] is for choice s of token t."""
    return y.reshape(*routing.expert_indices.shape, y.shape[-1]).sum(1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(function: _Function, weights, rows, routing):
    """Apply `function.forward` to the rows of every expert, with the weights of this expert. Return the result rows.

    `weights` are arrays [E, ..], with one entry for each expert. `rows` are arrays, and `function.in_rows` says how the
    rows of each array are ordered. The result has one row for every (token, choice) pair, in the order
    `function.out_rows`. The row of a pair without an expert is zero.
    """

    def block(w, xs, valid):
        return function.forward(w, xs)[:1], ()

    (y,), _ = _map_blocks(block, weights, rows, function.in_rows, (function.out_rows,), routing)
    return y


def _grouped_forward(function, weights, rows, routing):
    def block(w, xs, valid):
        y, saved = function.forward(w, xs)
        return (y, *saved[: len(function.saved_rows)]), ()

    orders = (function.out_rows, *function.saved_rows)
    (y, *saved), _ = _map_blocks(block, weights, rows, function.in_rows, orders, routing)
    return y, (weights, rows, routing, [checkpoint_name(x, PRE_ACTIVATION) for x in saved])


def _grouped_backward(function, residuals, dy):
    weights, rows, routing, saved = residuals

    def block(w, inputs, valid):
        # A padding row is a copy of some other row, which may have a NaN. It is set to zero, because 0 * NaN is NaN.
        inputs = [None if a is None else jnp.where(valid[:, None], a, 0) for a in inputs]
        xs, d, saved_rows = tuple(inputs[: len(rows)]), inputs[len(rows)], tuple(inputs[len(rows) + 1 :])
        d_w, d_xs = function.backward(w, xs, saved_rows, d.astype(sum_type(d)))
        return d_xs, d_w

    # The gradient of the row of a token is a sum over its k choices. So `block` returns one gradient row per pair.
    d_rows = tuple("pair" if r == "token" else r for r in function.in_rows)
    orders = (*function.in_rows, function.out_rows, *function.saved_rows)
    d_xs, d_w = _map_blocks(block, weights, (*rows, dy, *saved), orders, d_rows, routing)
    d_xs = tuple(
        _sum_over_choices(d.astype(sum_type(d)), routing).astype(d.dtype) if r == "token" else d
        for d, r in zip(d_xs, function.in_rows, strict=True)
    )
    d_w = jax.tree.map(lambda d, w: d.astype(w.dtype), d_w, weights)
    return d_w, d_xs, None


_grouped.defvjp(_grouped_forward, _grouped_backward)
_jitted = jax.jit(_grouped, static_argnums=0)  # without a jit, the loop would be compiled at every call


def _map_blocks(block, weights, arrays, in_rows, out_rows, routing: Routing):
    """Call `block` until all rows of all experts are computed. Return (row outputs, weight outputs) of all calls.

    `block(w, xs, valid)` computes some rows of one expert. `w` are the weights of the expert. `xs` are the arrays in
    `arrays`, but with only the rows to compute. `valid`, bool [rows], is False for a padding row. `block` returns two
    results. The row outputs are a tuple of arrays with one row for each row of `xs`. The weight outputs are a tree of
    arrays without such rows, such as the gradients of the weights of the expert.

    From the results of all calls, this function makes two results. The row outputs become arrays [R, ..] with a row for
    every (token, choice) pair. The weight outputs are summed for each expert, and the sums become arrays [E, ..].

    `weights` has arrays [E, ..]. `in_rows` has the order of the rows of each array in `arrays`: "token", "pair" or
    "sorted", as in `call.Rows`. `out_rows` has the order of the rows of each row output: "pair" or "sorted". An array
    that is None is None in `xs` too, and an output of `block` that is None is None in the result.
    """
    k = routing.expert_indices.shape[1]
    R, E = routing.order.shape[0], routing.num_experts
    C, size, pieces = plan(R, E)
    starts, ends = routing.offsets[:-1], routing.offsets[1:]

    def zeros(shape, dtype):
        return jnp.zeros_like(starts, dtype, shape)  # like `starts`, the zeros vary over the mesh axes of the arrays

    def take(p):
        pair = routing.order[p]
        index = {"token": pair // max(k, 1), "pair": pair, "sorted": p}
        return tuple(None if a is None else a[index[r]] for a, r in zip(arrays, in_rows, strict=True))

    def run(w, p, end):
        valid = p < end
        return block(w, take(jnp.minimum(p, R - 1)), valid)

    if R == 0:
        shapes = jax.eval_shape(lambda w: block(jax.tree.map(lambda x: x[0], w), arrays, jnp.zeros(0, bool)), weights)
        return jax.tree.map(lambda s: zeros(s.shape, s.dtype), shapes[0]), jax.tree.map(
            lambda s: zeros((E, *s.shape), s.dtype), shapes[1]
        )

    # For every pair, its expert and its rank among the rows of this expert.
    pair_expert = routing.expert_indices.reshape(-1)
    clipped = jnp.minimum(pair_expert, E - 1)
    pair_rank = routing.inverse - starts[clipped]

    def placed(y, order):
        """Move y [E, C, ..], the results for the first C rows of every expert, to an array [R, ..], and return it.

        The rows of the array have the order `order`, "pair" or "sorted". Rows for which y has no result are zero.
        """
        expert, rank = (
            (pair_expert, pair_rank) if order == "pair" else (pair_expert[routing.order], pair_rank[routing.order])
        )
        here = (expert < E) & (rank < C)
        index = jnp.where(here, expert * C + rank, 0)
        return jnp.where(here[:, None], y.reshape(E * C, -1)[index], 0)

    if C:
        rows_out, sums = _together(run, weights, starts, ends, C, pieces)
        outs = tuple(None if y is None else placed(y, o) for y, o in zip(rows_out, out_rows, strict=True))
    else:
        p = jax.ShapeDtypeStruct((size,), jnp.int32)
        weights_of_one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), weights)
        rows_out, sums = jax.eval_shape(run, weights_of_one, p, jax.ShapeDtypeStruct((), jnp.int32))
        outs = jax.tree.map(lambda s: zeros((R, *s.shape[1:]), s.dtype), tuple(rows_out))
        sums = jax.tree.map(lambda s: zeros((E, *s.shape), s.dtype), sums)

    # The rows after the first C rows of every expert are computed in blocks, which are numbered over all experts.
    # blocks[e] is the number of blocks of the experts 0 to e, so block i belongs to the first expert e with
    # blocks[e] > i.
    blocks = jnp.cumsum(-(-jnp.maximum(routing.counts - C, 0) // size))

    def add_block(i, state):
        outs, sums = state
        e = first_positions(blocks, i, after=True)
        before = jnp.where(e > 0, blocks[e - 1], 0)
        p = starts[e] + C + (i - before) * size + jnp.arange(size)
        rows_out, expert_sums = run(
            jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, e, 0, False), weights), p, ends[e]
        )
        pair = routing.order[jnp.minimum(p, R - 1)]
        valid = p < ends[e]
        outs = tuple(
            None if y is None else out.at[jnp.where(valid, pair if o == "pair" else p, R)].set(y, mode="drop")
            for out, y, o in zip(outs, rows_out, out_rows, strict=True)
        )
        return outs, jax.tree.map(lambda total, part: total.at[e].add(part), sums, expert_sums)

    # The expected number of passes through the loop, for cost estimates. With C > 0, it is 0, as for balanced experts.
    # With C = 0, all rows are in blocks.
    trips = 0 if C else math.ceil(R / size)
    return cost.loop(trips, lambda state: lax.fori_loop(0, blocks[-1], add_block, state))((outs, sums))


def _together(run, weights, starts, ends, C: int, pieces: int):
    """Compute the first C rows of every expert. Return the results of `run` for all experts, as arrays [E, ..].

    All rows are in one list, sorted by expert. Expert e has the rows starts[e] to ends[e] - 1 of this list.
    `run(w, p, end)` computes the rows of the list with the indices p [rows] for one expert, with its weights `w`. Rows
    with an index of `end` or more do not belong to the expert. They count as padding.

    On a CPU, if C is _MANY_ROWS or more, two experts are computed at a time, or one at a time if E is odd. This copies
    the weights of these experts, but is faster, because their rows stay in the cache. The C rows are cut into `pieces`
    pieces, which are computed one after the other. A piece without rows of these experts is skipped. This saves time if
    many tokens have no expert.
    """
    E, size = len(starts), C // pieces

    def rows_from(first, count, weights, starts, ends):
        return jax.vmap(run)(weights, starts[:, None] + first + jnp.arange(count)[None], ends)

    def piecewise(experts):
        _, starts, ends = experts

        def step(i, state):
            rows, sums = state
            new_rows, new_sums = rows_from(i * size, size, *experts)
            put = partial(lax.dynamic_update_slice_in_dim, start_index=i * size, axis=1)
            return jax.tree.map(put, rows, new_rows), jax.tree.map(jnp.add, sums, new_sums)

        shapes = jax.eval_shape(lambda: rows_from(0, C, *experts))
        zeros = jax.tree.map(lambda s: jnp.zeros_like(starts, s.dtype, s.shape), shapes)
        trips = jnp.minimum(-(-(ends - starts).max() // size), pieces)
        return cost.loop(pieces, lambda state: lax.fori_loop(0, trips, step, state))(zeros)

    if C < _MANY_ROWS or platform.name() != "cpu":
        return rows_from(0, C, weights, starts, ends)
    group = 2 - E % 2
    groups = jax.tree.map(lambda x: x.reshape(E // group, group, *x.shape[1:]), (weights, starts, ends))
    rows_of_experts = piecewise if pieces > 1 else lambda experts: rows_from(0, C, *experts)
    return jax.tree.map(lambda x: x.reshape(E, *x.shape[2:]), lax.map(rows_of_experts, groups))
