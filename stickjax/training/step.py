"""The pure training step: state and batch in, state and metrics out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from pallas_kernels.arguments import sum_type
from stickjax.config import Config
from stickjax.models import sut
from stickjax.models.family import init
from stickjax.models.router import updated_router_bias
from stickjax.models.transformer import Transformer, apply
from stickjax.models.vocabulary import cross_entropy
from stickjax.parallel.collectives import psum_over_batch
from stickjax.parallel.sharding import shard_gradients, shardings
from stickjax.training.optimizer import is_trainable, make_optimizer, stop_frozen_gradients

ROUTERS = {"": "ffn", "attention_": "attention"}  # {beginning of a metric's name: the part of the block}


class TrainState(NamedTuple):
    """Everything a step changes. `bad_steps`: steps in a row that were skipped because they were not finite."""

    params: Transformer
    opt_state: Any
    step: jax.Array
    key: jax.Array
    bad_steps: jax.Array


def init_state(config: Config, key: jax.Array) -> TrainState:
    """The state before the first step."""
    k_init, k_train = jax.random.split(key)
    params = init(config.model, k_init)
    opt_state = make_optimizer(config, params).init(params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, opt_state, zero, k_train, zero)


def tokens_of(state: TrainState) -> int:
    """The tokens trained so far: B * T of every step that was not skipped, with the B and T of that step."""
    return int(optax.tree.get(state.opt_state, "tokens"))


def with_params(config: Config, state: TrainState, model) -> TrainState:
    """The state before the first step, with the parameters of `model`, which may be stored in a larger type.

    If there are masters, they keep exactly these values.
    """
    values = jax.tree.unflatten(jax.tree.structure(state.params), jax.tree.leaves(model))
    params = jax.tree.map(lambda value, param: value.astype(param.dtype), values, state.params)
    return state._replace(params=params, opt_state=make_optimizer(config, params).init(values))


def loss_and_metrics(config: Config, params, batch, key) -> tuple[jax.Array, dict]:
    """Mean cross-entropy over the targets that `loss_mask` keeps, plus the routers' weighted losses of all layers.

    This is the loss of a decoder; a Sparse Universal Transformer has `models.sut.loss`.

    `batch["loss_scale"]`, when given, replaces 1 / (number of targets): microbatches then add up to the whole batch.
    """
    if config.model.family == "sut":
        return sut.loss(config.model, params, batch, key)
    output = apply(params, batch, key)
    nll = cross_entropy(output.logits, batch["targets"])
    mask = batch["loss_mask"].astype(jnp.float32)
    scale = batch.get("loss_scale", 1 / jnp.maximum(psum_over_batch(mask.sum()), 1))
    loss = psum_over_batch((nll * mask).sum()) * scale
    metrics = {"loss": loss}
    m, load = config.model, {}
    weights = {
        "switch": m.switch_weight, "z": m.z_weight, "mutual_information": m.mi_weight,
        "concentration": m.concentration_weight,
    }  # fmt: skip
    for kind, stats in {"": output.router, "attention_": output.attention_router}.items():
        if stats is not None:
            losses = {name: getattr(stats, name) / config.train.accumulate for name in weights}
            loss += sum(weights[name] * value.sum() for name, value in losses.items())
            metrics |= {f"{kind}{name}": value.mean() for name, value in losses.items()}
            load[kind] = stats.load / config.train.accumulate
    if load:
        metrics["load"] = load
    return loss, metrics


def make_step(config: Config, mesh: Mesh | None = None) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The pure step `(state, batch) -> (state, metrics)`; `jit_step` jits it.

    On a mesh every device takes its part of each microbatch (`sharding.shard_gradients`). The state is
    divided by `sharding.shardings`.
    """
    accumulate, steps = config.train.accumulate, config.train.steps

    def gradients(params, batch, key):
        grad = jax.grad(lambda p, b, k: loss_and_metrics(config, stop_frozen_gradients(config, p), b, k), has_aux=True)
        if accumulate == 1:
            return grad(params, batch, key)
        micro = {name: x.reshape(accumulate, -1, *x.shape[1:]) for name, x in batch.items()}
        scale = 1 / jnp.maximum(psum_over_batch(batch["loss_mask"].astype(jnp.float32).sum()), 1)

        def one(total, inputs):  # a sum in bfloat16 would lose the gradients of late microbatches
            part, k = inputs
            add = lambda total, x: total + x.astype(total.dtype)  # noqa: E731
            return jax.tree.map(add, total, grad(params, part | {"loss_scale": scale}, k)), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(grad, params, first | {"loss_scale": scale}, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, sum_type(s)), shapes)
        return jax.lax.scan(one, zeros, (micro, jax.random.split(key, accumulate)))[0]

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(state.key, state.step)
        grads, metrics = shard_gradients(mesh, gradients)(state.params, batch, key)
        load = metrics.pop("load", {})
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)

        def learn():
            optimizer = make_optimizer(config, state.params)
            left = (steps - state.step).astype(jnp.float32) * float(config.data.tokens_per_step)  # it overflows int32
            with jax.numpy_dtype_promotion("standard"):  # optax multiplies int32 and floats
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params, left=left)
                params = optax.apply_updates(state.params, updates)
            if load and config.model.bias_rate:
                params = _with_router_bias(config, params, load)
            return params, opt_state

        # A branch instead of jnp.where, which would read and write every parameter once more.
        params, opt_state = jax.lax.cond(good, learn, lambda: (state.params, state.opt_state))
        busiest = {f"{kind}load_max": (x * _experts(state.params, kind, x)).max() for kind, x in load.items()}
        metrics |= busiest  # 1 at balance
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": optax.tree.get(opt_state, "learning_rate"),
            "bad_steps": bad_steps,
        }
        return TrainState(params, opt_state, state.step + 1, state.key, bad_steps), metrics

    return step


def jit_step(config: Config, mesh: Mesh | None, state: TrainState) -> Callable:
    """`make_step`, jitted: the state is donated, and keeps the shardings of `sharding.shardings`.

    Only the structure and the shapes of `state` are read.
    """
    places = None if mesh is None else (shardings(mesh, state), None)
    return jax.jit(make_step(config, mesh), donate_argnums=0, out_shardings=places)


def _with_router_bias(config: Config, params: Transformer, load: dict[str, jax.Array]) -> Transformer:
    params = jax.tree.map(lambda x: x, params)  # a copy: modules are changed by assignment
    for kind, name in ROUTERS.items():
        if kind in load and is_trainable(f"blocks.{name}.router.selection_bias", config.optim.learn):
            router, experts = getattr(params.blocks, name).router, _experts(params, kind, load[kind])
            bias = updated_router_bias(router.selection_bias[...], load[kind], config.model.bias_rate, experts)
            router.selection_bias = nnx.Param(bias)
    return params


def _experts(params: Transformer, kind: str, load: jax.Array) -> int | jax.Array:
    """The number of experts of a load [L,E]: one number, or [L,1] if some experts were pruned."""
    slot = getattr(params.blocks, ROUTERS[kind]).router.slot
    return load.shape[-1] if slot is None else (slot[...] >= 0).sum(-1, keepdims=True)


def abstract_batch(config: Config, place: NamedSharding | None) -> dict:
    """The batch of a step on text without its values."""
    types = dict(tokens=jnp.int32, targets=jnp.int32, segment_ids=jnp.int32, loss_mask=jnp.bool_)
    shape = (config.data.B, config.data.T)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in types.items()}
