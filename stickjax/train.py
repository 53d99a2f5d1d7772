"""Training: a pure, jitted step, and a loop that logs, checkpoints, resumes and stops cleanly.

python -m stickjax.train configs/tiny.py [--run DIR] [--section.field=value ...]
"""

import argparse
import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import pallas_kernels
from stickjax.checkpoint import Checkpoints, check_finite
from stickjax.config import Config, describe, load_config, parse
from stickjax.data import Corpus, load_corpus, train_loader
from stickjax.metrics import MetricsLog, flops_per_token, peak_flops
from stickjax.models.moe import updated_router_bias
from stickjax.models.transformer import Transformer, apply, init, parameter_counts
from stickjax.optim import make_optimizer
from stickjax.progress import Progress
from stickjax.run import load, read_config, write_config


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


def loss_and_metrics(config: Config, params, batch, key) -> tuple[jax.Array, dict]:
    """Mean cross-entropy over the targets that `loss_mask` keeps, plus the routers' weighted losses, summed over layers.

    `batch["loss_scale"]`, when given, replaces 1 / (number of targets): microbatches then add up to the whole batch.
    """
    output = apply(params, batch, key)
    nll = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch["targets"])
    mask = batch["loss_mask"].astype(jnp.float32)
    scale = batch.get("loss_scale", 1 / jnp.maximum(mask.sum(), 1))
    loss = (nll * mask).sum() * scale
    metrics = {"loss": loss}
    if output.router is not None:
        m, stats = config.model, output.router
        losses = {"switch": stats.switch, "z": stats.z, "mutual_information": stats.mutual_information}
        weights = {"switch": m.switch_weight, "z": m.z_weight, "mutual_information": m.mi_weight}
        loss += sum(weights[name] * value.sum() for name, value in losses.items()) / config.train.accumulate
        metrics |= {name: value.mean() / config.train.accumulate for name, value in losses.items()}
        metrics["load"] = stats.load / config.train.accumulate
    return loss, metrics


def make_step(config: Config) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The pure step `(state, batch) -> (state, metrics)`; jit it with `donate_argnums=0`."""
    accumulate = config.train.accumulate

    def gradients(params, batch, key):
        grad = jax.grad(lambda p, b, k: loss_and_metrics(config, p, b, k), has_aux=True)
        if accumulate == 1:
            return grad(params, batch, key)
        micro = {name: x.reshape(accumulate, -1, *x.shape[1:]) for name, x in batch.items()}
        scale = 1 / jnp.maximum(batch["loss_mask"].astype(jnp.float32).sum(), 1)

        def one(total, inputs):
            part, k = inputs
            return jax.tree.map(jnp.add, total, grad(params, part | {"loss_scale": scale}, k)), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(grad, params, first | {"loss_scale": scale}, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(one, zeros, (micro, jax.random.split(key, accumulate)))[0]

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        grads, metrics = gradients(state.params, batch, jax.random.fold_in(state.key, state.step))
        load = metrics.pop("load", None)
        norm = optax.tree.norm(grads)
        optimizer = make_optimizer(config, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if load is not None:
            metrics["load_max"] = load.max() * config.model.E  # 1 at balance
            if config.model.bias_rate:
                params = _with_router_bias(params, load, config.model.bias_rate)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        bad_steps = jnp.where(good, 0, state.bad_steps + 1)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": optax.tree.get(opt_state, "learning_rate"),
            "bad_steps": bad_steps,
        }
        return TrainState(params, opt_state, state.step + 1, state.key, bad_steps), metrics

    return step


def _with_router_bias(params: Transformer, load, rate: float) -> Transformer:
    params = jax.tree.map(lambda x: x, params)  # a copy: modules are changed by assignment
    params.blocks.ffn.router_bias = nnx.Param(updated_router_bias(params.blocks.ffn.router_bias[...], load, rate))
    return params


def banner(config: Config, corpus: Corpus) -> str:
    """What is about to run: model, data, and the kernels with the reason for each."""
    m, d = config.model, config.data
    total, active = parameter_counts(m)
    rows = [
        f"parameters {total:,} ({active:,} active, embedding left out), {flops_per_token(m, d.T):,.0f} FLOP per token",
        f"data {corpus.summary()}",
        f"{config.train.steps} steps of B={d.B} x T={d.T} tokens on {jax.device_count()} {jax.devices()[0].device_kind} device(s)",
    ]
    struct = jax.ShapeDtypeStruct
    B = d.B // config.train.accumulate
    if m.attention == "stick_breaking":
        q, k = (struct((B, d.T, heads, m.H), m.dtype) for heads in (m.N, m.K))
        seg = struct((B, d.T), jnp.int32)
        rows.append(
            pallas_kernels.explain(
                "stick_breaking_attention", q, k, k, segment_ids=seg, scale=m.scale, window=m.window,
                attend_current=m.attend_current, skip_below=m.skip_below, implementation=m.implementation,
            )
        )  # fmt: skip
    if m.E:
        routing = jax.eval_shape(lambda: pallas_kernels.route(jnp.zeros((B * d.T, m.k), jnp.int32), m.E))
        ffn = jax.eval_shape(lambda: init(m, jax.random.key(0))).blocks.ffn
        w_in, w_out = (struct(w.shape[1:], m.dtype) for w in (ffn.w_in, ffn.w_out))
        x, gates = struct((B * d.T, m.D), m.dtype), struct((B * d.T, m.k), jnp.float32)
        call = dict(activation=m.activation, implementation=m.implementation)
        rows.append(pallas_kernels.explain("expert_mlp", x, w_in, w_out, routing, gates, **call))
    return "\n".join(rows)


class Result(NamedTuple):
    """How a run ended. `outside`: share of the wall time spent outside the jitted step, its compilation left out."""

    state: TrainState
    finished: bool
    tokens_per_second: float
    outside: float


@contextlib.contextmanager
def _stop_signals():
    """`asked()` turns true on SIGTERM or Ctrl-C; a second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def handle(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # signals belong to the main thread; in another one there is nothing to handle
        old = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _start(config: Config, checkpoints: Checkpoints, init_from: str | None, branch: str | None, say) -> tuple[TrainState, dict | None]:
    """The state to begin with and the data iterator's state: resumed, branched, from other weights, or new."""
    key = jax.random.key(config.train.seed)
    abstract = jax.eval_shape(lambda: init_state(config, key))
    if (restored := checkpoints.restore(abstract)) is not None:
        source = f"{checkpoints.folder.parent.name}@{restored.step}"
        say(f"resuming {source}")
    elif branch is not None:
        run, step = split_branch(branch)
        restored = Checkpoints(run).restore(abstract, step=step)
        if restored is None:
            raise ValueError(f"{run} has no checkpoint to branch from")
        source = f"{run}@{restored.step}"
        say(f"branching from {source}")
    else:
        state = jax.jit(lambda: init_state(config, key))()
        if init_from is not None:
            loaded = load(init_from)
            own, other = (jax.tree.structure(p) for p in (state.params, loaded.model))
            if own != other or any(a.shape != b.shape for a, b in zip(*map(jax.tree.leaves, (state.params, loaded.model)), strict=True)):
                diff = [d for d in loaded.config.diff(config) if d.startswith("model.")]
                raise ValueError(f"--init-from {init_from} is another model ({'; '.join(diff)})")
            state = state._replace(params=loaded.model)
            say(f"parameters from {init_from}@{loaded.step}")
        return state, None
    check_finite(restored.state.params, source)
    return restored.state, restored.extra


def split_branch(branch: str) -> tuple[str, int | None]:
    """'RUN@STEP' or 'RUN' (its newest checkpoint)."""
    run, at, step = branch.rpartition("@")
    if not at:
        return branch, None
    if not step.isdecimal():
        raise ValueError(f"--from {branch}: expected RUN@STEP with a whole number STEP")
    return run, int(step)


def fit(
    config: Config,
    run: str,
    *,
    init_from: str | None = None,
    branch: str | None = None,
    profile: bool = False,
    quiet: bool = False,
) -> Result:
    """Train `config` in the folder `run`; a folder that has checkpoints is resumed, bit for bit.

    Args:
      config: the experiment.
      run: folder for config.json, metrics.jsonl and checkpoints.
      init_from: a run folder whose parameters are the beginning (optimizer and data start anew).
      branch: "RUN@STEP", a checkpoint to go on from under this config, for example with a decay.
      profile: write a trace of three steps to `run/profile`.
      quiet: print nothing.

    Raises:
      ValueError: bad input, or a folder of another config.
      FloatingPointError: `max_bad_steps` steps in a row were not finite; the last good checkpoint is kept.
      OSError: a checkpoint or the metrics could not be written.
    """
    corpus, _ = load_corpus(config.data)
    if corpus.tokenizer.vocab_size > config.model.V:
        raise ValueError(f"V={config.model.V} is smaller than the tokenizer's {corpus.tokenizer.vocab_size} ids")
    loader = train_loader(
        corpus, config.data, process_index=jax.process_index(), process_count=jax.process_count()
    )
    write_config(run, config)
    with Progress(config, quiet=quiet) as progress, Checkpoints(run, config.train.keep) as checkpoints:
        progress.say(banner(config, corpus))
        state, extra = _start(config, checkpoints, init_from, branch, progress.say)
        if extra is not None:
            if extra["corpus"] != corpus.hash:
                raise ValueError(f"the text has changed: {corpus.source} is {corpus.hash}, the checkpoint was trained on {extra['corpus']}")
            loader.set_state(extra["data"])
        log = MetricsLog(run, after_step=int(state.step))
        with contextlib.closing(log), _stop_signals() as asked:
            return _loop(config, state, loader, corpus, checkpoints, log, progress, asked, Path(run) / "profile" if profile else None)


def _loop(config, state, loader, corpus, checkpoints, log, progress, asked, profile) -> Result:
    step_function = jax.jit(make_step(config), donate_argnums=0)
    first = step = int(state.step)
    tokens, peak = config.data.tokens_per_step, peak_flops()
    per_token = flops_per_token(config.model, config.data.T)
    inside, started, saved = 0.0, time.perf_counter(), step if step else None

    def save():
        nonlocal saved
        extra = {"data": data_state, "corpus": corpus.hash, "tokens": step * tokens, "config": config.to_dict()}
        checkpoints.save(step, state, extra)
        saved = step

    batch, data_state = next(loader), loader.get_state()
    while step < config.train.steps and not asked():
        if profile and step == first + 3:
            jax.profiler.start_trace(str(profile))
        begun = time.perf_counter()
        state, metrics = step_function(state, batch)
        at_step = data_state
        batch, data_state = next(loader), loader.get_state()  # while the device works
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        step += 1
        data_state, ahead = at_step, data_state
        if step == first + 1:
            started = now  # compiled
        else:
            inside += now - begun
        if profile and step == first + 6:
            jax.profiler.stop_trace()
        if metrics["bad_steps"] >= config.train.max_bad_steps:
            checkpoints.wait()
            raise FloatingPointError(
                f"step {step}: {config.train.max_bad_steps} steps in a row were not finite; "
                f"the last good checkpoint is step {max(checkpoints.steps(), default=0)}"
            )
        if step % config.train.log_every == 0 or step == config.train.steps:
            rate = (step - first - 1) * tokens / max(now - started, 1e-9)
            row = {"step": step, "tokens": step * tokens, **{k: float(v) for k, v in metrics.items()}, "tokens_per_second": rate}
            if peak:
                row["mfu"] = rate * per_token / peak
            log.write(row)
            progress.update(row)
        if metrics["bad_steps"] == 0 and step % config.train.checkpoint_every == 0:
            save()
        data_state = ahead
    if saved != step and step > first and metrics["bad_steps"] == 0:
        data_state = at_step
        save()
    checkpoints.wait()
    total = max(time.perf_counter() - started, 1e-9)
    rate, outside = max(step - first - 1, 0) * tokens / total, 1 - inside / total
    finished = step >= config.train.steps
    if finished:
        progress.say(f"step {step}: {rate:,.0f} tokens/s, {outside:.1%} of the time outside the jitted step")
    else:
        progress.say(f"stopped at step {step}; run the same command again to go on")
    return Result(state, finished, rate, outside)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stickjax.train", add_help=False, allow_abbrev=False)
    parser.add_argument("config", nargs="?", help="a config file, or a run's config.json")
    parser.add_argument("--run", help="run folder; runs/NAME of the config file by default")
    parser.add_argument("--init-from", metavar="RUN", help="begin with the parameters of another run")
    parser.add_argument("--from", dest="branch", metavar="RUN@STEP", help="go on from a checkpoint under a changed config")
    parser.add_argument("--profile", action="store_true", help="write a trace of a few steps to RUN/profile")
    parser.add_argument("-h", "--help", action="store_true")
    words, rest = parser.parse_known_args(argv)
    try:
        if words.config is None and words.branch is not None:
            config = read_config(split_branch(words.branch)[0])
        else:
            config = load_config(words.config) if words.config else Config()
        if words.help:
            print(f"{parser.format_help()}\nconfig fields, with their values here:\n{describe(config)}")
            return 0
        if words.config is None and words.branch is None:
            raise ValueError("which config? for example: python -m stickjax.train configs/tiny.py")
        if words.branch is not None and words.run is None:
            raise ValueError("--from needs a new folder: --run DIR")
        config = parse(config, rest)
        run = words.run or str(Path("runs") / Path(words.config).stem)
        fit(config, run, init_from=words.init_from, branch=words.branch, profile=words.profile)
    except (ValueError, OSError, FloatingPointError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
