"""The Power learning-rate schedule (arXiv 2408.13359) and similar schedules. All lengths are in tokens.

A *token schedule* is a pure function `(tokens, batch_size, left) -> learning rate`. `tokens` is the number of tokens
trained so far, `batch_size` is in sequences of 4096 tokens, and `left` is the number of tokens still to come.
`power_schedule` computes the number of tokens from the number of steps. `scale_by_tokens` counts the tokens exactly,
even if the batch size changes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from stickjax.config import Config
from stickjax.config.fields import nearest

SEQUENCE = 4096  # tokens; the Power schedule measures the size of a batch in sequences of this length
UNIT = 2.0**36  # tokens, about 7e10; a power of two, because dividing by it is exact
Transform = optax.GradientTransformationExtraArgs
TokenSchedule = Callable[..., jax.Array]

# r is the share of the decay phase that is still to come. Each shape falls from 1 to 0 while r falls from 1 to 0. The
# functions use r and not 1 - r, because r is exactly 0 at the end in float32, but 1 - r would not be exactly 1.
DECAYS = {
    "exponential": lambda r: jnp.expm1(r) / math.expm1(1),
    "linear": lambda r: r,
    "sqrt": lambda r: 1 - jnp.sqrt(1 - r),
    "cosine": lambda r: jnp.sin(math.pi / 2 * r) ** 2,
}


def power_by_tokens(
    *, warmup_tokens, total_tokens=None, decay_tokens=0, decay="exponential", a=4, b=-0.51, max_value=0.02, end_ratio=0
) -> TokenSchedule:
    r"""Return the Power schedule (Shen et al., arXiv 2408.13359) as a function of n, the tokens trained so far.

    .. math::
        \eta(n) = \min(\eta_{max}, \beta a n^b), \qquad
        Power(n) = \min(1, n/W) \; \eta(clip(n, W, N - M)) \; f(x), \quad x = clip((n - (N - M)) / M, 0, 1)

    beta is the batch size in sequences of 4096 tokens. The other letters are explained with the arguments. x goes from
    0 at the start of the decay to 1 at its end, and f falls from 1 to d: f(x) = d + (1 - d) s(x). The argument `decay`
    chooses s: "exponential" (exp(1 - x) - 1) / (e - 1), "linear" 1 - x, "sqrt" 1 - sqrt(x), "cosine" cos(pi x / 2)^2.
    Without a warmup, the factor min(1, n/W) is 1. Without a decay, f is 1, and eta(n) applies to all n above W.

    Args:
      warmup_tokens: W, length of the linear warmup, in tokens. At its end the learning rate is eta(W), not eta_max.
      total_tokens: N, length of the run including the warmup, in tokens. None: there is no decay at the end. Any
        checkpoint of such a run can be continued with a decay, as if the decay had been planned from the start.
      decay_tokens: M, length of the decay at the end, in tokens. The decay starts from eta(N - M). 0: no decay. None: M
        is N - W, so that the decay begins where the warmup ends.
      decay: the shape of the decay: "exponential", "linear", "sqrt" or "cosine".
      a, b, max_value: the scale a, the exponent b and the cap eta_max of eta(n).
      end_ratio: d, the last learning rate divided by the learning rate at the start of the decay.

    Returns:
      `(tokens, batch_size, left=None) -> learning rate`, in float32, not weakly typed. `tokens` is n, and `batch_size`
      is beta. `left` is the number of tokens still to come; None: N - n. Pass `left` if earlier batches of the run had
      another size; N is then n + left.

    Raises:
      ValueError: a length is negative or not finite; warmup and decay together are longer than the run; there is a
        decay, but total_tokens is None; a, b, max_value or end_ratio is out of range; or `decay` is unknown.

    >>> learning_rate = power_by_tokens(warmup_tokens=10**9, total_tokens=32 * 10**9, decay_tokens=32 * 10**8)
    >>> [f"{learning_rate(n, 128):.6f}" for n in (0, 10**9, 10**10, 32 * 10**9)]
    ['0.000000', '0.013160', '0.004067', '0.000000']
    """
    _check_shape(warmup_tokens, total_tokens, decay_tokens, decay, a, b, max_value, end_ratio)
    # The lengths are floats, because numbers of tokens overflow int32. `first` is at least 1, because 0^b is infinite.
    warmup, first = float(warmup_tokens), float(max(warmup_tokens, 1))
    decays = decay_tokens != 0

    def schedule(tokens, batch_size, left=None):
        n = jnp.asarray(tokens, jnp.float32)  # not weakly typed: a weak type would become the type of the parameters
        last = math.inf
        if decays:
            left = float(total_tokens) - n if left is None else jnp.asarray(left, jnp.float32)
            span = jnp.maximum(n + left - warmup, 1) if decay_tokens is None else float(decay_tokens)
            last = jnp.maximum(n + left - span, first)
        # n is first divided by UNIT, because in float32 the power of a number near 1e12 is wrong in the seventh digit.
        rate = jnp.minimum(max_value, batch_size * (a * UNIT**b) * (jnp.clip(n, first, last) / UNIT) ** b)
        if warmup:
            rate = rate * jnp.minimum(n / warmup, 1)
        if decays:
            share = jnp.clip(left / span, 0, 1)  # after the end of the run, "exponential" would be negative
            rate = rate * (end_ratio + (1 - end_ratio) * DECAYS[decay](share))
        return rate.astype(jnp.float32)  # under x64, a NumPy scalar argument makes it float64

    return schedule


def wsd_by_tokens(*, warmup_tokens, **shape) -> TokenSchedule:
    """Return the warmup-stable-decay (WSD) schedule (arXiv 2404.06395) as a function of the tokens trained so far.

    The learning rate rises to `max_value`, stays there, and decays at the end. The arguments are the arguments of
    `power_by_tokens` without a and b. With decay_tokens=0, the default, there is no decay: the learning rate stays
    constant after the warmup. With decay_tokens=None, the decay begins where the warmup ends. Then decay="cosine" gives
    the usual cosine schedule, and decay="linear" the usual linear schedule.

    >>> learning_rate = wsd_by_tokens(warmup_tokens=100, total_tokens=1000, decay_tokens=200, decay="linear")
    >>> [f"{learning_rate(n, 1):.3f}" for n in (50, 100, 800, 900, 1000)]
    ['0.010', '0.020', '0.020', '0.010', '0.000']
    """
    return power_by_tokens(warmup_tokens=warmup_tokens, a=1e30, b=0.0, **shape)


def power_schedule(*, tokens_per_step, batch_size=None, warmup_tokens, start_tokens=0, **law) -> optax.Schedule:
    """Return the schedule `power_by_tokens` as an optax schedule: a function of `count`, the number of steps done.

    The tokens trained before a step are n = start_tokens + count * tokens_per_step.

    Args:
      tokens_per_step: tokens in one step.
      batch_size: beta, the batch size in sequences of 4096 tokens; None: tokens_per_step / 4096.
      warmup_tokens, **law: arguments of `power_by_tokens`.
      start_tokens: tokens trained before step 0, for a run that continues another run with another batch size.

    Raises:
      ValueError: an argument of `power_by_tokens` is not valid, tokens_per_step or batch_size is not positive, or
        start_tokens is negative.

    >>> schedule = power_schedule(tokens_per_step=128 * 4096, warmup_tokens=10**9)
    >>> f"{schedule(20_000):.6f}"
    '0.003970'
    """
    return _by_steps(power_by_tokens(warmup_tokens=warmup_tokens, **law), tokens_per_step, batch_size, start_tokens)


def wsd_schedule(*, tokens_per_step, warmup_tokens, start_tokens=0, **shape) -> optax.Schedule:
    """Return the schedule `wsd_by_tokens` as an optax schedule: a function of the number of steps done.

    The arguments are the arguments of `power_schedule` without batch_size, a and b.
    """
    return _by_steps(wsd_by_tokens(warmup_tokens=warmup_tokens, **shape), tokens_per_step, None, start_tokens)


def _by_steps(schedule: TokenSchedule, tokens_per_step, batch_size=None, start_tokens=0) -> optax.Schedule:
    _check("tokens_per_step", tokens_per_step, positive=True)
    _check("start_tokens", start_tokens)
    batch_size = tokens_per_step / SEQUENCE if batch_size is None else batch_size
    _check("batch_size", batch_size, positive=True)

    # The product is float32, because an integer product overflows int32 after 2^31 tokens. A float32 sum would stall.
    start, step = float(start_tokens), float(tokens_per_step)
    return lambda count: schedule(start + jnp.asarray(count, jnp.float32) * step, batch_size)


class TokenCount(NamedTuple):
    """An exact number of tokens below 2^64: high * 2^32 + low, where both words are uint32.

    JAX has no int64 by default, and float32 can represent all integers only up to 2^24.
    """

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, tokens) -> "TokenCount":
        if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
            raise ValueError(f"tokens must be an integer, not {jnp.result_type(tokens)}, which can round large numbers")
        if isinstance(tokens, jax.Array):
            return cls(jnp.zeros((), jnp.uint32), tokens.astype(jnp.uint32))
        if not 0 <= tokens < 2**64:
            raise ValueError(f"tokens={tokens} must be at least 0 and below 2^64")
        return cls(*(jnp.uint32(word) for word in divmod(int(tokens), 2**32)))

    def __add__(self, other: "TokenCount") -> "TokenCount":
        low = self.low + other.low
        return TokenCount(self.high + other.high + (low < other.low).astype(jnp.uint32), low)

    def __int__(self) -> int:
        return int(self.high) * 2**32 + int(self.low)

    def float32(self) -> jax.Array:
        return self.high.astype(jnp.float32) * 2.0**32 + self.low.astype(jnp.float32)


class ScaleByTokensState(NamedTuple):
    tokens: TokenCount  # the number of tokens trained so far
    learning_rate: jax.Array  # the learning rate of the last update, for logs


def scale_by_tokens(schedule: TokenSchedule, tokens_per_step=None, *, batch_size=None, start_tokens=0) -> Transform:
    """Return an optax transform that multiplies updates by minus the learning rate of a token schedule.

    Its update function is called as `update(updates, state, params, tokens=..., left=...)`. `tokens` is the number of
    tokens of this step. It is added to an exact counter in the state, which checkpoints save. So a run may resume with
    another batch size. `left` is the number of tokens still to come, including this step. From `left` the schedule
    computes where the run ends. Without `left`, the run ends at the schedule's total_tokens.

    Args:
      schedule: a token schedule, such as `power_by_tokens(...)` or `wsd_by_tokens(...)`. It may be a function of only
        (tokens, batch_size) if `left` is never given.
      tokens_per_step: the tokens of a step if `update` is called without `tokens=`.
      batch_size: the batch size of all steps, in sequences of 4096 tokens; None: each step's tokens / 4096.
      start_tokens: the number of tokens trained before the first update.

    Raises:
      ValueError: an argument is out of range, or `tokens` is missing, negative or not an integer.

    >>> tx = scale_by_tokens(power_by_tokens(warmup_tokens=8192))
    >>> state = tx.init(jnp.zeros(()))
    >>> for tokens in (4096, 4096, 8192):
    ...     update, state = tx.update(jnp.ones(()), state, tokens=tokens)
    >>> int(state.tokens), f"{state.learning_rate:.4f}"
    (16384, '0.0200')
    """
    _check("tokens_per_step", 1 if tokens_per_step is None else tokens_per_step, positive=True)
    _check("batch_size", 1 if batch_size is None else batch_size, positive=True)

    def update(updates, state, params=None, *, tokens=None, left=None, **extra):
        tokens = tokens_per_step if tokens is None else tokens
        if tokens is None:
            raise ValueError("this step's number of tokens is missing: call update(grads, state, params, tokens=...)")
        step = TokenCount.of(tokens)
        beta = step.float32() / SEQUENCE if batch_size is None else batch_size
        rate = schedule(state.tokens.float32(), beta, *([] if left is None else [left]))
        updates = jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates)
        return updates, ScaleByTokensState(state.tokens + step, rate)

    init = lambda params: ScaleByTokensState(TokenCount.of(start_tokens), jnp.zeros((), jnp.float32))  # noqa: E731
    return Transform(init, update)


def make_token_schedule(config: Config) -> TokenSchedule:
    """Return the token schedule that `config.optim` describes: a function of the tokens trained so far.

    The schedules "power" and "wsd" decay during the last `decay_tokens` tokens. "cosine" decays from the end of the
    warmup to the end of the run. "constant" does not decay.
    """
    o = config.optim
    # If earlier steps of a run had larger batches, the run has more tokens than steps * B * T.
    total = max(config.total_tokens, o.warmup_tokens + o.decay_tokens)
    shape = dict(warmup_tokens=o.warmup_tokens, max_value=o.peak_lr, end_ratio=o.end_ratio)
    if o.schedule == "cosine":
        return wsd_by_tokens(**shape, total_tokens=total, decay_tokens=None, decay="cosine")
    if o.schedule == "constant":
        return wsd_by_tokens(**shape)
    shape |= dict(total_tokens=total if o.decay_tokens else None, decay_tokens=o.decay_tokens, decay=o.decay)
    return wsd_by_tokens(**shape) if o.schedule == "wsd" else power_by_tokens(**shape, a=o.a, b=o.b)


def make_schedule(config: Config) -> optax.Schedule:
    """Return the learning rate of `config.optim` as an optax schedule: a function of the number of steps done."""
    return _by_steps(make_token_schedule(config), config.data.tokens_per_step)


def _check_shape(warmup_tokens, total_tokens, decay_tokens, decay, a, b, max_value, end_ratio) -> None:
    _check("warmup_tokens", warmup_tokens)
    _check("decay_tokens", decay_tokens or 0)
    _check("max_value", max_value, positive=True)
    if not a > 0:  # NaN fails, too
        raise ValueError(f"a={a} must be positive")
    if not math.isfinite(b):
        raise ValueError(f"b={b} must be finite")
    if not 0 <= end_ratio <= 1:
        raise ValueError(f"end_ratio={end_ratio} must be between 0 and 1")
    if decay not in DECAYS:
        raise ValueError(f"decay={decay!r} is not one of {', '.join(map(repr, DECAYS))}{nearest(str(decay), DECAYS)}")
    if total_tokens is None and decay_tokens != 0:
        raise ValueError(f"{decay_tokens=} needs total_tokens, because the decay ends at the end of the run")
    _check("total_tokens", total_tokens or 0)
    shortest = warmup_tokens + (decay_tokens or 0)
    if total_tokens is not None and shortest > total_tokens:
        raise ValueError(f"{warmup_tokens=} and {decay_tokens=} do not fit into {total_tokens=}")


def _check(name: str, value, *, positive: bool = False) -> None:
    if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
        raise ValueError(f"{name}={value} must be finite and {'positive' if positive else 'at least 0'}")
