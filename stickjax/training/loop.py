"""Train a model: a loop around the jitted training step that logs, saves checkpoints, resumes and stops cleanly.

python -m stickjax.train configs/tiny.py [--run DIR] [--section.field=value ...]
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from pallas_kernels import dispatch
from stickjax.config import Config, DataConfig
from stickjax.data.batches import TrainingData
from stickjax.data.readers import training_data
from stickjax.evaluation.validation import Validation, validation_of
from stickjax.models.families import family_of
from stickjax.models.parameters import shardings
from stickjax.models.vocabulary_size import with_sizes_of, with_vocabulary
from stickjax.parallel import processes
from stickjax.parallel.mesh import abstract_batch, make_mesh, rows_of_process, shard_batch
from stickjax.storage.checkpoints import Checkpoints, all_finite, check_finite, named_leaves
from stickjax.storage.hub import local_folder
from stickjax.storage.run_config import PATH_FIELDS, check_config, read_config, with_own_files, write_config
from stickjax.storage.run_folder import check_trained, load, with_shardings
from stickjax.system.compiled import keep_compiled
from stickjax.system.memory import check_fits, check_program, local_bytes, state_parts
from stickjax.system.profiling import StepTrace
from stickjax.training.banner import banner, kernels
from stickjax.training.branch import check_other_folder, split_branch
from stickjax.training.metrics import MetricsLog, Pace, peak_flops
from stickjax.training.notebook import progress_of
from stickjax.training.progress import Progress
from stickjax.training.result import Result
from stickjax.training.step import TrainState, init_state, jit_step, tokens_of, with_params
from stickjax.training.stopping import stop_requests
from stickjax.training.trackers import check_tracker, tracker


@dataclasses.dataclass
class Run:
    """All that the training loop needs: the config, the data, the files, the display, and the requests to stop.

    `folder`: the run folder.
    `abstract`: the training state as ShapeDtypeStructs with shardings.
    `loader`: the iterator over the batches of this process.
    `asked`: a function that returns the number of the signal that asks for a stop, or 0.
    `log`: the writer of metrics.jsonl; None in a process that writes no files.
    `trace`: the writer of a profiler trace of a few steps.
    `validation`: how the model is measured on held-out data; None: it is not measured.
    `listeners`: functions that are called with every row of metrics. An element None is skipped.
    """

    folder: str
    config: Config
    mesh: Mesh | None
    abstract: TrainState
    data: TrainingData
    loader: Iterator[dict]
    checkpoints: Checkpoints
    progress: Progress
    asked: Callable[[], int] = lambda: 0
    log: MetricsLog | None = None
    trace: StepTrace | None = None
    validation: Validation | None = None
    listeners: list[Callable[[dict], None] | None] = dataclasses.field(default_factory=list)

    def say(self, text: str) -> None:
        self.progress.say(text)

    def next_batch(self) -> dict:
        return shard_batch(self.mesh, next(self.loader), self.config.train.accumulate)

    def report(self, row: dict) -> None:
        """Show `row`, {name of a metric: value}. If `self.log` is not None, also log `row` and call the listeners."""
        if self.log:
            self.log.write(row)
        self.progress.update(row)
        for listener in filter(None, self.listeners if self.log else []):
            listener(dict(row))

    def prepare_validation(self) -> str:
        """Set `validation`, if `train.eval_every` is not 0. Return a text to append to the banner of the training.

        The text is a line break and one line: what is measured, or why nothing can be measured. It is "" if
        `train.eval_every` is 0.
        """
        if not self.config.train.eval_every:
            return ""
        found = validation_of(self.config, self.data)
        if not isinstance(found, Validation):
            return f"\n{found}"
        self.validation = found
        return f"\nvalidation: {found.summary}"

    def validate(self, step: int, state: TrainState) -> tuple[dict[str, float], float | None]:
        """Measure the model on held-out data if a validation is due after step `step`.

        Return (scores, score). `scores` is {name of a metric: value}. `score` is the loss, or minus
        the accuracy for a model that reads examples, such as a classifier. The checkpoint with the lowest score is the
        best. Return ({}, None) if no validation is due.
        """
        train = self.config.train
        if self.validation is None or (step % train.eval_every and step != train.steps):
            return {}, None
        scores = self.validation.measure(state.params)
        return scores, self.validation.sign * scores[self.validation.metric]

    def save(self, state: TrainState, data_state: dict, score: float | None = None) -> None:
        """Save a checkpoint: the training state, the position in the data, the config, and hashes of the texts.

        `data_state` is the state of the data iterator after the last batch on which `state` was trained. `score` is
        the second result of `validate`. Raise FloatingPointError if a parameter is not finite.
        """
        step, data = int(state.step), self.data
        if not all_finite(state.params):
            raise self.not_finite(f"step {step}: the loss was finite, but the new parameters are not")
        hashes = {
            "corpus": data.hash, "heldout": data.heldout_hash, "tokenizer": data.tokenizer and data.tokenizer.name
        }  # fmt: skip
        extra = hashes | {"data": data_state, "tokens": tokens_of(state), "config": self.config.to_dict()}
        self.checkpoints.save(step, state, extra, score)

    def not_finite(self, what: str) -> FloatingPointError:
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        kept = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint"
        return FloatingPointError(f"{what}; {kept}")


def _start(run: Run, init_from: str | None, branch: str | None) -> TrainState:
    """Return the first training state of a run that starts or resumes, and set `run.loader` to its first batch.

    If the run folder has a checkpoint, the run resumes from it. Otherwise the run continues from `branch`, "RUN@STEP",
    a checkpoint of another run. Without `branch`, the training state is new; its parameters are random, or copied from
    the run `init_from`.
    """
    config, data = run.config, run.data
    if (restored := run.checkpoints.restore(run.abstract)) is not None:
        source = f"{run.checkpoints.folder.parent}@{restored.step}"
        check_trained(restored.extra, config, data.tokenizer, source)
        data_state = restored.extra["data"]
        _check_text("text", data.source, data.hash, restored.extra["corpus"], source)
        _check_text("held-out text", data.heldout_source, data.heldout_hash, restored.extra.get("heldout"), source)
        if restored.step < config.train.steps:
            run.say(f"resuming {source}")
    elif branch is not None:
        folder, step = split_branch(branch)
        restored = Checkpoints(folder).restore(run.abstract, step=step)
        if restored is None:
            raise ValueError(f"--from {branch}: the folder {folder} has no checkpoint")
        source = f"{folder}@{restored.step}"
        check_trained(restored.extra, config, data.tokenizer, source)
        if restored.step >= config.train.steps:
            raise ValueError(
                f"--from {source}: train.steps={config.train.steps} must be more than {restored.step}, the step of the "
                "checkpoint"
            )
        config.check_lengths(restored.step, tokens_of(restored.state))
        # The new run may use another text, as decay phases often do. Then the text is read from its start.
        same_text = restored.extra["corpus"] == data.hash
        data_state = _position(restored.extra, config.data) if same_text else None
        run.say(f"continuing from {source}" + ("" if data_state else ", with another text"))
    else:
        config.check_lengths()
        return _new(run, init_from)
    check_finite(restored.state.params, source)
    if data_state is not None:
        run.loader.set_state(data_state)
    return restored.state


def _check_text(what: str, where: str | None, found: str | None, recorded: str | None, source: str) -> None:
    """Raise ValueError if a text has changed since a checkpoint was saved.

    `found` is the present hash of the text, and `recorded` is the hash in the checkpoint. If one of the two is None,
    nothing is checked. In the message, `what` and `where` name the text, and `source` names the checkpoint.
    """
    if None not in (found, recorded) and found != recorded:
        raise ValueError(
            f"the {what} has changed: the hash of {where} is now {found}, but {source} was saved with the hash "
            f"{recorded}; use the old text again (data.path, data.mixture, data.heldout_path), or start a new run with "
            f"--from {source}"
        )


def _new(run: Run, init_from: str | None) -> TrainState:
    config, mesh = run.config, run.mesh
    run.say("making the parameters")
    places = None if mesh is None else shardings(mesh, run.abstract)
    # The key is an argument, because XLA would compute all random numbers of a constant key at compile time.
    key = jax.random.key(config.train.seed)
    program = jax.jit(lambda key: init_state(config, key), out_shardings=places).lower(key).compile()
    check_program(program, "making the parameters", mesh)
    state = program(key)
    if init_from is None:
        return state
    loaded = load(init_from, mesh=mesh, changes={"train.compilation_cache": config.train.compilation_cache})
    ours, theirs = (
        {name: leaf.shape for name, leaf in named_leaves(tree).items()} for tree in (state.params, loaded.model)
    )
    if ours != theirs:
        changed = [d for d in loaded.config.diff(config) if d.startswith("model.")]
        fields = "; ".join(changed)
        raise ValueError(
            f"--init-from {init_from}: the model of this run does not fit this config (the run's value -> your "
            f"value: {fields}); use the run's values"
        )
    run.say(f"parameters from {init_from}@{loaded.step}")
    return with_params(config, state, loaded.model)


def _position(extra: dict, data: DataConfig) -> dict:
    """Return the first state of the data iterator in a new run that continues another run on the same text.

    `extra` is what the checkpoint of the other run stores besides the training state. `data` is the data config of the
    new run. The checkpoint stores the position in the text as a number of batches. If the new run has another B or T,
    this number is converted to batches of the new run, and rounded up.
    """
    before, index = extra["config"]["data"], extra["data"]["next_index"]
    return extra["data"] | {"next_index": -(-index * before["B"] * before["T"] // data.tokens_per_step)}


def fit(
    config: Config,
    run: str,
    *,
    init_from: str | None = None,
    branch: str | None = None,
    profile: bool = False,
    quiet: bool = False,
    on_metrics: Callable[[dict], None] | None = None,
) -> Result:
    """Train the model of `config` in the run folder `run`. If the folder has a checkpoint, resume from it.

    On a CPU, a resumed run computes the same bits as a run without an interruption.

    Args:
      config: the experiment.
      run: folder for config.json, metrics.jsonl and checkpoints.
      init_from: the folder of a trained model. A new run starts with its parameters, and with the first batch.
      branch: "RUN@STEP", a checkpoint from which a new run continues with this config.
      profile: write a profiler trace of a few steps to `run/profile` (see `StepTrace`).
      quiet: print nothing.
      on_metrics: a function that is called with every row of metrics in the process that writes the run folder.

    Returns the last training state, and how the training ended.

    Raises:
      ValueError: the config does not fit the data, the devices, their memory or the folder; or the folder is in use.
      FloatingPointError: the loss or the gradient was not finite in `max_bad_steps` steps in a row, or in all steps;
        or a new parameter is not finite. The last good checkpoint is kept.
      OSError: a checkpoint or the metrics could not be written.
    """
    _check_beginning(run, init_from, branch)
    keep_compiled(config.train.compilation_cache)
    config = with_own_files(run, config)
    data = training_data(config)
    if (Path(run) / "config.json").exists():
        config = with_sizes_of(config, read_config(run))  # keep V, even if another mesh would round it differently
    config = with_vocabulary(config, data.ids)
    mesh = make_mesh(config)
    abstract = with_shardings(mesh, jax.eval_shape(lambda: init_state(config, jax.random.key(config.train.seed))))
    check_fits(state_parts(abstract) | _batch_part(config, mesh), mesh)
    loader = data.loader(*rows_of_process(mesh))
    _check_start(config, data)
    quiet = quiet or not processes.is_writer()
    with progress_of(run, config, quiet=quiet) as progress, Checkpoints(run, config.train.keep) as checkpoints:
        check_config(run, config)  # no other process changes the folder now, because `Checkpoints` has locked it
        this = Run(run, config, mesh, abstract, data, loader, checkpoints, progress, listeners=[on_metrics])
        words, steps = banner(config, data, mesh) + this.prepare_validation(), config.train.steps
        perhaps_finished = max(checkpoints.steps(), default=0) >= steps  # not if the newest one is damaged
        if not perhaps_finished:
            this.say(words)
        state = _start(this, init_from, branch)
        if (step := int(state.step)) >= steps:
            this.say(f"{run} is finished: it is at step {step} of {steps}")
            return Result(state, True, None, 0.0, run=run)
        if perhaps_finished:
            this.say(words)
        with stop_requests(progress) as this.asked:
            return _train(this, state, profile)


def _check_beginning(run: str, init_from: str | None, branch: str | None) -> None:
    """Raise ValueError, before the data is read, if `branch` names the run folder, or `init_from` is not a model."""
    check_other_folder(branch, run)
    if init_from is not None and not (Path(run) / "config.json").exists():  # a run that resumes does not need it
        read_config(local_folder(init_from))


def _check_start(config: Config, data: TrainingData) -> None:
    """Raise ValueError if the package of the tracker is missing, or if the processes have different configs or data.

    This process is compared with process 0. Config fields that are paths of files are not compared.
    """
    if processes.is_writer():
        check_tracker(config.train.track)
    fields = {f"{s}.{n}": value for s, section in config.to_dict().items() for n, value in section.items()}
    tokenizer = data.tokenizer and data.tokenizer.name
    content = {"text": data.hash, "held-out text": data.heldout_hash, "tokenizer": tokenizer}
    processes.check_same(content | {name: value for name, value in fields.items() if name not in PATH_FIELDS})


def _batch_part(config: Config, mesh) -> dict[str, int]:
    """Return the memory of a batch on one device as {description: bytes}, for `check_fits`."""
    batch = abstract_batch(mesh, family_of(config.model).example_batch(config))
    return {f"a batch of B={config.data.B} x T={config.data.T}": local_bytes(batch)}


def _train(run: Run, state: TrainState, profile: bool) -> Result:
    """Compile the training step, and train from `state` to the last step, or until a signal asks for a stop.

    `profile`: whether to write a profiler trace of a few steps.
    """
    if run.mesh is None:
        # JAX calls an array committed if it must stay on its device. Loaded arrays are committed, and new arrays are
        # not. If a state had both kinds, JAX would compile the step twice: once for this state, and once for the
        # results of the first step, which are all committed.
        state = jax.device_put(state, *state.step.devices())
    step, batch = int(state.step), run.next_batch()
    step_function = jit_step(run.config, run.mesh, state)
    with dispatch.recorded() as choices:
        traced = step_function.trace(state, batch)  # JAX caches this trace, so lowering and the steps reuse it
    run.say(kernels(choices))
    run.say("compiling the step")
    check_program(traced.lower().compile(), "the step", run.mesh)
    folder = None
    if processes.is_writer():
        # The folder is written only now, so that a failed start leaves no folder.
        write_config(run.folder, run.config, run.data.tokenizer, run.data.files)
        run.log, folder = MetricsLog(run.folder, after_step=step), Path(run.folder) / "profile" if profile else None
    run.trace = StepTrace(folder, step, run.config.train.steps, run.say)
    with contextlib.ExitStack() as stack:
        if run.log:
            stack.enter_context(contextlib.closing(run.log))
            run.listeners.append(stack.enter_context(tracker(run.config, run.folder)))
        stack.enter_context(run.trace)
        return _loop(run, step_function, state, batch)


def _loop(run: Run, step_function: Callable, state: TrainState, batch: dict) -> Result:
    config, mesh, steps = run.config, run.mesh, run.config.train.steps
    pace = Pace(
        config.data.tokens_per_step, family_of(config.model).flops_per_token(config.model, config.data.T), _peak(mesh)
    )
    first = step = good = saved = int(state.step)  # `good`: the last step with a finite loss and gradient
    bad_steps, stopped_by = 0, int(processes.any_process(mesh, run.asked()))
    while not stopped_by and step < steps:
        data_state = run.loader.get_state()  # the position of the data after the batch of this step
        run.trace.before(step)
        pace.before()
        state, metrics = step_function(state, batch)
        asked_any = processes.any_process(mesh, run.asked(), after=metrics["loss"])  # all processes stop together
        batch = run.next_batch()  # prepared while the device computes the step
        metrics = jax.device_get(metrics)
        pace.after()
        step += 1
        run.trace.after(step)
        bad_steps = int(metrics["bad_steps"])
        good = good if bad_steps else step
        if bad_steps >= config.train.max_bad_steps:
            raise run.not_finite(f"step {step}: the loss or the gradient was not finite in {bad_steps} steps in a row")
        stopped_by = int(asked_any)
        ends = bool(stopped_by) or step == steps
        with pace.paused():
            scores, score = run.validate(step, state)
        if step % config.train.log_every == 0 or step == steps or scores:
            row = {"step": step, "tokens": tokens_of(state), **{k: float(v) for k, v in metrics.items()}}
            run.report(row | run.data.metrics(data_state) | pace.row() | scores)
        best = score is not None and run.checkpoints.is_best(step, score)
        # If the last steps were skipped, `state` still has the parameters of the last good step, so it can be saved.
        if good > first and (ends or (not bad_steps and (best or step % config.train.checkpoint_every == 0))):
            run.save(state, data_state, score)
            saved = step
    run.checkpoints.wait()
    if step == steps and good == first:
        raise run.not_finite(f"no step from {first + 1} to {step} had a finite loss and gradient")
    pace.end()
    if bad_steps:
        run.say(f"the last {bad_steps} steps were skipped, because their loss or gradient was not finite")
    if step < steps:
        kept = f"saved at {saved}" if saved else "with nothing to save"
        run.say(f"stopped at step {step}, {kept}; run the same command again to go on")
        return Result(state, False, pace.rate, pace.outside, stopped_by, run.folder)
    if pace.rate:
        run.say(f"step {step}: {pace.rate:,.0f} tokens/s, {pace.outside:.1%} of the time outside the jitted step")
    return Result(state, True, pace.rate, pace.outside, run=run.folder)


def _peak(mesh: Mesh | None) -> float | None:
    return peak_flops(1 if mesh is None else mesh.size)
