"""The training step: a pure function (state, batch) -> (new state, metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from stickjax.config import Config
from stickjax.models.families import family_of
from stickjax.models.parameters import shardings
from stickjax.training.gradients import batch_gradients, mesh_gradients
from stickjax.training.optimizer import is_trainable, make_optimizer


class TrainState(NamedTuple):
    """The training state: everything that a step changes.

    `params`: the model.
    `opt_state`: the state of the optimizer.
    `step`: the number of steps done, including the skipped steps.
    `key`: the random key of the training; it stays the same, and each step derives its key from it.
    `bad_steps`: how many steps in a row, including the last step, were skipped because their loss or gradient was not
      finite; 0 if the last step was not skipped.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    bad_steps: jax.Array


def init_state(config: Config, key: jax.Array) -> TrainState:
    """Return the state before the first step: new random parameters, a new optimizer state, and step 0."""
    k_init, k_train = jax.random.split(key)
    params = family_of(config.model).init(config.model, k_init)
    opt_state = make_optimizer(config, params).init(params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, opt_state, zero, k_train, zero)


def tokens_of(state: TrainState) -> int:
    """Return the number of tokens that the model was trained on so far, from the exact counter of the optimizer.

    This is the sum of B * T over the steps that were not skipped. B and T may have changed between steps.
    """
    return int(optax.tree.get(state.opt_state, "tokens"))


def with_params(config: Config, state: TrainState, model) -> TrainState:
    """Return the training state `state` with the parameters of `model` and a new optimizer state.

    The parameters keep the types that they have in `state`: values of `model` in a larger type are rounded. If the
    optimizer has float32 masters, the masters get the values of `model` without this rounding.
    """
    values = jax.tree.unflatten(jax.tree.structure(state.params), jax.tree.leaves(model))
    params = jax.tree.map(lambda value, param: value.astype(param.dtype), values, state.params)
    return state._replace(params=params, opt_state=make_optimizer(config, params).init(values))


def make_step(config: Config, mesh: Mesh | None = None) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Return the training step as a pure function `(state, batch) -> (new state, metrics)`, without jit.

    `metrics` is {name: scalar}. If the loss or the gradient is not finite, the step is skipped: parameters and
    optimizer state stay the same, and `bad_steps` grows by 1. On a mesh every device computes its part of each
    microbatch (see `gradients.mesh_gradients`). The arrays of the state then have the shardings that
    `models.parameters.shardings` returns.
    """
    family, steps = family_of(config.model), config.train.steps
    gradients = mesh_gradients(mesh, batch_gradients(config))

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(state.key, state.step)
        grads, metrics = gradients(state.params, batch, key)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

        def update():
            optimizer = make_optimizer(config, state.params)
            # In float32, because the number of tokens overflows int32.
            left = (steps - state.step).astype(jnp.float32) * float(config.data.tokens_per_step)
            with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers by floats
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params, left=left)
                params = optax.apply_updates(state.params, updates)
            trainable = lambda name: is_trainable(name, config.optim.trainable)  # noqa: E731
            return family.gradient_free_update(params, metrics, trainable), opt_state

        # This is lax.cond, because jnp.where would read and write every parameter once more.
        params, opt_state = jax.lax.cond(good, update, lambda: (state.params, state.opt_state))
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)
        metrics = family.scalars(state.params, metrics) | {
            "grad_norm": norm,
            "learning_rate": optax.tree.get(opt_state, "learning_rate"),
            "bad_steps": bad_steps,
        }
        return TrainState(params, opt_state, state.step + 1, state.key, bad_steps), metrics

    return step


def jit_step(config: Config, mesh: Mesh | None, state: TrainState) -> Callable:
    """Return the training step of `make_step`, jitted.

    The memory of the old state is donated to the new state, so do not use the old state after a step. On a mesh, the
    new state has the shardings that `models.parameters.shardings` returns. Only the structure and the shapes of `state`
    are used.
    """
    places = None if mesh is None else (shardings(mesh, state), None)
    return jax.jit(make_step(config, mesh), donate_argnums=0, out_shardings=places)
