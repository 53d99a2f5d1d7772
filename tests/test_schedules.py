"""Test the Power schedule: the numbers of its specification, and the seven mistakes that the specification warns of."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stickjax.config import Config
from stickjax.training import schedules
from stickjax.training.optimizer import make_optimizer
from stickjax.training.schedules import (
    TokenCount,
    make_schedule,
    power_by_tokens,
    power_schedule,
    scale_by_tokens,
    wsd_by_tokens,
    wsd_schedule,
)

DECAYS = list(schedules.DECAYS)
STEP = 10**6  # tokens per step; every golden value is at a whole number of steps
RUN = dict(tokens_per_step=STEP, warmup_tokens=10**9)
LARGE = dict(**RUN, batch_size=1024, total_tokens=1250 * 10**9, decay_tokens=250 * 10**9)
SMALL = dict(**RUN, batch_size=128, total_tokens=32 * 10**9, decay_tokens=32 * 10**8)
GOLDEN_LARGE = {
    0: 0.0, 5e8: 0.01, 1e9: 0.02, 2.5e10: 0.02, 3e10: 0.018579247, 1e11: 0.010054488, 5e11: 0.004424714,
    1e12: 0.003107134, 1.0625e12: 0.002019848, 1.125e12: 0.001173069, 1.1875e12: 0.000513597, 1.25e12: 0.0,
}  # fmt: skip
GOLDEN_SMALL = {
    5e8: 0.006580213, 1e9: 0.013160426, 2e9: 0.009241547, 1e10: 0.004066961, 2.88e10: 0.002371263, 3.2e10: 0.0,
}  # fmt: skip
HALF_DIGIT = 5e-10  # the golden values are printed with nine decimals


def place_in_decay(decay) -> float:
    """Return the tolerance for a learning rate in the decay, divided by the learning rate at the start of the decay.

    `decay` is the shape of the decay. In float32, a number of tokens has an error of about 6e-8 times the number of
    tokens of the run. The decay is a tenth of the run, so the position x in the decay, from 0 to 1, has an error of
    6e-7. The shape "sqrt" uses sqrt(x), whose error near x = 0 is sqrt(6e-7) = 8e-4.
    """
    return 8e-4 if decay == "sqrt" else 2e-6


def steps(tokens) -> int:
    return round(tokens / STEP)


@pytest.mark.parametrize("jit", [False, True])
def test_golden_values_of_the_large_batch(jit):
    schedule = power_schedule(**LARGE)
    values = [(jax.jit(schedule) if jit else schedule)(steps(n)) for n in GOLDEN_LARGE]
    np.testing.assert_allclose(values, list(GOLDEN_LARGE.values()), rtol=3e-7, atol=HALF_DIGIT)


@pytest.mark.parametrize("decay", DECAYS)
def test_golden_values_of_the_small_batch(decay):
    values = [power_schedule(**SMALL, decay=decay)(steps(n)) for n in GOLDEN_SMALL]
    np.testing.assert_allclose(values, list(GOLDEN_SMALL.values()), rtol=3e-7, atol=HALF_DIGIT)


@pytest.mark.parametrize("decay, golden", [("exponential", 0.000895248), ("linear", 0.001185632)])
def test_golden_values_half_way_through_the_decay(decay, golden):
    value = power_schedule(**SMALL, decay=decay)(steps(3.04e10))
    np.testing.assert_allclose(value, golden, rtol=3e-7, atol=HALF_DIGIT)


@pytest.mark.parametrize(
    "beta, end, unit",
    [
        (16, 7.46e6, 1e4), (32, 2.905e7, 1e4), (64, 1.131e8, 1e5), (128, 4.402e8, 1e5), (256, 1.713e9, 1e6),
        (512, 6.67e9, 1e7), (1024, 2.596e10, 1e7), (2048, 1.011e11, 1e8), (4096, 3.934e11, 1e8),
    ],
)  # fmt: skip
def test_the_cap_ends_where_the_table_says(beta, end, unit):
    rate = power_by_tokens(warmup_tokens=0)
    assert rate(end - unit, beta) == np.float32(0.02)
    assert rate(end + unit, beta) < np.float32(0.02)
    np.testing.assert_allclose((0.02 / (beta * 4)) ** (1 / -0.51), end, atol=unit / 2)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_against_the_equations_in_float64(decay, ratio):
    shapes = {
        "exponential": lambda x: (1 - ratio) * math.e / (math.e - 1) * np.exp(-x) + (ratio * math.e - 1) / (math.e - 1),
        "linear": lambda x: 1 + (ratio - 1) * x,
        "sqrt": lambda x: 1 + (ratio - 1) * np.sqrt(x),
        "cosine": lambda x: ratio + (1 - ratio) * (1 + np.cos(np.pi * x)) / 2,
    }
    n = np.linspace(0, 32e9, 641)
    law = lambda n: np.minimum(0.02, 128 * 4 * n**-0.51)  # noqa: E731
    begin = 32e9 - 32e8
    expected = np.where(n < 1e9, n / 1e9 * law(1e9), law(np.clip(n, 1e9, begin)))
    expected = np.where(n > begin, shapes[decay](np.maximum(n - begin, 0) / 32e8) * law(begin), expected)
    value = power_schedule(**SMALL, decay=decay, end_ratio=ratio)(n / STEP)
    stable = n < begin
    np.testing.assert_allclose(value[stable], expected[stable], rtol=3e-7)
    np.testing.assert_allclose(value[~stable], expected[~stable], rtol=0, atol=place_in_decay(decay) * law(begin))


# The mistakes that the specification warns of (its "traps"), in the order of the specification.


def test_trap_1_tokens_of_a_long_run_do_not_overflow():
    schedule = jax.jit(power_schedule(tokens_per_step=1024 * 4096, warmup_tokens=10**9))
    for count in (511, 512, 513, 10**5, 10**6):
        n = count * 1024 * 4096
        expected = min(0.02, 4096 * max(n, 10**9) ** -0.51)
        np.testing.assert_allclose(schedule(jnp.int32(count)), expected, rtol=3e-7)


def test_trap_1_tokens_are_not_accumulated_in_float32():
    tx = scale_by_tokens(wsd_by_tokens(warmup_tokens=0), start_tokens=2**24)
    state = tx.init(())
    for _ in range(3):  # 2^24 + 1 is not a float32 number, so a float32 sum would not grow
        _, state = tx.update((), state, tokens=1)
    assert int(state.tokens) == 2**24 + 3


def test_trap_2_tokens_count_from_the_start_of_the_warmup():
    short = power_schedule(tokens_per_step=STEP, batch_size=128, warmup_tokens=STEP)
    long = power_schedule(tokens_per_step=STEP, batch_size=128, warmup_tokens=10**9)
    assert long(2000) == short(2000)


@pytest.mark.parametrize("warmup", [0, 1, 10**9])
def test_trap_3_no_negative_power_of_zero(warmup):
    value, slope = jax.value_and_grad(power_by_tokens(warmup_tokens=warmup))(0.0, 128.0)
    assert value == (0.0 if warmup else np.float32(0.02)) and np.isfinite(slope)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_trap_4_the_decay_stays_at_its_end(decay, ratio):
    schedule = power_schedule(**LARGE, decay=decay, end_ratio=ratio)
    end = steps(1.25e12)
    for count in (end, end + 1, 2 * end):
        np.testing.assert_allclose(schedule(count), ratio * 0.003107134, rtol=3e-7)


@pytest.mark.parametrize("count", [7, np.int64(7), np.float64(7), "int32"])
def test_trap_5_the_learning_rate_is_a_strong_float32(count, x64):
    count = jnp.int32(7) if isinstance(count, str) else count
    decaying = dict(tokens_per_step=8, total_tokens=80, decay_tokens=30, max_value=np.float64(0.1))
    for schedule in (
        power_schedule(tokens_per_step=8, warmup_tokens=0),
        power_schedule(warmup_tokens=0, **decaying),
        wsd_schedule(tokens_per_step=8, warmup_tokens=0),
        wsd_schedule(warmup_tokens=20, **decaying),
    ):
        value = schedule(count)
        assert value.dtype == jnp.float32 and not value.weak_type
        assert (value * jnp.ones((), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_trap_5_parameters_keep_their_type(dtype):
    params = {"attention": {"query": jnp.ones((2, 2), dtype)}, "norm": {"scale": jnp.ones(2, dtype)}}
    grads = jax.tree.map(lambda p: p * 1e-6, params)  # its square is too small for float16
    tx = make_optimizer(Config(), params)
    updates, state = tx.update(grads, tx.init(params), params)
    for leaf in jax.tree.leaves(optax.apply_updates(params, updates)):
        assert leaf.dtype == dtype and np.isfinite(leaf.astype(jnp.float32)).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, "nu"))} == {jnp.dtype("float32")}


def test_trap_6_the_batch_size_changes_on_the_way():
    rate = power_by_tokens(warmup_tokens=10**6)
    tx = scale_by_tokens(rate)
    state, n = tx.init(()), 0
    for beta in [256] * 3 + [64] * 3:
        _, state = tx.update((), state, tokens=beta * 4096)
        np.testing.assert_allclose(state.learning_rate, rate(n, beta), rtol=1e-7)
        n += beta * 4096
    assert int(state.tokens) == n
    # With a schedule by steps, start_tokens has the same effect: the second phase starts where the first ended.
    resumed = power_schedule(tokens_per_step=64 * 4096, warmup_tokens=10**6, start_tokens=3 * 256 * 4096)
    np.testing.assert_allclose(resumed(2), state.learning_rate, rtol=1e-7)


def test_trap_7_short_sequences_count_as_parts_of_4096_tokens():
    tokens = 512 * 1024  # 512 sequences of 1024 tokens are 128 of 4096
    law = dict(tokens_per_step=tokens, warmup_tokens=10**6)
    assert power_schedule(**law)(10**4) == power_schedule(**law, batch_size=128)(10**4)
    assert power_schedule(**law)(10**4) < power_schedule(**law, batch_size=512)(10**4)
    fixed = scale_by_tokens(power_by_tokens(warmup_tokens=1), batch_size=16, start_tokens=10**9)
    _, state = fixed.update((), fixed.init(()), tokens=tokens)
    np.testing.assert_allclose(state.learning_rate, 64 * 1e9**-0.51, rtol=3e-7)


# Shape.


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("schedule", [power_by_tokens, wsd_by_tokens])
def test_continuous_where_the_parts_meet(schedule, decay):
    rate = schedule(warmup_tokens=10**6, total_tokens=10**8, decay_tokens=10**7, decay=decay)
    for n in (10**6, 9 * 10**7):
        before, after = rate(n - 8.0, 4), rate(n + 8.0, 4)
        np.testing.assert_allclose(before, after, rtol=2e-3 if decay == "sqrt" else 3e-5)


@settings(max_examples=30, deadline=None)
@given(
    beta=st.integers(1, 4096),
    warmup=st.integers(0, 10**10),
    stable=st.integers(0, 10**12),
    decay_tokens=st.integers(0, 10**11),
    decay=st.sampled_from(DECAYS),
    ratio=st.floats(0, 1),
)
def test_rises_in_the_warmup_and_never_again(beta, warmup, stable, decay_tokens, decay, ratio):
    total = warmup + stable + decay_tokens
    assume(decay_tokens == 0 or decay_tokens > 1e-6 * total)  # in float32, both ends of a shorter decay would be equal
    rate = power_by_tokens(
        warmup_tokens=warmup, total_tokens=total, decay_tokens=decay_tokens, decay=decay, end_ratio=ratio
    )
    up = np.asarray(rate(np.linspace(0, warmup, 50), beta))
    down = np.asarray(rate(np.linspace(warmup, 1.1 * total, 200), beta))
    slack = 1e-6 * down[0]
    assert (np.diff(up) >= -slack).all() and (np.diff(down) <= slack).all()
    assert (up >= 0).all() and (down >= 0).all() and max(up.max(), down.max()) <= np.float32(0.02)


@pytest.mark.parametrize("schedule", [power_schedule(**LARGE), make_schedule(Config())])
def test_jit_vmap_and_scan(schedule):
    counts = jnp.arange(0, 1_300_000, 50_000)
    _, scanned = jax.lax.scan(lambda c, n: (c, schedule(n)), 0, counts)
    np.testing.assert_allclose(scanned, schedule(counts), rtol=3e-7, atol=1e-12)
    np.testing.assert_allclose(scanned, jax.jit(jax.vmap(schedule))(counts), rtol=3e-7, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(done=st.integers(0, 10**6), count=st.integers(0, 10**5))
def test_start_tokens_resume_a_run(done, count):
    whole = power_schedule(tokens_per_step=2**20, warmup_tokens=10**9)
    resumed = power_schedule(tokens_per_step=2**20, warmup_tokens=10**9, start_tokens=done * 2**20)
    np.testing.assert_allclose(resumed(count), whole(done + count), rtol=3e-7)


def test_wsd():
    rate = wsd_schedule(
        tokens_per_step=10, warmup_tokens=100, total_tokens=1000, decay_tokens=200, max_value=0.5, end_ratio=0.1
    )
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(80), rate(100)], [0, 0.25, 0.5, 0.5, 0.05], rtol=1e-6)
    assert wsd_by_tokens(warmup_tokens=0)(10**13, 0) == 0  # a step without tokens does not give NaN


def test_make_schedule_reads_the_config():
    config = Config().replace({"optim.warmup_tokens": 4096 * 10, "data.B": 16, "data.T": 256, "train.steps": 100})

    def at(schedule, *counts, **changes):
        schedule = make_schedule(config.replace({"optim.schedule": schedule, "optim.peak_lr": 0.01} | changes))
        return [float(schedule(count)) for count in counts]

    law = min(0.01, 4 * (4096 * 50) ** -0.51)
    ends = {"optim.decay_tokens": 4096 * 50}
    assert at("constant", 0, 5, 50, 200) == pytest.approx([0, 0.005, 0.01, 0.01])
    assert at("cosine", 0, 10, 55, 100, 200) == pytest.approx([0, 0.01, 0.005, 0, 0], abs=1e-8)
    assert at("wsd", 50, 100) == pytest.approx([0.01, 0.01])
    assert at("wsd", 50, 75, 100, **ends, **{"optim.decay": "linear"}) == pytest.approx([0.01, 0.005, 0], abs=1e-8)
    assert at("power", 5, 50, 200) == pytest.approx([min(0.01, 4 * 40960**-0.51) / 2, law, 4 * (4096 * 200) ** -0.51])
    assert at("power", 50, 100, **ends, **{"optim.end_ratio": 0.5}) == pytest.approx([law, law / 2])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tokens_per_step=0), "tokens_per_step=0"),
        (dict(tokens_per_step=math.nan), "tokens_per_step=nan"),
        (dict(batch_size=-1), "batch_size=-1"),
        (dict(start_tokens=-1), "start_tokens=-1"),
        (dict(warmup_tokens=-1), "warmup_tokens=-1"),
        (dict(warmup_tokens=math.nan), "warmup_tokens=nan"),
        (dict(decay_tokens=-5), "decay_tokens=-5"),
        (dict(decay_tokens=5), "needs total_tokens"),
        (dict(decay_tokens=50, warmup_tokens=60, total_tokens=100), "do not fit into total_tokens=100"),
        (dict(total_tokens=math.nan), "total_tokens=nan"),
        (dict(total_tokens=-1), "total_tokens=-1"),
        (dict(decay="exponental"), "did you mean 'exponential'"),
        (dict(max_value=0), "max_value=0"),
        (dict(a=-1), "a=-1"),
        (dict(b=math.nan), "b=nan"),
        (dict(end_ratio=1.5), "end_ratio=1.5"),
        (dict(end_ratio=math.nan), "end_ratio=nan"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        power_schedule(**dict(tokens_per_step=1, warmup_tokens=0) | changes)
    assert "\n" not in str(error.value)


# The exact count.


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 2**63), step=st.integers(0, 2**33))
def test_token_count_is_exact(start, step):
    total = TokenCount.of(start) + TokenCount.of(step)
    assert int(total) == start + step
    np.testing.assert_allclose(total.float32(), start + step, rtol=1.2e-7)


def test_token_count_passes_2_31_in_jit():
    tx = scale_by_tokens(power_by_tokens(warmup_tokens=1, a=1))

    def body(state, tokens):
        _, state = tx.update((), state, tokens=tokens)
        return state, state.learning_rate

    tokens = np.full(3000, 1024 * 4096 + 1, np.int32)
    state, rates = jax.jit(lambda state: jax.lax.scan(body, state, tokens))(tx.init(()))
    assert int(state.tokens) == tokens.astype(np.int64).sum() > 2**33
    n = tokens.astype(np.int64).cumsum()[:-1]
    np.testing.assert_allclose(rates[1:], np.minimum(0.02, tokens[1:] / 4096 * n**-0.51), rtol=3e-7)


@pytest.mark.parametrize("tokens, message", [(None, "missing"), (-1, "tokens=-1"), (4096.0, "integer"), (2**64, "2")])
def test_token_errors(tokens, message):
    tx = scale_by_tokens(power_by_tokens(warmup_tokens=0))
    with pytest.raises(ValueError, match=message):
        tx.update((), tx.init(()), tokens=tokens)
    with pytest.raises(ValueError, match="tokens_per_step"):
        scale_by_tokens(power_by_tokens(warmup_tokens=0), 0)
