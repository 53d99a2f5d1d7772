"""Test early exit of stick-breaking attention, which skips the far key tiles once little of the stick is left.

The tests check the size of the error, the number of tiles that are computed, and that skipped keys are never read.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import STICK, STICK_IMPLEMENTATIONS, Stick
from test_stick_breaking import QUICK, REFERENCE, attend, check

from pallas_kernels import Stats, stick_breaking_attention
from pallas_kernels.stick_breaking.call import share_of

SKIP = {"implementation": "xla", "tiles": (16, 16), "skip_below": -24.0}


def kept_tiles(query, key, threshold, size, padding=None) -> float:
    """Count in NumPy the tiles that early exit must compute for one head; return them as a share of all causal tiles.

    The causal tiles are the tiles on the diagonal and left of it. The tiles on the diagonal are always computed.
    Another tile must be computed if, for at least one of its queries that is not padding, the keys right of the tile
    leave at least 2^`threshold` of the stick.

    Args:
      query, key: arrays [T, H].
      size: the number of queries, and of keys, in a tile.
      padding: a bool array [T] that is true at padding; None: no padding.
    """
    z = np.asarray(query, np.float64) @ np.asarray(key, np.float64).T / math.sqrt(query.shape[-1])
    T = len(z)
    spent = np.where(np.tri(T, k=-1, dtype=bool), np.logaddexp(0, z), 0) / math.log(2)
    real = np.ones(T, bool) if padding is None else ~padding
    kept = reachable = 0
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        reachable += start // size + 1
        for tile_start in range(start, -1, -size):
            left = -spent[rows, tile_start + size :].sum(1)[real[rows]]
            if tile_start < start and (left.size == 0 or left.max() < threshold):
                break
            kept += 1
    return kept / reachable


def test_skipping_is_exact_to_the_threshold_and_counts_its_tiles():
    query, key, value = Stick(T=250, N=4, K=2).arrays()
    exact, _ = attend(query, key, value, **REFERENCE)
    for threshold in (-8.0, -24.0):
        options = SKIP | {"skip_below": threshold}
        out, rem, stats = attend(query, key, value, **options, return_stats=True)
        assert np.abs(out - exact).max() <= 2**threshold * np.abs(value).max() + 2e-6
        assert (stats.log_rem[:, 100:] < threshold * math.log(2)).all() and (rem[:, 100:] < 2**threshold).all()
        for head in range(2):
            # Query heads 2 * head and 2 * head + 1 share key head `head`: a tile is kept if either of them needs it.
            one = [kept_tiles(query[0, :, n], key[0, :, head], threshold, 16) for n in (2 * head, 2 * head + 1)]
            assert max(one) - 1e-6 <= stats.kept[0, head] <= min(1, sum(one))
            assert stats.kept[0, head] < 0.6


@pytest.mark.parametrize("padding", [0, 25])
def test_the_tiles_kept_are_those_needed(padding):
    case = Stick(T=150, N=1, std=2.0, segments=(150 - padding, -padding) if padding else None)
    query, key, value = case.arrays()
    *_, stats = attend(query, key, value, **case.options(), **SKIP, return_stats=True)
    rows = np.arange(150) >= 150 - padding
    # Tiles that contain only padding are not counted at all; half of tile 7 is padding.
    real = 150 - padding
    wanted = kept_tiles(query[0, :real, 0], key[0, :real, 0], -24, 16, rows[:real])
    np.testing.assert_allclose(stats.kept, wanted, rtol=1e-6)
    assert wanted < 0.6


def test_skipped_keys_are_never_read():
    query, key, value = Stick(T=200).arrays()
    key, value = (x.at[:, :16].set(jnp.nan) for x in (key, value))

    def late(skip_below, *arrays):
        options = SKIP | {"skip_below": skip_below}
        out, rem = stick_breaking_attention(*arrays, **options, query_offset=120)
        return (out**2).sum() + rem.sum()

    arrays = (query[:, 120:], key, value)
    run = jax.jit(jax.value_and_grad(partial(late, -24.0), (0, 1, 2)), compiler_options=QUICK)
    value, gradients = run(*arrays)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    assert (gradients[1][:, :16] == 0).all() and (gradients[2][:, :16] == 0).all()
    assert np.isnan(jax.jit(partial(late, None), compiler_options=QUICK)(*arrays))


def test_gradients_under_skipping_are_close_to_exact():
    case = Stick(T=200, N=4, K=2)
    check(case, SKIP)
    *_, stats = attend(*case.arrays(), **SKIP, return_stats=True)
    assert (stats.kept < 0.7).all()


def test_every_head_skips_for_itself():
    query, key, value = Stick(T=200).arrays()
    query, key = (x.at[..., 0].set(1) for x in (query, key))
    query = query.at[:, :, 1, 0].set(-12 * math.sqrt(8))
    *_, stats = attend(query, key, value, **SKIP, return_stats=True)
    assert stats.kept[0, 0] < 0.5 and stats.kept[0, 1] == 1


def test_without_a_threshold_every_tile_is_kept():
    for options in STICK_IMPLEMENTATIONS.values():
        if "skip_below" not in options:
            *_, stats = attend(*STICK["plain"].arrays(), return_stats=True, **options)
            assert isinstance(stats, Stats) and stats.kept.shape == (2, 2) and (stats.kept == 1).all()


def test_the_share_of_all_tiles_is_exactly_one():
    """XLA turns a division by a constant into a product, which would give 0.99999994 for 55 of 55 tiles."""
    n = np.arange(1, 300, dtype=np.float32)
    rounded = n[n * (1 / n) != 1]
    assert len(rounded) >= 10
    for total in (0, *rounded[:10].astype(int).tolist()):
        assert float(jax.jit(partial(share_of, total=total))(jnp.int32(total))) == 1
    assert float(jax.jit(partial(share_of, total=55))(jnp.int32(19))) == pytest.approx(19 / 55)


@pytest.mark.parametrize("S", [4096, 4099])
def test_a_decode_step_copies_no_cache(S):
    """A decode step reads only the last key tiles: it has no temporary array as large as the keys of one head."""
    query, cache = (jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32) for length in (1, S))
    step = partial(stick_breaking_attention, implementation="xla", skip_below=-24.0, query_offset=S - 1)
    memory = jax.jit(step).lower(query, cache, cache).compile().memory_analysis()
    assert memory.temp_size_in_bytes < S * 32 * 4


@pytest.mark.parametrize("S", [50, *(pytest.param(S, marks=pytest.mark.exhaustive) for S in (48, 63))])
def test_the_last_key_tile_may_be_partly_empty(S):
    """Keys that two key tiles read count once, in the results and in the gradients."""
    check(Stick(T=5, S=S, B=2, N=4, K=2), SKIP | {"skip_below": -1000.0})
