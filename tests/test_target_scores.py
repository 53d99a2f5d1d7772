"""Test the scores of targets. If they are computed in pieces, no array has the logits of all positions.

`tests/test_sharding.py` compares pieces on a mesh with the whole on one device.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FORWARD, GRADIENT, assert_close

from stickjax.config import ExpertsConfig, ModelConfig, SutConfig
from stickjax.evaluation.held_out import row_scores
from stickjax.models import vocabulary
from stickjax.models.families import family_of

B, T, V = 3, 13, 97
DECODER = ModelConfig(V=V, D=16, L=1, N=2, K=1, H=8, F=16, logits_z_weight=0.1)
SUT = SutConfig(V=V, D=16, H=8, F=16, L=2, experts=ExpertsConfig(E=2, k=2), attention_experts=ExpertsConfig(E=2, k=2))
MODELS = {"tied": DECODER, "untied": dataclasses.replace(DECODER, tied=False, logits_scaling=2.0), "universal": SUT}


def batch():
    tokens = np.random.default_rng(0).integers(0, V, (B, T + 1))
    mask = np.random.default_rng(1).random((B, T)) < 0.7
    return {"tokens": jnp.array(tokens[:, :-1]), "targets": jnp.array(tokens[:, 1:]), "loss_mask": jnp.array(mask)}


def loss_and_gradients(model):
    """Return a jitted program that computes the loss and its gradients, for the batch of `batch`."""
    loss = family_of(model.config).loss
    program = jax.jit(jax.value_and_grad(lambda model, batch: loss(model, batch, None), has_aux=True))
    return program.lower(model, batch()).compile()


@pytest.mark.parametrize("name", MODELS)
def test_pieces_have_the_loss_and_gradients_of_the_whole(name, monkeypatch):
    model = family_of(MODELS[name]).init(MODELS[name], jax.random.key(0))
    (whole, metrics), gradients = loss_and_gradients(model)(model, batch())
    for limit, positions in ((B * V * 4, 4), (1, 1)):  # 13 positions are 4 pieces with padding, or 13 pieces
        monkeypatch.setattr(vocabulary, "LARGEST_LOGITS", limit)
        program = loss_and_gradients(model)
        shapes = [tuple(map(int, s.split(","))) for s in set(re.findall(r"f32\[([\d,]+)\]", program.as_text()))]
        assert max(np.prod(s) for s in shapes if V in s and 16 not in s) == B * positions * V
        (loss, own), parts = program(model, batch())
        assert_close(loss, whole, FORWARD["float32"])
        jax.tree.map(lambda a, b: assert_close(a, b, FORWARD["float32"]), own, metrics)
        jax.tree.map(lambda a, b: assert_close(a, b, GRADIENT["float32"]), parts, gradients)


def test_the_loss_is_the_mean_over_the_targets_that_count():
    model = family_of(DECODER).init(DECODER, jax.random.key(0))
    (loss, metrics), _ = loss_and_gradients(model)(model, batch())
    logits = np.asarray(model(batch()["tokens"]).logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, np.asarray(batch()["targets"])[..., None], -1)[..., 0]
    mask = np.asarray(batch()["loss_mask"])
    assert_close(metrics["loss"], nll[mask].mean(), 1e-6)
    assert_close(metrics["logits_z"], (log_z[mask] ** 2).mean(), 1e-6)
    assert_close(loss, nll[mask].mean() + 0.1 * (log_z[mask] ** 2).mean(), 1e-6)


def test_texts_are_scored_in_pieces(monkeypatch):
    model = family_of(DECODER).init(DECODER, jax.random.key(0))
    windows, mask = np.random.default_rng(0).integers(0, V, (5, T + 1), np.int32), np.zeros((5, T), bool)
    logits = np.asarray(model(jnp.array(windows[:, :-1])).logits)
    mask[:, -1] = True
    windows[:, -1] = logits[:, -1].argmin(-1)
    windows[2, -1] = logits[2, -1].argmax()
    nll, greedy = row_scores(model, windows, mask, B=2)
    monkeypatch.setattr(vocabulary, "LARGEST_LOGITS", 2 * V * 4)
    jax.clear_caches()
    pieces, same = row_scores(model, windows, mask, B=2)
    assert_close(pieces, nll, FORWARD["float32"])
    assert same.tolist() == greedy.tolist() == [False, False, True, False, False]


def test_logits_that_are_equal_infinite_or_not_a_number():
    """Of equal logits, the smallest id is the most likely. If a logit is not a number, no id is the most likely."""
    logits = jnp.array([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [-jnp.inf, 0.0, -jnp.inf], [jnp.nan, 1.0, 0.0]]])
    scores = vocabulary.target_scores(logits, jnp.array([[0, 1, 1, 1]]))
    assert scores.is_most_likely.tolist() == [[True, False, True, False]]
    assert scores.nll[0, 2] == 0 and jnp.isnan(scores.nll[0, 3])
    near = vocabulary.target_scores(jnp.array([[[1.0, 1 + 2.0**-23, 0.0]]]), jnp.array([[0]]))
    assert not near.is_most_likely.item()
    far = vocabulary.target_scores(jnp.array([[[1e4, -1e4]]]), jnp.array([[1]]))
    assert far.nll.item() == 2e4 and far.log_z.item() == 1e4
