"""Test that a model with muP multipliers can be exported as a model type without multipliers.

The export multiplies parameters by constants instead, so that the logits stay the same.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

import stickjax
from stickjax.config import ModelConfig
from stickjax.convert import export, main
from stickjax.models.transformer import init
from stickjax.storage.hugging_face.configs import to_config_json
from stickjax.storage.hugging_face.folding import folded
from stickjax.storage.run_folder import save

SIZES = dict(V=37, D=16, L=2, N=4, K=2, H=4, F=24, attention="stick_breaking", implementation="reference")
MUP = dict(m_width=3.0, m_emb=12.0, m_res=0.22, attention_scale=1 / 4)
LOGITS = jax.jit(lambda model: model(TOKENS).logits)
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 11))


def random_model(**changes):
    """Return a model of SIZES with `changes`, which are fields of ModelConfig.

    Every parameter is random, so that every multiplier changes the logits.
    """
    model = init(ModelConfig(**SIZES | changes), jax.random.key(0))
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize(
    "changes",
    [
        dict(tied=False, query_key_value_bias=True, attend_current=True),
        dict(tied=True, query_key_norm="head", query_key_value_bias=True, logits_scaling=0.7),
    ],
    ids=str,
)
def test_logits_are_the_same_after_the_multipliers_are_folded(changes, tmp_path):
    model = random_model(**MUP | changes)
    expected = LOGITS(model)
    export(model, str(tmp_path / "hf"), type="stickbreaking_attn")
    loaded = stickjax.load(tmp_path / "hf", changes={"model.implementation": "reference"})
    c = loaded.config.model
    assert (c.m_emb, c.m_res, c.scale, c.logits_scaling) == (1, 1, 0.5, 1)
    assert_close(LOGITS(loaded.model), expected, 1e-5)
    export(loaded.model, str(tmp_path / "again"), type="stickbreaking_attn")
    leaves = zip(*(jax.tree.leaves(x) for x in (loaded.model, stickjax.load(tmp_path / "again").model)), strict=True)
    assert all((a == b).all() for a, b in leaves)


def test_in_16_bits_only_powers_of_two_are_exact(tmp_path, capsys):
    exact = dict(m_emb=16.0, m_res=0.25, attention_scale=1 / 4, m_width=2.0, param_dtype="bfloat16")
    model = random_model(**exact)
    export(model, str(tmp_path / "hf"), type="stickbreaking_attn")
    loaded = stickjax.load(tmp_path / "hf", changes={"model.dtype": "float32", "model.implementation": "reference"})
    assert loaded.model.embed.dtype == jnp.bfloat16
    assert_close(LOGITS(loaded.model), LOGITS(model), 1e-5)
    config = stickjax.Config(ModelConfig(**SIZES | MUP | dict(param_dtype="bfloat16")))
    config = config.replace({"data.tokenizer": "byte"})
    save(tmp_path / "run", random_model(**MUP | dict(param_dtype="bfloat16")), config)
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--type=stickbreaking_attn"]) == 1
    said = "cannot express this model: its multipliers m_emb, m_res, attention_scale and logits_scaling would be folded"
    error = capsys.readouterr().err
    assert said in error and "embed times 12 cannot always be stored exactly in bfloat16" in error
    assert not (tmp_path / "out").exists()
    loaded = stickjax.load(tmp_path / "run", changes={"model.param_dtype": "float32"})  # what the message proposes
    export(loaded, str(tmp_path / "out"), type="stickbreaking_attn")
    again = stickjax.load(tmp_path / "out", changes={"model.implementation": "reference"})
    assert_close(LOGITS(again.model), LOGITS(loaded.model), 1e-5)


def test_in_float16_no_multiplier_is_exact():
    """In float16, a multiplication by 1/4 can round: 2^-24, the smallest positive number, becomes 0."""
    message = "blocks/attention/output times 0.25 cannot always be stored exactly in float16"
    with pytest.raises(ValueError, match=message):
        folded(ModelConfig(**SIZES | dict(m_res=0.25, param_dtype="float16")))


def test_without_multipliers_no_parameter_is_changed():
    for H in range(1, 200):
        sizes = SIZES | dict(D=4 * H, H=H, param_dtype="bfloat16")
        for scale in (None, 1 / math.sqrt(H)):
            assert folded(ModelConfig(**sizes | dict(attention_scale=scale)))[1] == {}


def test_what_cannot_be_folded_is_refused():
    for changes, said in (
        (dict(remainder="value"), "'stickbreaking_attn' cannot express remainder='value'"),
        (dict(H=8), "'stickbreaking_attn' cannot express H=8"),
        (dict(final_norm_eps=1e-3), "cannot express final_norm_eps=0.001"),
    ):
        with pytest.raises(ValueError, match=said):
            to_config_json(ModelConfig(**SIZES | MUP | changes), 8, "stickbreaking_attn")
