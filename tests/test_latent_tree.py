"""The latent-tree model, compared with the original, and the properties of its likelihood and of its parts."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from flax import nnx

from stickjax.config.latent_tree import TreeConfig
from stickjax.models.families import family_of
from stickjax.models.latent_tree import apply, decode, init, loss, sentence_log_likelihood
from stickjax.models.latent_tree.chart import in_order
from stickjax.models.parameters import leaves_of, map_leaves

HERE = Path(__file__).parent


def drawn(config, scale=0.3):
    """Return a model with random parameters, also those that start at zero; NumPy draws them, nothing is compiled."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(rng.normal(leaf.names[-1] == "scale", scale, leaf.value.shape), leaf.value.dtype)

    return map_leaves(draw, jax.eval_shape(partial(init, config), jax.random.key(0)))


def in_float64(config):
    """Return a config whose computation and parameters are in float64, which users cannot choose."""
    for name in ("dtype", "param_dtype"):
        object.__setattr__(config, name, "float64")
    return config


@cache
def original(early_root):
    """Return the model with the original's weights, and the arrays of the original."""
    with np.load(HERE / "oracles" / "latent_tree" / "scan_model.npz", allow_pickle=False) as arrays:
        a = dict(arrays)
    p = {key.removeprefix("param/"): a[key] for key in a if key.startswith("param/")}
    config = in_float64(TreeConfig(V=17, V_target=10, H=8, depth=4, early_root=early_root))
    model = jax.eval_shape(partial(init, config), jax.random.key(0))
    encoder, decoder, H = model.encoder, model.decoder, 8
    rnn, om, expand = "encoder.rnn_encode.rnn.", "encoder.OM_forward.", "decoder.expand."
    both = lambda name: np.stack([p[rnn + name], p[rnn + name + "_reverse"]])  # noqa: E731
    linear = lambda module, weight, bias, name: {  # noqa: E731
        (module, weight): p[name + ".weight"].T, (module, bias): p[name + ".bias"]
    }  # fmt: skip
    norm = lambda module, name: {(module, "scale"): p[name + ".weight"], (module, "bias"): p[name + ".bias"]}  # noqa: E731
    cell, cell_bias = p[om + "cell.input_t.4.weight"].T, p[om + "cell.input_t.4.bias"]
    gates = lambda x: np.stack(
        [*np.moveaxis(x[..., : 3 * H].reshape(-1, H, 3), -1, 0), x[..., 3 * H :].reshape(-1, H)], 1
    )  # noqa: E731, E501
    distribution, attention = encoder.memory.distribution, decoder.attention
    weights = {
        (encoder, "embed"): p["encoder.embedding.weight"][:, :H],
        (encoder, "values"): p["encoder.embedding.weight"][:, H:],
        (encoder.gru, "input"): both("weight_ih_l0").swapaxes(1, 2),
        (encoder.gru, "input_bias"): both("bias_ih_l0"),
        (encoder.gru, "recurrent"): both("weight_hh_l0").swapaxes(1, 2),
        (encoder.gru, "recurrent_bias"): both("bias_hh_l0"),
        **linear(encoder.memory, "w_project", "project_bias", om + "input_projection.0"),
        **linear(encoder.memory, "w_in", "in_bias", om + "cell.input_t.1"),
        (encoder.memory, "w_out"): gates(cell),
        (encoder.memory, "out_bias"): gates(cell_bias)[0],
        **norm(encoder.memory.norm, om + "activation.0"),
        **linear(distribution, "query", "query_bias", om + "distribution.query.1"),
        **norm(distribution.query_norm, om + "distribution.query.2"),
        **linear(distribution, "key", "key_bias", om + "distribution.key.1"),
        **norm(distribution.key_norm, om + "distribution.key.2"),
        **linear(distribution, "weight", "bias", om + "distribution.beta.2"),
        **linear(decoder, "root", "root_bias", expand + "in_transform.0"),
        **linear(decoder, "w_in", "in_bias", expand + "cell.output_t.0"),
        **linear(decoder, "w_out", "out_bias", expand + "cell.output_t.3"),
        **linear(decoder, "leaf", "leaf_bias", expand + "leaf_transform.1"),
        (decoder, "unembed"): p[expand + "_output_transform.weight"],
        **norm(decoder.norm, "decoder.activation.0"),
        **linear(attention, "query", "query_bias", expand + "attn.query_t.1"),
        **norm(attention.query_norm, expand + "attn.query_t.2"),  # the original divides by sqrt(H) in float32
        **linear(attention, "key", "key_bias", expand + "attn.key_t.1"),
        **norm(attention.key_norm, expand + "attn.key_t.2"),
    }
    assert len(weights) == len(list(leaves_of(model)))
    for (module, leaf), value in weights.items():
        assert getattr(module, leaf).shape == value.shape, leaf
        rounded = H**0.5 / p[expand + "attn.factor"] if module is attention.query_norm else 1
        setattr(module, leaf, nnx.Param(jnp.asarray(value * rounded)))
    return model, a


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("i", range(5))
def test_the_numbers_of_the_original(i, x64):
    """In float64. Its source and target ids begin at 4; it reads the root of the tree before the last word."""
    model, a = original(early_root=True)
    source, target = (jnp.asarray(a[f"{name}/{i}"])[None] for name in ("source", "target"))
    logits = apply(model, {"source": source}).logits
    expected = a[f"node_word_log_prob/{i}"]
    assert_close(logits[0, in_order(4)], expected, 1e-10)
    np.testing.assert_allclose(sentence_log_likelihood(logits, target)[0], a[f"log_likelihood/{i}"], rtol=1e-10)
    np.testing.assert_array_equal(a["param/decoder.order"], in_order(4))
    right, _ = original(early_root=False)
    assert np.abs(apply(right, {"source": source}).logits - logits).max() > 0.01
