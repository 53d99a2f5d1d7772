"""Parameters in bfloat16 or float16 train as well as parameters in float32.

The optimizer keeps a float32 copy of the parameters, the masters. Updates that are too small for the 16-bit type add up
in the masters.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close, assert_same_state

from stickjax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from stickjax.models.parameters import shardings
from stickjax.models.transformer import init
from stickjax.parallel.mesh import make_mesh, shard_batch
from stickjax.storage.checkpoints import Checkpoints, named_leaves
from stickjax.storage.run_folder import save
from stickjax.train import fit
from stickjax.training.optimizer import make_optimizer
from stickjax.training.step import init_state, make_step, with_params

RATE = 1e-5  # usual for fine-tuning; half a unit in the last place of a bfloat16 near 1 is 0.002


def config(dtype, **changes) -> Config:
    model = ModelConfig(V=257, D=16, L=1, N=2, K=1, H=8, F=16, attention="softmax", param_dtype=dtype)
    train = TrainConfig(steps=6, log_every=1, checkpoint_every=3)
    optim = OptimConfig(schedule="constant", peak_lr=RATE, weight_decay=0.0)
    return Config(model, DataConfig(source="text", path=__file__, T=16, B=4), optim, train).replace(changes)


def begin(config: Config, model=None):
    """Return the training state before the first step, with the parameters of `model` if it is given."""
    new = lambda: init_state(config, jax.random.key(0))  # noqa: E731
    return jax.jit(new if model is None else lambda: with_params(config, new(), model))()


def masters_of(state) -> dict:
    return named_leaves(optax.tree.get(state.opt_state, "masters"))


def batches(count=6):
    tokens = np.random.default_rng(0).integers(0, 257, (count, 4, 17), np.int32)
    for one in tokens:
        yield dict(tokens=one[:, :-1], targets=one[:, 1:], segment_ids=0 * one[:, 1:], loss_mask=one[:, 1:] >= 0)


@pytest.fixture(scope="module")
def published():
    """Return a float32 model that the tests fine-tune."""
    return jax.jit(lambda: init(config("float32").model, jax.random.key(1)))()


@pytest.fixture(scope="module")
def tuned(published):
    """Return a dict from float32 and bfloat16 to the state after six fine-tuning steps in this parameter type."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        state = begin(config(dtype), published)
        step = jax.jit(make_step(config(dtype)))
        for batch in batches():
            state, _ = step(state, batch)
        found[dtype] = state
    return found


def test_no_update_is_lost(published, tuned):
    """The masters of a bfloat16 model move as the parameters of a float32 model do.

    Only the rounding in the forward pass makes a difference.
    """
    begun, masters = named_leaves(published), masters_of(tuned["bfloat16"])
    assert masters.keys() == begun.keys()
    for name, exact in named_leaves(tuned["float32"].params).items():
        assert masters[name].dtype == jnp.float32
        moved, wanted = masters[name] - begun[name], exact - begun[name]
        assert (np.abs(moved) > RATE / 10).mean() > 0.9, name  # Adam moves every weight by about the rate
        assert_close(moved, wanted, 0.2, name)


def test_parameters_are_their_masters_rounded(tuned):
    params = named_leaves(tuned["bfloat16"].params)
    for name, master in masters_of(tuned["bfloat16"]).items():
        assert params[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(params[name], master.astype(jnp.bfloat16), err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_large_step_is_not_lost_either(dtype):
    """If a step shrinks a parameter by orders of magnitude, the parameter still equals the rounded master."""
    params = {"w_in": jnp.array([1.0, -3.0, 1e4, 0.0], dtype)}
    tx = make_optimizer(Config().replace({"optim.schedule": "constant", "optim.peak_lr": 0.9999}), params)
    updates, state = tx.update({"w_in": jnp.array([1.0, -1.0, 1.0, -1.0], dtype)}, tx.init(params), params)
    masters, params = optax.tree.get(state, "masters"), optax.apply_updates(params, updates)
    np.testing.assert_allclose(masters["w_in"], [-1e-4, -1.7, 9e3, 1], rtol=0.1, atol=0.1)
    np.testing.assert_array_equal(params["w_in"], masters["w_in"].astype(dtype))


def test_a_run_begins_with_values_of_float32_and_keeps_its_masters_to_the_bit(published, tmp_path):
    save(tmp_path / "published", published, config("float32"))
    c = config("bfloat16", **{"train.steps": 3})
    state = fit(c, str(tmp_path / "run"), init_from=str(tmp_path / "published"), quiet=True).state
    for name, master in masters_of(state).items():
        assert 0 < np.abs(master - named_leaves(published)[name]).max() < 10 * RATE, name
    assert_same_state(Checkpoints(tmp_path / "run").restore(jax.eval_shape(lambda: state)).state, state)


def test_what_is_frozen_and_what_is_float32_has_no_master():
    make = lambda *args, **changes: jax.eval_shape(lambda: init_state(config(*args, **changes), jax.random.key(0)))  # noqa: E731
    experts = {
        "model.experts.E": 4,
        "model.experts.k": 2,
        "model.experts.bias_rate": 0.01,
        "optim.trainable": "*,!embed",
    }
    state = make("bfloat16", **experts)
    names, bias = masters_of(state).keys(), "blocks/ffn/router/selection_bias"
    assert names == named_leaves(state.params).keys() - {"embed", bias}
    # The bias has another update rule than the optimizer's. In bfloat16, a bias of 1 or more would lose steps of 0.001.
    assert named_leaves(state.params)[bias].dtype == jnp.float32
    assert optax.tree.get(make("float32").opt_state, "masters") is None


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_masters_are_divided_as_their_parameters_are(tuned, published):
    c = config("bfloat16", **{"mesh.fsdp": 4})
    mesh, state = make_mesh(c), begin(c, published)
    places = shardings(mesh, state)
    params, masters = named_leaves(places.params), named_leaves(optax.tree.get(places.opt_state, "masters"))
    assert masters.keys() == params.keys() and all(masters[name].spec == params[name].spec for name in masters)
    step, state = jax.jit(make_step(c, mesh), out_shardings=(places, None)), jax.device_put(state, places)
    for batch in batches():
        state, metrics = step(state, shard_batch(mesh, batch))
        jax.block_until_ready(metrics)
    for name, master in masters_of(tuned["bfloat16"]).items():
        np.testing.assert_allclose(masters_of(state)[name], master, atol=2 * RATE, err_msg=name)


def test_microbatches_add_up_in_float32():
    """The gradients of microbatches are added in float32, also for bfloat16 parameters.

    256 equal gradients are added. A sum in bfloat16 would stop growing before the end.
    """
    c = config("bfloat16", **{"data.B": 256, "data.T": 2})
    batch = {name: jnp.tile(jnp.array([[3, 5]]), (256, 1)) for name in ("tokens", "targets")}
    batch |= dict(segment_ids=0 * batch["tokens"], loss_mask=batch["tokens"] > 0)
    norms = []
    for accumulate in (1, 256):
        one = c.replace({"train.accumulate": accumulate})
        _, metrics = jax.jit(make_step(one))(begin(one), batch)
        norms.append(float(metrics["grad_norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)


def test_a_checkpoint_without_masters_is_refused_in_one_line(tuned, tmp_path):
    state = tuned["bfloat16"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state._replace(opt_state=state.opt_state[:-1]), {})
    with pytest.raises(ValueError, match="the state has opt_state/.*/masters/.*, but the checkpoint does not") as error:
        Checkpoints(tmp_path).restore(jax.eval_shape(lambda: state))
    assert "\n" not in str(error.value)
