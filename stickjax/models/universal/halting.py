"""Dynamic halting: a block is applied to every token again and again, until that token halts.

In every step, a token breaks off a part of a stick of length one: the probability that it halts at this step.

Tan et al., `Sparse Universal Transformer <https://arxiv.org/abs/2310.07096>`_.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from stickjax.models.layers import cast, uniform


class HaltingGate(nnx.Module):
    """A gate with two outputs for every token: the log-probability to go on, and the log-probability to halt.

    From the output h of the block, the gate computes log_softmax(gelu(h @ w_in + bias) @ w_out + [halting_bias, 0]).
    `halting_bias` is a field of the config. w_out starts at zero. So before training, the probability to go on is
    sigmoid(halting_bias), which is 1/2 for a bias of 0.
    """

    def __init__(self, config, key):
        self.config = c = config
        k_in, k_bias = jax.random.split(key)
        self.w_in = uniform(k_in, (c.D, c.D), c.D**-0.5, c)
        self.bias = uniform(k_bias, (c.D,), c.D**-0.5, c)
        self.w_out = nnx.Param(jnp.zeros((c.D, 2), c.param_dtype))

    def __call__(self, h: Float[Array, "B T D"]) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        hidden = h @ cast(self.w_in, self.config) + cast(self.bias, self.config)[None, None]
        hidden = jax.nn.gelu(hidden, approximate=False)
        logits = jnp.einsum("BTD,DG->BTG", hidden, cast(self.w_out, self.config), preferred_element_type=jnp.float32)
        logits += jnp.array([self.config.halting_bias, 0.0])[None, None]
        go_on, halt = jnp.moveaxis(jax.nn.log_softmax(logits, axis=-1), -1, 0)
        return go_on, halt


class Halting(NamedTuple):
    """The values that one step of dynamic halting passes to the next step.

    A step applies the block once. The steps are numbered from 0. h_i is the output of step i for a token, and p_i is
    the probability that the token halts at step i. All floating-point arrays except `hidden` are in fp32.

    `step`: l, the number of the next step.
    `hidden` [B,T,D]: the input of step l, which is the output of step l - 1.
    `state` [B,T,D]: the mean of h_i over the steps so far. h_i has the weight p_i, but the latest h_i has all the
      remaining weight, so that the weights sum to 1. `state` no longer changes once the token has halted.
    `running` [B,T]: w, the probability that the token has not halted yet. If w falls below 1 - threshold, the token
      halts, and w becomes 0. For padding, w is 0.
    `depth` [B,T]: the mean number of steps: the mean of i + 1, with the same weights as in `state`.
    `act` [B,T]: the mean number of the step in which the token halts. A loss on `act` makes tokens halt earlier. Until
      the token halts, `act` is `depth` - 1. After that, `act` still changes: in every step, it becomes the sum of
      p_i * i over all previous steps.
    `expected` [B,T,D], `expected_step` [B,T]: the sum of p_i * h_i and the sum of p_i * i, over the steps so far.
    `log_rest` [B,T]: the logarithm of the probability that the token has not halted yet (the rest of the stick).
      Unlike `running`, it still changes after the token has halted.
    `statistics`: the statistics that the block returns for the losses, summed over the steps.
    `rows`: a pytree of arrays [L], such as one array for each router. An array has the number of (token, choice) pairs
      that the experts computed in each of the L steps.
    """

    step: jax.Array
    hidden: jax.Array
    state: jax.Array
    running: jax.Array
    depth: jax.Array
    act: jax.Array
    expected: jax.Array
    expected_step: jax.Array
    log_rest: jax.Array
    statistics: Any
    rows: Any


def halting_step(
    now: Halting, block: Callable, gate: Callable, token_mask: Bool[Array, "B T"], threshold: float | Float[Array, ""]
) -> Halting:
    """Apply the block once, then decide which tokens halt. Return the `Halting` after this step.

    `state` and `expected` are fields of `Halting`. w is the field `running`, l is `step`, h is `hidden`, and rest is
    exp(`log_rest`). g_go_on and g_halt are the probabilities from the gate. A prime marks the value after the step:

      h' = block(h, state, w, l);   state' = expected + w h' where w > 0, else state;
      p = rest * g_halt(h');   rest' = rest * g_go_on(h');   expected' = expected + p h';
      w' = rest' where rest' >= 1 - threshold, else 0.

    Args:
      now: the `Halting` before this step.
      block: a function (h, state, w, l) -> (h', statistics, rows). Its attention computes keys and values from `state`.
      gate: a function h -> (log g_go_on, log g_halt), [B,T] each.
      token_mask: False for padding, for which w' is always 0.
      threshold: a token halts when the sum of its halting probabilities p exceeds this number.
    """
    step, w = now.step, now.running
    hidden, statistics, rows = block(now.hidden, now.state.astype(now.hidden.dtype), w, step)
    h = hidden.astype(jnp.float32)
    number = step.astype(jnp.float32)
    act = now.expected_step + w * number
    state = jnp.where(w[..., None] > 0, now.expected + w[..., None] * h, now.state)
    depth = jnp.where(w > 0, act + 1, now.depth)

    go_on, halt = gate(hidden)
    p = jnp.exp(now.log_rest + halt)
    log_rest = now.log_rest + go_on
    rest = jnp.exp(log_rest)
    return Halting(
        step=step + 1,
        hidden=hidden,
        state=state,
        running=jnp.where(token_mask & (rest >= 1 - threshold), rest, 0),
        depth=depth,
        act=act,
        expected=now.expected + p[..., None] * h,
        expected_step=now.expected_step + p * number,
        log_rest=log_rest,
        statistics=jax.tree.map(jnp.add, now.statistics, statistics),
        rows=jax.tree.map(lambda all, one: all.at[step].set(one), now.rows, rows),
    )


def start(x: Float[Array, "B T D"], token_mask: Bool[Array, "B T"], block: Callable, L: int) -> Halting:
    """Return the `Halting` before the first step: `running` is 1, or 0 for padding, and all sums are zero.

    `x` is the input of the first step, and also the first `state`. `L` is the largest number of steps. `block` is not
    run: only the shapes of its results are needed.
    """
    state, zero = x.astype(jnp.float32), jnp.zeros(token_mask.shape, jnp.float32)
    first = jnp.zeros((), jnp.int32)
    _, statistics, rows = jax.eval_shape(block, x, x, zero, first)
    return Halting(
        step=first,
        hidden=x,
        state=state,
        running=token_mask.astype(jnp.float32),
        depth=zero,
        act=zero,
        expected=jnp.zeros_like(state),
        expected_step=zero,
        log_rest=zero,
        statistics=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), statistics),
        rows=jax.tree.map(lambda s: jnp.zeros((L, *s.shape), s.dtype), rows),
    )


def until_halted(
    block: Callable,
    gate: Callable,
    x: Float[Array, "B T D"],
    token_mask: Bool[Array, "B T"],
    L: int,
    threshold: float | Float[Array, ""],
    *,
    stop_early: bool,
) -> Halting:
    """Run `halting_step` L times, or with `stop_early` only until all tokens have halted. Return the last `Halting`.

    `state`, `depth`, `statistics` and `rows` are the same with and without `stop_early`. With `stop_early`, `jax.grad`
    raises an error. `x` is the input of the first step. `block`, `gate`, `token_mask` and `threshold` are as in
    `halting_step`.

    >>> gate = lambda h: (jnp.full(h.shape[:2], jnp.log(0.5)),) * 2
    >>> block = lambda h, state, w, l: (h + 1, (), (w > 0).sum())
    >>> end = until_halted(block, gate, jnp.zeros((1, 1, 1)), jnp.ones((1, 1), bool), 6, 0.7, stop_early=True)
    >>> end.rows.tolist(), float(end.state[0, 0, 0]), float(end.depth[0, 0])  # 2 steps, with weight 1/2 each
    ([1, 1, 0, 0, 0, 0], 1.5, 1.5)
    """
    now = start(x, token_mask, block, L)

    def step(now):
        return halting_step(now, block, gate, token_mask, threshold)

    if stop_early:
        return jax.lax.while_loop(lambda now: (now.step < L) & (now.running > 0).any(), step, now)
    return jax.lax.scan(lambda now, _: (step(now), None), now, None, length=L)[0]
