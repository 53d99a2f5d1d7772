"""Training steps on several devices equal steps on one device, also if a run changes its mesh.

The tests compare losses, statistics, gradients and parameters.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close

from stickjax.config import Config, ExpertsConfig, MeshConfig, ModelConfig
from stickjax.config.decoder import MODULE_ROUTER, MODULES
from stickjax.models import vocabulary
from stickjax.models.parameters import shardings, specs
from stickjax.parallel.mesh import make_mesh, shard_batch
from stickjax.train import fit
from stickjax.training.metrics import read_metrics
from stickjax.training.step import init_state, make_step

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
SIZES = dict(V=32, D=16, L=2, N=4, K=2, H=4, F=24)
LOSSES = dict(switch_weight=0.1, z_weight=0.1, mi_weight=0.1)
MODELS = {
    "dense": ModelConfig(**SIZES, head_norm=True, remainder="bias", logits_z_weight=0.1),
    "experts": ModelConfig(
        **SIZES, experts=ExpertsConfig(4, 2, **LOSSES), tied=False, remat="full", remainder="value", window=11
    ),
    "heads": ModelConfig(**SIZES, attention_experts=ExpertsConfig(3, bias_rate=0.01, **LOSSES), attend_current=True),
    "softmax": ModelConfig(**SIZES, attention="softmax", activation="gelu", query_key_norm="head"),
    "modules": ModelConfig(
        **SIZES | MODULES,
        key_value="biased",
        init_std=0.4,
        experts=ExpertsConfig(4, 2, hidden=8, **MODULE_ROUTER, **LOSSES),
        attention_experts=ExpertsConfig(3, hidden=8, **MODULE_ROUTER, **LOSSES),
    ),
    "shared": ModelConfig(
        **SIZES, experts=ExpertsConfig(4, 2, shared=8, **LOSSES), query_key_norm="all", query_key_value_bias=True
    ),
}
STRATEGIES = [dict(data=4), dict(fsdp=4), dict(context=4), dict(tensor=2), dict(expert=4)]
CASES = [
    *(("dense", mesh) for mesh in STRATEGIES if "expert" not in mesh),
    *(("experts", mesh) for mesh in STRATEGIES),
    ("dense", dict(fsdp=2, context=2, tensor=2)),
    ("dense", dict(data=2, fsdp=2, tensor=2)),
    ("dense", dict(fsdp=2, context=4)),
    ("softmax", dict(fsdp=4, tensor=2)),
    ("experts", dict(fsdp=2, expert=2, tensor=2)),
    ("experts", dict(expert=2, context=4)),
    ("heads", dict(data=2, fsdp=2, context=2)),
    ("heads", dict(fsdp=2, context=2, tensor=2)),
    ("modules", dict(data=2, fsdp=2, tensor=2)),
    ("shared", dict(tensor=2)),
]
STEPS = 20
# Other cases divide the same models along the axes of these meshes, and `test_accumulation_on_a_mesh` has "heads".
EXHAUSTIVE = {
    "test_steps_are_those_of_one_device": lambda name, mesh: (
        (name == "dense" and mesh != dict(fsdp=2, context=2, tensor=2))
        or (name == "experts" and len(mesh) == 1)
        or name == "heads"
    )
}


def experiment(model, **mesh):
    config = Config(model=model, mesh=MeshConfig(**mesh))
    return config.replace({"data.T": 16, "data.B": 8, "train.steps": STEPS, "optim.peak_lr": 0.01})


def mesh_of(config):
    return make_mesh(config)


def batches(config):
    """Yield one batch of packed documents for each training step.

    One sequence has far fewer targets than the others, so that a mean per device would be wrong.
    """
    rng = np.random.default_rng(0)
    for _ in range(config.train.steps):
        tokens = rng.integers(0, config.model.vocabulary, (config.data.B, config.data.T + 1), np.int32)
        mask = rng.random((config.data.B, config.data.T)) < 0.8
        mask[3, 2:] = False
        segments = np.cumsum(rng.random(mask.shape) < 0.2, axis=1, dtype=np.int32)
        yield dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=segments, loss_mask=mask)


def trained(config):
    """Train on `batches(config)`; return the metrics of every step, the first step's gradients, and the last state.

    The gradients are read from Adam's first moment, so each is the true gradient times the same constant.
    """
    mesh = mesh_of(config)
    state, places = init_state(config, jax.random.key(0)), None
    if mesh is not None:
        places = shardings(mesh, state), None
        state = jax.device_put(state, places[0])
    step, metrics, first = jax.jit(make_step(config, mesh), out_shardings=places), [], None
    for batch in batches(config):
        state, row = step(state, shard_batch(mesh, batch, config.train.accumulate))
        metrics.append(jax.device_get(row))
        if first is None:  # Adam's first moment started at zero, so it is a multiple of the gradients
            first = optax.tree.get(state.opt_state, "mu")
    return metrics, first, state


@functools.cache
def alone(config):
    return trained(config)


def assert_same(config, expected):
    """Train with `config` and assert that the result equals `expected`, which is a result of `trained`.

    It compares the metrics of all steps, the gradients of the first step and, less strictly, the last parameters.
    """
    (metrics, first, state), (wanted_metrics, wanted_first, wanted_state) = trained(config), expected
    for i, (row, wanted) in enumerate(zip(metrics, wanted_metrics, strict=True)):
        assert row.keys() == wanted.keys()
        for name in row:  # some metrics drift more: mutual information is a small difference of large sums
            rtol = 1e-5 if i < 3 or name == "loss" else 1e-4
            np.testing.assert_allclose(row[name], wanted[name], rtol, err_msg=f"{name}, step {i + 1}")
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(wanted_first), strict=True):
        if np.any(b):
            assert_close(a, b, 1e-5)
        else:
            assert not np.any(a)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted_state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "mesh"), CASES, ids=["-".join([name, *(f"{k}{v}" for k, v in mesh.items())]) for name, mesh in CASES]
)
def test_steps_are_those_of_one_device(name, mesh, monkeypatch):
    expected = alone(experiment(MODELS[name]))
    if name == "dense":  # on the mesh, the logits are computed in pieces
        monkeypatch.setattr(vocabulary, "LARGEST_LOGITS", 100)
    assert_same(experiment(MODELS[name], **mesh), expected)


def test_accumulation_on_a_mesh():
    """A step with microbatches gives the same metrics and parameters on a mesh as on one device.

    The router losses are means over a microbatch, so the run on one device uses the same microbatches.
    """
    config = experiment(dataclasses.replace(MODELS["heads"], L=1)).replace({"train.accumulate": 2, "train.steps": 3})
    assert_same(config.replace({"mesh.fsdp": 2, "mesh.context": 2, "mesh.tensor": 2}), alone(config))


def test_parameters_and_optimizer_state_are_divided():
    config = experiment(MODELS["heads"], fsdp=4)
    state = init_state(config, jax.random.key(0))
    state = jax.device_put(state, shardings(mesh_of(config), state))
    whole, part = 0, 0
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        whole, part = whole + leaf.nbytes, part + leaf.addressable_shards[0].data.nbytes
    assert part < 0.3 * whole  # a quarter, plus the vectors, which are not divided


def test_a_matrix_without_a_partition_is_an_error():
    with pytest.raises(ValueError, match="'unheard_of' has 2 axes, but it is outside of a Flax module"):
        specs({"unheard_of": jnp.ones((2, 2))})


def test_a_run_goes_on_on_another_mesh(tmp_path):
    """A run on one device, continued on eight and then on one, has the losses of a run on one device."""
    text = Path(__file__).parent / "ptx"
    config = experiment(dataclasses.replace(MODELS["softmax"], V=258)).replace(
        {"data.source": "text", "data.path": str(text), "train.steps": 4, "train.log_every": 1}
    )
    fit(config, str(tmp_path / "alone"), quiet=True)
    eight = config.replace({"mesh.fsdp": -1, "mesh.tensor": 2})
    for where, steps in ((config, 1), (eight, 3), (config, 4)):
        fit(where.replace({"train.steps": steps}), str(tmp_path / "moved"), quiet=True)
    alone, moved = (read_metrics(tmp_path / name) for name in ("alone", "moved"))
    assert [row["step"] for row in moved] == [1, 2, 3, 4]
    np.testing.assert_allclose([row["loss"] for row in moved], [row["loss"] for row in alone], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.data": 3}, "B / accumulate = 8 sequences must be a multiple of the mesh size data=3; B=6 would do"),
        ({"mesh.data": 4, "mesh.fsdp": 4, "data.B": 4}, "the mesh data=4 x fsdp=4 needs 16 devices, but there are 8"),
        ({"mesh.data": 2, "mesh.expert": 2, "data.B": 2}, "multiple of the mesh size data=2 x expert=2; B=4 would do"),
        ({"mesh.data": -1, "mesh.fsdp": 3}, "data=-1: the number of devices, 8, must be a multiple of 3, the product"),
        ({"mesh.fsdp": 4, "model.D": 18}, "D=18 must be a multiple of fsdp=4; D=20 would do"),
        ({"mesh.tensor": 2, "model.V": 257}, "V=257 must be a multiple of tensor=2; V=258 would do"),
        ({"mesh.tensor": 4}, "K=2 must be a multiple of tensor=4; K=4 would do"),
        ({"mesh.context": 8, "data.T": 24}, "T=24 must be a multiple of 2 . context with context=8, .* T=32 would do"),
        ({"mesh.expert": 8}, "E=4 must be a multiple of expert=8; E=8 would do"),
        ({"mesh.expert": 2, "model.experts.E": 0, "model.experts.k": 0}, "axis expert=2 needs a model with experts"),
        ({"mesh.context": 2, "model.attention": "softmax"}, "context=2 needs attention='stick_breaking'"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "only one axis of the mesh may be -1, not data and fsdp"),
        ({"mesh.tensor": 0}, "tensor=0 must be at least 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_meshes_that_do_not_fit(changes, message):
    config = experiment(ModelConfig(**SIZES, experts=ExpertsConfig(E=4, k=2)))
    with pytest.raises(ValueError, match=message):
        make_mesh(config.replace(changes))


def test_sizes_of_a_mesh():
    config = experiment(MODELS["experts"])
    assert make_mesh(config) is None
    mesh = make_mesh(config.replace({"mesh.data": -1, "mesh.expert": 2}), jax.devices()[:4])
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == {"data": 2, "expert": 2}
