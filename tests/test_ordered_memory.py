"""Ordered Memory: equality with the original code, derivatives, padding, induced trees, and training runs."""

import dataclasses
import shutil
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FORWARD, assert_close

from stickjax import Config, DataConfig
from stickjax.config import OrderedMemoryConfig
from stickjax.models.families import family_of
from stickjax.models.ordered_memory import Encoder
from stickjax.models.ordered_memory.cell import reachable, restricted_softmax
from stickjax.models.ordered_memory.compose import Masks, Weights, compose
from stickjax.models.ordered_memory.parse import induced_tree, tree_of_depths
from stickjax.training.loop import fit
from stickjax.training.metrics import read_metrics

ORACLE = Path(__file__).parent / "oracles" / "ordered_memory" / "encoder.npz"
SMALL = OrderedMemoryConfig(V=12, D=6, H=5, N=3, classes=7)


def init(config, key):
    return jax.jit(partial(family_of(config).init, config))(key)


@cache
def original():
    """Return our encoder with the weights of the original code, and four stored arrays of the original code.

    The arrays are the input x [B,T,D], the token mask [B,T], the outputs, and the probabilities p [B,T,N] of the N
    memory slots.
    """
    with np.load(ORACLE, allow_pickle=False) as arrays:
        a = dict(arrays)
    p = {name.removeprefix("param/OM_forward."): a[name] for name in a if name.startswith("param/")}
    encoder = jax.jit(partial(Encoder, OrderedMemoryConfig(D=10, H=12, N=4)))(jax.random.key(0))
    of, cell = encoder.distribution, encoder.cell
    for module, name, value in (
        (encoder, "w_in", p["input_projection.0.weight"].T), (encoder, "in_bias", p["input_projection.0.bias"]),
        (encoder.norm, "scale", p["activation.weight"]), (encoder.norm, "bias", p["activation.bias"]),
        (of, "query", p["distribution.query.1.weight"].T), (of, "query_bias", p["distribution.query.1.bias"]),
        (of.query_norm, "scale", p["distribution.query.2.weight"]),
        (of.query_norm, "bias", p["distribution.query.2.bias"]),
        (of, "key", p["distribution.key.1.weight"].T), (of, "key_bias", p["distribution.key.1.bias"]),
        (of.key_norm, "scale", p["distribution.key.2.weight"]), (of.key_norm, "bias", p["distribution.key.2.bias"]),
        (of, "weight", p["distribution.beta.2.weight"].T), (of, "bias", p["distribution.beta.2.bias"]),
        (cell, "w_in", p["cell.input_t.1.weight"].T), (cell, "in_bias", p["cell.input_t.1.bias"]),
        (cell, "w_out", p["cell.input_t.4.weight"].T), (cell, "out_bias", p["cell.input_t.4.bias"]),
    ):  # fmt: skip
        assert getattr(module, name).shape == value.shape, name
        getattr(module, name)[...] = jnp.asarray(value)
    return encoder, a["x"].swapaxes(0, 1), a["mask"].T, a["out"], a["probs"].swapaxes(0, 1)


def test_the_numbers_of_the_original():
    """The batch has three rows: one without padding, one padded on the right, and one padded on the left."""
    encoder, x, mask, out, p = original()
    found = encoder(jnp.asarray(x), jnp.asarray(mask), 4)
    assert_close(found.p, p, 1e-5, "p")
    index = mask.sum(1) - 1  # the original reads the output at the length - 1, also in the row padded on the left
    assert_close(found.output[jnp.arange(3), index], out, 1e-5, "output")


def test_padding_on_the_right_changes_nothing_and_later_tokens_change_no_earlier_output():
    encoder, x, *_ = original()
    x = jnp.asarray(x)
    whole = encoder(x, jnp.ones(x.shape[:2], bool), 4)
    short = encoder(x.at[:, 5:].set(1e3), jnp.arange(8)[None] < jnp.array([[5]] * 3), 4)
    np.testing.assert_array_equal(short.output[:, :5], whole.output[:, :5])
    assert not short.output[:, 5:].any() and not short.p[:, 5:].any()


def test_rows_do_not_depend_on_their_batch():
    """A slot that one row uses is computed for all rows, but must not change the rows that do not use it."""
    encoder, x, mask, *_ = original()
    together = encoder(jnp.asarray(x), jnp.asarray(mask), 4)
    for b in range(len(x)):
        alone = encoder(jnp.asarray(x[b : b + 1]), jnp.asarray(mask[b : b + 1]), 4)
        assert_close(alone.output[0], together.output[b], FORWARD["float32"])


@jax.jit
def total(inputs, masks, cotangent):
    """Return the sum of cotangent * compose(..). All arguments are arrays, so each structure is compiled once."""
    return (compose(*inputs, masks) * cotangent).sum()


slopes = jax.jit(jax.grad(total))


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("lowest", [0, 2, 4])
def test_the_derivative_of_compose(dropout, lowest):
    """The handwritten derivative agrees with finite differences in float64, also if the lowest slots have weight 0."""
    N, B, H = 4, 3, 2
    with jax.enable_x64(True):
        rng = np.random.default_rng(lowest)
        draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
        weights = Weights(draw(2 * H, 4 * H), draw(4 * H), draw(4 * H, 4 * H), draw(4 * H), 1 + draw(H), draw(H))
        share = np.sort(rng.random((N, B)), axis=0)
        share[:lowest] = 0
        masks = None
        if dropout:
            keep = lambda *shape: rng.random(shape) > 0.3  # noqa: E731
            masks = Masks(keep(N, B, 2 * H), keep(N, B, 4 * H), np.float64(0.3))
        inputs = weights, draw(B, H), draw(N, B, H), share
        cotangent = draw(N, B, H)
        gradients = jax.device_get(slopes(inputs, masks, cotangent))
        for (path, g), x in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(inputs), strict=True):
            for index in list(np.ndindex(x.shape))[:: max(1, x.size // 7)]:
                if path[0].idx == 3 and index[0] < lowest:
                    continue  # a share of 0 is a threshold: the slot is not computed
                changed = []
                for step in (1e-6, -1e-6):
                    moved = x.copy()
                    moved[index] += step
                    other = jax.tree.map(lambda leaf, x=x, moved=moved: moved if leaf is x else leaf, inputs)
                    changed.append(float(total(other, masks, cotangent)))
                expected = (changed[0] - changed[1]) / 2e-6
                np.testing.assert_allclose(g[index], expected, rtol=1e-6, atol=1e-7, err_msg=f"{path} {index}")


def test_the_derivative_of_the_encoder_in_float64():
    """For sentences of different lengths, a directional derivative of a loss agrees with finite differences."""
    with jax.enable_x64(True):
        config = dataclasses.replace(SMALL, evaluation_N=4)
        model = jax.tree.map(lambda x: x.astype(jnp.float64), init(config, jax.random.key(1)))
        model.config = dataclasses.replace(config)
        batch = {
            "left": jnp.array([[3, 4, 5, 6], [7, 8, 0, 0]]), "right": jnp.array([[5, 0, 0, 0], [9, 10, 11, 3]]),
            "label": jnp.array([1, 6]),
        }  # fmt: skip
        encoder, x = model.encoder, jax.random.normal(jax.random.key(2), (2, 4, 6), jnp.float64)
        object.__setattr__(config, "dtype", "float64")  # beyond the types that a config file may name
        encoder.config = encoder.distribution.config = encoder.cell.config = config
        mask = batch["left"] != 0
        value = jax.jit(lambda m, x: (m(x, mask, 3).output ** 2).sum())
        gradients = jax.jit(jax.grad(value, argnums=(0, 1)))(encoder, x)
        direction = jax.tree.map(lambda g: jnp.sign(g) * (1 + jnp.abs(g)) ** 0, gradients)
        moved = [
            value(*jax.tree.map(lambda a, d, s=s: a + s * d, (encoder, x), direction)) for s in (1e-6, -1e-6)
        ]  # fmt: skip
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradients, direction)))
        np.testing.assert_allclose((moved[0] - moved[1]) / 2e-6, slope, rtol=1e-7)


def test_the_distribution_is_finite_for_saturated_logits():
    beta = jnp.array([[200.0, -200.0, 100.0], [-200.0, 200.0, 0.0]])
    c = reachable(jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    p, pull = jax.vjp(restricted_softmax, beta, c)
    np.testing.assert_allclose(p, [[1, 0, 0], [0, 1, 0]], atol=1e-30)
    assert all(np.isfinite(x).all() for x in pull(jnp.ones_like(p)))


def test_more_slots_at_evaluation_hold_deeper_sentences():
    """Evaluation uses `evaluation_N` memory slots, and training uses `N`; both have the same parameters."""
    family, wide = family_of(SMALL), dataclasses.replace(SMALL, evaluation_N=9)
    narrow_model, model = (init(c, jax.random.key(0)) for c in (SMALL, wide))
    batch = {"left": jnp.array([[3, 4, 5, 6, 7, 8]]), "right": jnp.array([[3, 4, 5, 6, 7, 8]])}
    shape = lambda *inputs: jax.eval_shape(family.apply, *inputs).p.shape  # noqa: E731
    assert shape(model, batch) == (2, 1, 6, 9)
    assert shape(model, batch, jax.random.key(0)) == shape(narrow_model, batch) == (2, 1, 6, 3)
    with pytest.raises(ValueError, match="evaluation_N=2 must be at least N=3, or 0"):
        OrderedMemoryConfig(N=3, evaluation_N=2)


def test_dropout_is_drawn_by_the_key_and_has_the_given_rate():
    rates = dict(cell_dropout=0.3, memory_dropout=0.3, input_dropout=0.3, output_dropout=0.3)
    config, family = dataclasses.replace(SMALL, **rates), family_of(SMALL)
    model = init(config, jax.random.key(0))
    batch = {"left": jnp.array([[3, 4, 5]]), "right": jnp.array([[6, 7, 0]])}
    run = jax.jit(lambda key: family.apply(model, batch, key).logits)
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert jnp.abs(run(jax.random.key(1)) - run(jax.random.key(2))).max() > 1e-3
    mean = jnp.mean(jnp.stack([run(jax.random.key(i)) for i in range(100)]))
    assert jnp.isfinite(mean)


@pytest.mark.parametrize("directions", [1, 2])
def test_a_sentence_that_is_read_from_both_ends(directions):
    config = OrderedMemoryConfig(
        V=12, D=6, H=5, N=3, classes=3, sentences=1, hidden=False, directions=directions
    )  # fmt: skip
    family = family_of(config)
    model = init(config, jax.random.key(0))
    tokens = jnp.array([[3, 4, 5, 0], [6, 7, 8, 9]])
    logits = family.apply(model, {"tokens": tokens}).logits
    assert logits.shape == (2, 3)
    assert_close(family.apply(model, {"tokens": tokens[:1, :3]}).logits, logits[:1], FORWARD["float32"])


def test_trees_of_depths():
    assert tree_of_depths([5]) == 0
    assert tree_of_depths([5, 4]) == (0, 1)
    assert tree_of_depths([5, 4, 5]) == ((0, 1), 2)
    assert tree_of_depths([5, 4, 3, 4, 5]) == (((0, (1, 2)), 3), 4)
    p = np.eye(5)[[0, 3, 2, 3, 4]]  # the first row does not count: the first token uses the highest slot
    assert induced_tree(p) == (((0, (1, 2)), 3), 4)


CONFIGS = {
    "pairs": Config(SMALL, DataConfig(source="logic", examples=3000, T=40, B=4)),
    "sentences": Config(
        OrderedMemoryConfig(D=6, H=5, N=3, sentences=1, hidden=False),
        DataConfig(source="listops", examples=500, T=20, B=4),
    ),
}


# A curriculum begins with short sentences, so all batches have one width: each further width is compiled.
CONFIGS = {
    name: config.replace(
        {"train.steps": 2, "train.log_every": 1, "train.checkpoint_every": 1, "train.keep": 9, "optim.eps": 1e-3}
        | {"data.curriculum": 50}
    )  # with a small epsilon, Adam enlarges the rounding of gradients that are nearly zero
    for name, config in CONFIGS.items()
}
# `make test` trains on pairs here. It trains on single sentences in tests/test_validation.py.
EXHAUSTIVE = {
    "test_a_run_is_the_same_on_two_devices": lambda name: name != "pairs",
    "test_a_run_is_the_same_after_a_resume": lambda name: name != "pairs",
}


def losses(run: str | Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(run)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that returns the run folder of a config on one device."""

    @cache
    def train(name) -> Path:
        run = tmp_path_factory.mktemp(name) / "run"
        fit(CONFIGS[name], str(run), quiet=True)
        return run

    return train


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_is_the_same_on_two_devices(name, trained, tmp_path):
    fit(CONFIGS[name].replace({"mesh.data": 2}), str(tmp_path / "run"), quiet=True)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(trained(name)), rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_is_the_same_after_a_resume(name, trained, tmp_path):
    run = str(shutil.copytree(trained(name), tmp_path / "run"))
    before = losses(run)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")  # so the run continues after step 1
    fit(CONFIGS[name], run, quiet=True)
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    assert len(before) == 2 and losses(run) == before
