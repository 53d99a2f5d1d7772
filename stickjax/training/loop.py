"""Training: a loop around the jitted step that logs, checkpoints, resumes and stops cleanly.

python -m stickjax.train configs/tiny.py [--run DIR] [--section.field=value ...]
"""

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

import jax

from stickjax.config import Config, DataConfig
from stickjax.data.readers import training_data
from stickjax.models.families import family_of
from stickjax.models.parameters import shardings
from stickjax.models.vocabulary_size import with_vocabulary
from stickjax.parallel import processes
from stickjax.parallel.mesh import abstract_batch, make_mesh, rows_of_process, shard_batch
from stickjax.storage.checkpoints import Checkpoints, all_finite, check_finite, named_leaves
from stickjax.storage.run_folder import (
    PLACES,
    check_config,
    check_trained,
    load,
    placed,
    read_config,
    with_own_tokenizer,
    write_config,
)
from stickjax.system.memory import check_fits, check_program, local_bytes, state_parts
from stickjax.system.profiling import StepTrace
from stickjax.training.banner import banner
from stickjax.training.metrics import MetricsLog, peak_flops
from stickjax.training.progress import Progress
from stickjax.training.step import TrainState, init_state, jit_step, tokens_of, with_params
from stickjax.training.stopping import stop_requests


class Result(NamedTuple):
    """How a run ended.

    `tokens_per_second`: None if fewer than two steps were measured. `outside`: share of the wall time spent outside
    the jitted step, its compilation left out. `stopped_by`: the number of the signal that stopped the run before its
    last step, or 0.
    """

    state: TrainState
    finished: bool
    tokens_per_second: float | None
    outside: float
    stopped_by: int = 0

    def __repr__(self) -> str:  # a notebook shows it, and the state is all parameters
        others = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items() if name != "state")
        return f"Result(step={int(self.state.step)}, {others})"


def _start(
    config, mesh, abstract, data, checkpoints, init_from: str | None, branch: str | None, say
) -> tuple[TrainState, dict | None]:
    """The first state of training and data iterator: resumed, branched from another run, or new.

    `abstract`: the shapes of the state, with their places on the mesh.
    """
    if (restored := checkpoints.restore(abstract)) is not None:
        source = f"{checkpoints.folder.parent}@{restored.step}"
        check_trained(restored.extra, config, data.tokenizer, source)
        data_state = restored.extra["data"]
        _check_text("text", data.source, data.hash, restored.extra["corpus"], source)
        _check_text("held-out text", data.heldout_source, data.heldout_hash, restored.extra.get("heldout"), source)
        if restored.step < config.train.steps:
            say(f"resuming {source}")
    elif branch is not None:
        run, step = split_branch(branch)
        restored = Checkpoints(run).restore(abstract, step=step)
        if restored is None:
            raise ValueError(f"{run} has no checkpoint to branch from")
        source = f"{run}@{restored.step}"
        check_trained(restored.extra, config, data.tokenizer, source)
        if restored.step >= config.train.steps:
            steps = f"train.steps={config.train.steps} must be more than its step {restored.step}"
            raise ValueError(f"--from {source}: {steps}")
        config.check_lengths(restored.step, tokens_of(restored.state))
        # A decay is often trained on another text than the stable phase. The new text is read from its beginning.
        same_text = restored.extra["corpus"] == data.hash
        data_state = _position(restored.extra, config.data) if same_text else None
        say(f"branching from {source}" + ("" if data_state else ", with other text"))
    else:
        config.check_lengths()
        return _new(config, mesh, abstract, init_from, say), None
    check_finite(restored.state.params, source)
    return restored.state, data_state


def _check_text(what: str, where: str | None, found: str | None, recorded: str | None, source: str) -> None:
    """Raise ValueError if a text is another one than the checkpoint `source` records; None: it has no such text."""
    if None not in (found, recorded) and found != recorded:
        raise ValueError(f"the {what} has changed: {where} is now {found}, {source} has {recorded}")


def _new(config, mesh, abstract, init_from: str | None, say) -> TrainState:
    say("making the parameters")
    places = None if mesh is None else shardings(mesh, abstract)
    # The key is an argument: with a constant key XLA would draw the numbers itself, while it compiles.
    key = jax.random.key(config.train.seed)
    program = jax.jit(lambda key: init_state(config, key), out_shardings=places).lower(key).compile()
    check_program(program, "making the parameters", mesh)
    state = program(key)
    if init_from is None:
        return state
    loaded = load(init_from, mesh=mesh)
    ours, theirs = (
        {name: leaf.shape for name, leaf in named_leaves(tree).items()} for tree in (state.params, loaded.model)
    )
    if ours != theirs:
        changed = [d for d in loaded.config.diff(config) if d.startswith("model.")]
        raise ValueError(f"--init-from {init_from} is another model ({'; '.join(changed)})")
    say(f"parameters from {init_from}@{loaded.step}")
    return with_params(config, state, loaded.model)


def _position(extra: dict, data: DataConfig) -> dict:
    """The state of the data iterator after all sequences seen so far; the size of a batch may have changed."""
    before, index = extra["config"]["data"], extra["data"]["next_index"]
    return extra["data"] | {"next_index": -(-index * before["B"] * before["T"] // data.tokens_per_step)}


def split_branch(branch: str) -> tuple[str, int | None]:
    """'RUN@STEP' or 'RUN' (its newest checkpoint); an existing folder is a RUN even if its name has an @."""
    run, at, step = branch.rpartition("@")
    if not at or Path(branch).is_dir():
        return branch, None
    if not (step.isascii() and step.isdecimal()):
        raise ValueError(f"--from {branch}: there is no such folder, and {step!r} is not a step, as in RUN@STEP")
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
      init_from: a run folder whose parameters are taken (optimizer and data begin anew).
      branch: "RUN@STEP", a checkpoint to continue with this config, for example with a decay.
      profile: write a trace of a few steps to `run/profile` (see `StepTrace`).
      quiet: print nothing.

    Raises:
      ValueError: bad input, a folder of another config, or one in which another process is training.
      FloatingPointError: `max_bad_steps` steps in a row were not finite, or all; the last good checkpoint is kept.
      OSError: a checkpoint or the metrics could not be written.
    """
    config = with_own_tokenizer(run, config)
    data = training_data(config)
    if config.model.V is None and (Path(run) / "config.json").exists():
        config = config.replace({"model.V": read_config(run).model.V})  # another mesh might need another V
    config = with_vocabulary(config, data.vocab_size)
    mesh = make_mesh(config)
    abstract = placed(mesh, jax.eval_shape(lambda: init_state(config, jax.random.key(config.train.seed))))
    check_fits(state_parts(abstract) | _batch_part(config, mesh), mesh)
    loader = data.loader(*rows_of_process(mesh))
    fields = {f"{s}.{n}": value for s, section in config.to_dict().items() for n, value in section.items()}
    tokenizer = data.tokenizer and data.tokenizer.name
    content = {"text": data.hash, "held-out text": data.heldout_hash, "tokenizer": tokenizer}
    # The same text and tokenizer may lie elsewhere on another machine.
    processes.check_same(content | {name: value for name, value in fields.items() if name not in PLACES})
    quiet = quiet or not processes.is_writer()
    with Progress(config, quiet=quiet) as progress, Checkpoints(run, config.train.keep) as checkpoints:
        check_config(run, config)  # under the lock, nobody else writes the folder
        words, steps = banner(config, data, mesh), config.train.steps
        perhaps_finished = max(checkpoints.steps(), default=0) >= steps  # not if the newest checkpoint is damaged
        if not perhaps_finished:
            progress.say(words)
        state, data_state = _start(config, mesh, abstract, data, checkpoints, init_from, branch, progress.say)
        if (step := int(state.step)) >= steps:
            progress.say(f"{run} is finished: it is at step {step} of {steps}")
            return Result(state, True, None, 0.0)
        if perhaps_finished:
            progress.say(words)
        if data_state is not None:
            loader.set_state(data_state)
        log, folder = None, None
        if processes.is_writer():
            write_config(run, config, data.tokenizer)  # only now: a refused start leaves no folder
            log, folder = MetricsLog(run, after_step=step), Path(run) / "profile" if profile else None
        trace = StepTrace(folder, step, steps, progress.say)
        with contextlib.closing(log) if log else contextlib.nullcontext(), trace, stop_requests(progress) as asked:
            return _loop(config, mesh, state, loader, data, checkpoints, log, progress, asked, trace)


def _batch_part(config: Config, mesh) -> dict[str, int]:
    """Bytes of the largest batch on one device."""
    batch = abstract_batch(mesh, family_of(config.model).example_batch(config))
    return {f"a batch of B={config.data.B} x T={config.data.T}": local_bytes(batch)}


def _loop(config, mesh, state, loader, data, checkpoints, log, progress, asked, trace: StepTrace) -> Result:
    tokens, peak = config.data.tokens_per_step, peak_flops(1 if mesh is None else mesh.size)
    per_token, steps = family_of(config.model).flops_per_token(config.model, config.data.T), config.train.steps
    tokenizer = data.tokenizer and data.tokenizer.name
    step_function, batch = jit_step(config, mesh, state), shard_batch(mesh, next(loader), config.train.accumulate)
    progress.say("compiling the step")
    check_program(step_function.lower(state, batch).compile(), "the step", mesh)
    first = step = good = saved = int(state.step)  # good: the last step that was finite
    bad_steps, inside, started = 0, 0.0, time.perf_counter()
    stopped_by = int(processes.any_process(mesh, asked()))
    while not stopped_by and step < steps:
        data_state = loader.get_state()  # after the batch of this step, before the next batch is taken
        trace.before(step)
        begun = time.perf_counter()
        state, metrics = step_function(state, batch)
        asked_any = processes.any_process(mesh, asked(), after=metrics["loss"])  # all stop at one step
        batch = shard_batch(mesh, next(loader), config.train.accumulate)  # while the device works
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        step += 1
        if step == first + 1:
            started = now  # the first step takes longer
        else:
            inside += now - begun
        trace.after(step)
        bad_steps = int(metrics["bad_steps"])
        good = good if bad_steps else step
        if bad_steps >= config.train.max_bad_steps:
            raise _not_finite(checkpoints, f"step {step}: {bad_steps} steps in a row were not finite")
        stopped_by = int(asked_any)
        ends = bool(stopped_by) or step == steps
        if step % config.train.log_every == 0 or step == steps:
            row = {"step": step, "tokens": tokens_of(state), **{k: float(v) for k, v in metrics.items()}}
            if step > first + 1:
                row["tokens_per_second"] = rate = (step - first - 1) * tokens / max(now - started, 1e-9)
                if peak:
                    row["mfu"] = rate * per_token / peak
            if log:
                log.write(row)
            progress.update(row)
        # A skipped step leaves the state of the last good step.
        if good > first and (ends or (not bad_steps and step % config.train.checkpoint_every == 0)):
            if not all_finite(state.params):
                raise _not_finite(checkpoints, f"step {step}: its loss was finite, the parameters are not")
            hashes = {"corpus": data.hash, "heldout": data.heldout_hash, "tokenizer": tokenizer}
            extra = hashes | {"data": data_state, "tokens": tokens_of(state), "config": config.to_dict()}
            checkpoints.save(step, state, extra)
            saved = step
    checkpoints.wait()
    finished = step == steps
    if finished and good == first:
        raise _not_finite(checkpoints, f"none of the steps {first + 1} to {step} was finite")
    total = max(time.perf_counter() - started, 1e-9)
    rate = (step - first - 1) * tokens / total if step > first + 1 else None
    outside = max(0.0, 1 - inside / total) if rate else 0.0
    if bad_steps:
        progress.say(f"the last {bad_steps} steps were not finite and were skipped")
    if not finished:
        kept = f"saved at {saved}" if saved else "with nothing to save"
        progress.say(f"stopped at step {step}, {kept}; run the same command again to go on")
    elif rate:
        progress.say(f"step {step}: {rate:,.0f} tokens/s, {outside:.1%} of the time outside the jitted step")
    return Result(state, finished, rate, outside, 0 if finished else stopped_by)


def _not_finite(checkpoints: Checkpoints, what: str) -> FloatingPointError:
    checkpoints.wait()
    steps = checkpoints.steps()
    kept = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint"
    return FloatingPointError(f"{what}; {kept}")
