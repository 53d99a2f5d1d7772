"""Steps on several devices are those on one: losses, statistics, gradients, and runs that change the mesh."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from stickjax import sharding
from stickjax.config import Config, MeshConfig, ModelConfig
from stickjax.metrics import read_metrics
from stickjax.step import init_state, loss_and_metrics, make_step
from stickjax.train import fit

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
SIZES = dict(V=31, D=16, L=2, N=4, K=2, H=4, F=24)
LOSSES = dict(switch_weight=0.1, z_weight=0.1, mi_weight=0.1)
MODELS = {
    "dense": ModelConfig(**SIZES),
    "experts": ModelConfig(**SIZES, E=4, k=2, tied=False, remat="full", **LOSSES),
    "heads": ModelConfig(**SIZES, E=4, k=2, attention_experts=3, bias_rate=0.01, **LOSSES),
    "softmax": ModelConfig(**SIZES, attention="softmax", activation="gelu"),
}
CASES = [
    ("dense", dict(data=2, fsdp=4)),
    ("experts", dict(fsdp=4)),
    ("heads", dict(data=2, fsdp=2)),
    ("softmax", dict(data=4)),
]
STEPS = 3


def experiment(model, **mesh):
    config = Config(model=model, mesh=MeshConfig(**mesh))
    return config.replace({"data.T": 12, "data.B": 8, "train.steps": STEPS, "optim.peak_lr": 0.01})


def mesh_of(config):
    return sharding.make_mesh(config.mesh, D=config.model.D, rows=config.data.B // config.train.accumulate)


def batches(config):
    """Packed documents; one sequence counts less than the others."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(0, config.model.V, (config.data.B, config.data.T + 1), np.int32)
        mask = rng.random((config.data.B, config.data.T)) < 0.8
        mask[3, 2:] = False
        segments = np.cumsum(rng.random(mask.shape) < 0.2, axis=1, dtype=np.int32)
        yield dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=segments, loss_mask=mask)


def trained(config):
    """The metrics of every step, the gradients of the first, and the last state."""
    mesh = mesh_of(config)
    state, places = init_state(config, jax.random.key(0)), None
    if mesh is not None:
        places = sharding.shardings(mesh, state), None
        state = jax.device_put(state, places[0])
    step = jax.jit(make_step(config, mesh), out_shardings=places)

    def gradients(params, batch, key):
        return jax.grad(lambda p: loss_and_metrics(config, p, batch, key), has_aux=True)(params)

    metrics, first = [], None
    for batch in batches(config):
        whole, batch = batch, sharding.place(mesh, batch, config.train.accumulate)
        if first is None:
            at_once = sharding.place(mesh, whole)
            first = jax.jit(sharding.over(mesh, gradients))(state.params, at_once, jax.random.key(1))[0]
        state, row = step(state, batch)
        metrics.append(jax.device_get(row))
    return metrics, first, state


def assert_same(config, alone):
    (metrics, first, state), (expected, first_alone, state_alone) = trained(config), alone
    for row, wanted in zip(metrics, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name in row:
            np.testing.assert_allclose(row[name], wanted[name], rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(first_alone), strict=True):
        if np.any(b):
            assert_close(a, b, 1e-5)
        else:
            assert not np.any(a)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state_alone.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("name", "mesh"), CASES, ids=[name for name, _ in CASES])
def test_steps_are_those_of_one_device(name, mesh):
    assert_same(experiment(MODELS[name], **mesh), trained(experiment(MODELS[name])))


def test_accumulation_on_a_mesh():
    """The losses of the routers, means over a microbatch, are those of the same microbatches."""
    config = experiment(dataclasses.replace(MODELS["heads"], L=1)).replace({"train.accumulate": 2})
    assert_same(config.replace({"mesh.data": 2, "mesh.fsdp": 2}), trained(config))


def test_parameters_and_optimizer_state_are_divided():
    config = experiment(MODELS["heads"], fsdp=4)
    state = init_state(config, jax.random.key(0))
    state = jax.device_put(state, sharding.shardings(mesh_of(config), state))
    whole, part = 0, 0
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        whole, part = whole + leaf.nbytes, part + leaf.addressable_shards[0].data.nbytes
    assert part < 0.3 * whole  # a quarter, and the vectors


def test_a_matrix_without_a_partition_is_an_error():
    with pytest.raises(ValueError, match="no partition for 'unheard_of' with 2 axes"):
        sharding.specs({"unheard_of": jnp.ones((2, 2))})


def test_a_run_goes_on_on_another_mesh(tmp_path):
    """The last steps on one device, from a checkpoint of four; and the metrics of all are those of one device."""
    text = Path(__file__).parent
    config = experiment(dataclasses.replace(MODELS["heads"], V=257)).replace(
        {"data.source": "text", "data.path": str(text), "train.steps": 4, "train.log_every": 1}
    )
    fit(config, str(tmp_path / "alone"), quiet=True)
    divided = {"mesh.data": 2, "mesh.fsdp": -1, "train.steps": 2}
    fit(config.replace(divided), str(tmp_path / "moved"), quiet=True)
    fit(config, str(tmp_path / "moved"), quiet=True)
    alone, moved = (read_metrics(tmp_path / name) for name in ("alone", "moved"))
    assert [row["step"] for row in moved] == [1, 2, 3, 4]
    np.testing.assert_allclose([row["loss"] for row in moved], [row["loss"] for row in alone], rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "sizes", "message"),
    [
        (dict(data=3), dict(D=16, rows=8), "8 sequences .* multiple of data=3 x fsdp=1"),
        (dict(data=64), dict(D=16, rows=64), r"data=64 x fsdp=1 needs 64 devices, there are \d+"),
        (dict(fsdp=4), dict(D=18, rows=8), "D=18 must be a multiple of fsdp=4"),
        (dict(data=-1, fsdp=3), dict(D=18, rows=9), "fsdp=3 does not divide the 8 devices"),
    ],
)
def test_meshes_that_do_not_fit(mesh, sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(MeshConfig(**mesh), **sizes)


def test_sizes_of_a_mesh():
    with pytest.raises(ValueError, match="only one of data and fsdp may be -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="fsdp=0 must be at least 1"):
        MeshConfig(fsdp=0)
    assert sharding.make_mesh(MeshConfig(), D=3, rows=5) is None
    mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=2), D=16, rows=8)
    assert dict(mesh.shape) == {"data": jax.device_count() // 2, "fsdp": 2}
