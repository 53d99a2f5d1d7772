"""Training: a loop around the jitted step that logs, checkpoints, resumes and stops cleanly.

python -m stickjax.train configs/tiny.py [--run DIR] [--section.field=value ...]
"""

import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax

from stickjax import processes, sharding
from stickjax.banner import banner
from stickjax.checkpoint import Checkpoints, check_finite, named_leaves
from stickjax.command import Parser, command
from stickjax.config import Config, DataConfig
from stickjax.data import training_data
from stickjax.metrics import MetricsLog, flops_per_token, peak_flops, stop_trace
from stickjax.options import describe, load_config, parse
from stickjax.progress import Progress
from stickjax.run import (
    PLACES,
    check_config,
    check_tokenizer,
    load,
    placed,
    read_config,
    with_own_tokenizer,
    write_config,
)
from stickjax.step import TrainState, init_state, jit_step, tokens_of, with_params
from stickjax.vocabulary import with_vocabulary


class Result(NamedTuple):
    """How a run ended. `outside`: share of the wall time spent outside the jitted step, its compilation left out."""

    state: TrainState
    finished: bool
    tokens_per_second: float
    outside: float


@contextlib.contextmanager
def _stop_signals():
    """`asked()` turns true on SIGTERM or Ctrl-C, or without the launcher; a second Ctrl-C interrupts at once."""
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
        yield lambda: bool(asked) or processes.orphaned()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _start(
    config, mesh, data, checkpoints, init_from: str | None, branch: str | None, say
) -> tuple[TrainState, dict | None]:
    """The state and the data iterator's state to begin with: resumed, branched, or new (from other parameters)."""
    key = jax.random.key(config.train.seed)
    abstract = placed(mesh, jax.eval_shape(lambda: init_state(config, key)))
    if (restored := checkpoints.restore(abstract)) is not None:
        source, data_state = f"{checkpoints.folder.parent}@{restored.step}", restored.extra["data"]
        check_tokenizer(restored.extra, config, data.tokenizer, source)
        if restored.extra["corpus"] != data.hash:
            raise ValueError(
                f"the text has changed: {data.source} is now {data.hash}, "
                f"{source} was trained on {restored.extra['corpus']}"
            )
        say(f"resuming {source}")
    elif branch is not None:
        run, step = split_branch(branch)
        restored = Checkpoints(run).restore(abstract, step=step)
        if restored is None:
            raise ValueError(f"{run} has no checkpoint to branch from")
        source = f"{run}@{restored.step}"
        check_tokenizer(restored.extra, config, data.tokenizer, source)
        config.check_lengths(restored.step, tokens_of(restored.state))
        # A decay is often trained on other text than the stable phase; that text is read from its beginning.
        same_text = restored.extra["corpus"] == data.hash
        data_state = _position(restored.extra, config.data) if same_text else None
        say(f"branching from {source}" + ("" if data_state else ", with other text"))
    else:
        config.check_lengths()
        places = None if mesh is None else sharding.shardings(mesh, abstract)
        # The key is an argument: XLA would work out the draws from a constant one itself, while it compiles.
        state = jax.jit(lambda key: init_state(config, key), out_shardings=places)(key)
        if init_from is not None:
            loaded = load(init_from, mesh=mesh)
            ours, theirs = (
                {name: leaf.shape for name, leaf in named_leaves(tree).items()} for tree in (state.params, loaded.model)
            )
            if ours != theirs:
                changed = [d for d in loaded.config.diff(config) if d.startswith("model.")]
                raise ValueError(f"--init-from {init_from} is another model ({'; '.join(changed)})")
            # A published model is often stored in a smaller type than it is trained in.
            state = with_params(config, state, loaded.model)
            say(f"parameters from {init_from}@{loaded.step}")
        return state, None
    check_finite(restored.state.params, source)
    return restored.state, data_state


def _position(extra: dict, data: DataConfig) -> dict:
    """Where the data goes on for batches of perhaps another size: behind all the sequences that were seen."""
    before, index = extra["config"]["data"], extra["data"]["next_index"]
    return extra["data"] | {"next_index": -(-index * before["B"] * before["T"] // data.tokens_per_step)}


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
      ValueError: bad input, a folder of another config, or one in which another process is training.
      FloatingPointError: `max_bad_steps` steps in a row were not finite; the last good checkpoint is kept.
      OSError: a checkpoint or the metrics could not be written.
    """
    config = with_own_tokenizer(run, config)
    data = training_data(config)
    if config.model.V is None and (Path(run) / "config.json").exists():
        config = config.replace({"model.V": read_config(run).model.V})  # on another mesh it could be another multiple
    config = with_vocabulary(config, data.vocab_size)
    mesh = sharding.make_mesh(config)
    loader = data.loader(*sharding.rows_of_process(mesh))
    fields = {f"{s}.{n}": value for s, section in config.to_dict().items() for n, value in section.items()}
    content = {"text": data.hash, "tokenizer": data.tokenizer and data.tokenizer.name}
    # The same text and tokenizer may lie elsewhere on another machine.
    processes.check_same(content | {name: value for name, value in fields.items() if name not in PLACES})
    quiet = quiet or not processes.is_writer()
    with Progress(config, quiet=quiet) as progress, Checkpoints(run, config.train.keep) as checkpoints:
        check_config(run, config)  # nobody else writes the folder now
        progress.say(banner(config, data, mesh))
        state, data_state = _start(config, mesh, data, checkpoints, init_from, branch, progress.say)
        if data_state is not None:
            loader.set_state(data_state)
        log, trace, step = None, None, int(state.step)
        if processes.is_writer():
            write_config(run, config, data.tokenizer)  # only now: a start that is refused leaves no folder behind
            log, trace = MetricsLog(run, after_step=step), Path(run) / "profile" if profile else None
        with contextlib.closing(log) if log else contextlib.nullcontext(), _stop_signals() as asked:
            return _loop(
                config,
                mesh,
                state,
                loader,
                data,
                checkpoints,
                log,
                progress,
                asked,
                trace,
            )


def _loop(config, mesh, state, loader, data, checkpoints, log, progress, asked, profile) -> Result:
    step_function = jit_step(config, mesh, state)
    tokens, peak = config.data.tokens_per_step, peak_flops(1 if mesh is None else mesh.size)
    per_token = flops_per_token(config.model, config.data.T)
    tokenizer = data.tokenizer and data.tokenizer.name
    first = step = saved = int(state.step)
    inside, started = 0.0, time.perf_counter()
    batch, bad_steps = sharding.place(mesh, next(loader), config.train.accumulate), 0
    stop = bool(processes.any_process(mesh, asked())) or step >= config.train.steps
    while not stop:
        data_state = loader.get_state()  # behind the batch of this step, before the next one is taken
        if profile and step == first + 3:
            jax.profiler.start_trace(str(profile))
        begun = time.perf_counter()
        state, metrics = step_function(state, batch)
        asked_any = processes.any_process(mesh, asked(), after=metrics["loss"])  # all stop at one step
        batch = sharding.place(mesh, next(loader), config.train.accumulate)  # while the device works
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        step += 1
        if step == first + 1:
            started = now  # the first step compiled
        else:
            inside += now - begun
        if profile and step == first + 6:
            stop_trace(profile)
        bad_steps = int(metrics["bad_steps"])
        if bad_steps >= config.train.max_bad_steps:
            checkpoints.wait()
            raise FloatingPointError(
                f"step {step}: {bad_steps} steps in a row were not finite; "
                f"the last good checkpoint is step {max(checkpoints.steps(), default=0)}"
            )
        stop = bool(asked_any) or step == config.train.steps
        if step % config.train.log_every == 0 or step == config.train.steps:
            rate = (step - first - 1) * tokens / max(now - started, 1e-9)
            row = {"step": step, "tokens": tokens_of(state), **{k: float(v) for k, v in metrics.items()}}
            row["tokens_per_second"] = rate
            if peak:
                row["mfu"] = rate * per_token / peak
            if log:
                log.write(row)
            progress.update(row)
        if not bad_steps and (step % config.train.checkpoint_every == 0 or stop):
            hashes = {"corpus": data.hash, "tokenizer": tokenizer}
            extra = hashes | {"data": data_state, "tokens": tokens_of(state), "config": config.to_dict()}
            checkpoints.save(step, state, extra)
            saved = step
    checkpoints.wait()
    total = max(time.perf_counter() - started, 1e-9)
    rate, outside = max(step - first - 1, 0) * tokens / total, max(0.0, 1 - inside / total)
    finished = step >= config.train.steps
    if finished:
        progress.say(f"step {step}: {rate:,.0f} tokens/s, {outside:.1%} of the time outside the jitted step")
    else:
        progress.say(f"stopped at step {step}, saved at {saved}; run the same command again to go on")
    return Result(state, finished, rate, outside)


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m stickjax.train", add_help=False)
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a name such as tiny, a .py file, a config.json")
    parser.add_argument("--run", help="run folder; runs/NAME of the config file by default")
    parser.add_argument("--init-from", metavar="RUN", help="begin with the parameters of another run")
    parser.add_argument(
        "--from", dest="branch", metavar="RUN@STEP", help="go on from a checkpoint under a changed config"
    )
    parser.add_argument("--dry-run", action="store_true", help="compile the step, say what it takes, and write nothing")
    parser.add_argument("--profile", action="store_true", help="write a trace of a few steps to RUN/profile")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes, where process 0 listens")
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are; stickjax.launch starts them")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    words, rest = parser.parse_with_fields(argv)
    if not words.help:
        processes.initialize(words.coordinator, words.processes, words.process)
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
    if words.dry_run:
        from stickjax.plan.report import dry_run

        dry_run(config)
        return 0
    run = words.run or str(Path("runs") / Path(words.config).stem)
    fit(config, run, init_from=words.init_from, branch=words.branch, profile=words.profile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
