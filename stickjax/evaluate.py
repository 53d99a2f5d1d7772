"""Compute held-out bits per byte with contexts of 1, 2, 4 and 8 times the training length, always on the same text.

python -m stickjax.evaluate RUN [RUN ...] [--lengths 1,2,4] [--plot PNG] [--mesh.fsdp=8]

For a model that reads examples, such as a classifier, the command computes the accuracy instead (see
`stickjax.evaluation.examples`). For a Universal Transformer on the test examples of the data source "logic" without
`data.split`, the command computes the accuracy at several halting thresholds (see `stickjax.evaluation.pairs`).

With --tasks, the command runs tasks of lm-evaluation-harness instead (see `stickjax.evaluation.harness`).

A language model is evaluated on the mesh of its run, or on the mesh that the options --mesh.* describe. This machine
may have too few devices for the mesh of the run. Then the command uses one device. But if an option --mesh.* is given,
or if there are several processes, a mesh that cannot be made is an error.

The command writes numbers and pictures into the run folders. It writes nothing into a folder that is read-only or in
the Hugging Face layout.
"""

import functools
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.table import Table

from stickjax.config import Config
from stickjax.config.command import Parser, UsageError, command, number, say_error, step_or_best
from stickjax.config.command_line import parse_changes
from stickjax.data.corpus import load_corpora
from stickjax.data.examples import task_of
from stickjax.data.heldout import check_lengths, heldout_windows
from stickjax.evaluation import bias, examples, harness, plots
from stickjax.evaluation import pairs as accuracy
from stickjax.evaluation.held_out import total_sums
from stickjax.evaluation.plots import Records
from stickjax.generate import generate
from stickjax.models.families import family_of
from stickjax.parallel import processes
from stickjax.parallel.mesh import on_one_device
from stickjax.storage.hub import local_folder
from stickjax.storage.run_config import read_config
from stickjax.storage.run_folder import Loaded, load, results_folder
from stickjax.system.allocator import keep_freed_memory
from stickjax.system.disk import write_file
from stickjax.system.tables import print_table
from stickjax.system.text import json_text, printable
from stickjax.training.metrics import read_metrics

LENGTHS = (1, 2, 4, 8)


def evaluate(
    model: nnx.Module,
    config: Config,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    max_tokens: int = 2**17,
    batch_tokens: int = 2**13,
    say: Callable[[str], None] = lambda text: None,
) -> Records:
    """Compute the bits per byte of the held-out text, with contexts of m * T tokens for every m in `lengths`.

    The text is divided into windows of max(lengths) * T tokens, each inside one document. A shorter document, or the
    rest of a document, is a shorter window. For each m, the windows are cut into pieces of m * T tokens. The model
    reads every piece alone, without the previous piece. So the same tokens are predicted for every m, and a larger m
    only adds context.

    Args:
      model: the module with the parameters. If it is sharded on a mesh, all devices of the mesh evaluate it together.
      config: its data section names the text and the training length T.
      lengths: the values of m. Each must divide the largest one. If no document has m * T tokens, m is left out. The
        smallest m is never left out.
      max_tokens: the largest number of tokens to predict. At least one window is used, even if it has more tokens.
      batch_tokens: the largest number of tokens in one call of the model. A call has at least one piece, even if the
        piece has more tokens. On a mesh that divides a batch into n parts, a call has at least n pieces.
      say: a function that is called with a line of progress before the evaluation for each m.

    Returns:
      A record for each m that is not left out: "multiple" (m), "context" (m * T), "bits_per_byte", "bits_per_token",
      "tokens" (the number of predicted tokens), "bytes" (the number of bytes of their text) and "text" (a hash of the
      held-out text). For a model that halts tokens, such as a Universal Transformer, a record also has "depth": the
      mean number of blocks per token.

    Raises:
      ValueError: a length does not divide the largest one, `max_tokens` is below 1, or the text cannot be read.
    """
    _, heldout = load_corpora(config.data)
    windows = heldout_windows(heldout, config.data.T, lengths=lengths, max_tokens=max_tokens)
    tokens = int(windows.targets.sum())
    records = []
    for m in windows.lengths:
        pieces, target_mask = windows.pieces(m)
        context = m * config.data.T
        say(f"{m}x (context {context}): compiling, then scoring {tokens:,} tokens")
        sums = total_sums(model, pieces, target_mask, max(1, batch_tokens // target_mask.shape[1]))
        bits = sums["nll"] / math.log(2)
        record = dict(
            multiple=m, context=context, bits_per_byte=bits / windows.bytes if windows.bytes else math.nan,
            bits_per_token=bits / tokens, tokens=tokens, bytes=windows.bytes, text=heldout.hash,
        )  # fmt: skip
        records.append(record | ({"depth": sums["depth"] / tokens} if "depth" in sums else {}))
    return records


def depths(model: nnx.Module, config: Config, *, lines: int = 4, T: int = 64) -> list[tuple[list[str], np.ndarray]]:
    """Return a list of (tokens as text, depth of each token) for a few pieces of held-out text, for `plot_depth`.

    `model` is a Universal Transformer, which halts tokens. The final state of a token is a weighted mean of its states
    after 1, 2, 3, ... blocks. Its depth is the mean of the numbers 1, 2, 3, ... with the same weights. A piece has at
    most T tokens, and all pieces together have at most lines * T tokens.
    """
    _, heldout = load_corpora(config.data)
    T = min(T, config.data.T)
    windows = heldout_windows(heldout, T, lengths=(1,), max_tokens=lines * T)
    model = on_one_device(model)
    found = jax.device_get(family_of(model.config).apply(model, {"tokens": windows.tokens[:, :-1]}).depth)

    def text(token: int) -> str:
        return heldout.tokenizer.decode([int(token)]).encode("unicode_escape").decode() or "<end>"

    rows = zip(windows.tokens, found, windows.targets, strict=True)
    return [([text(token) for token in row[:n]], depth[:n]) for row, depth, n in rows]


def table(runs: dict[str, Records]) -> Table:
    """Return a table of held-out bits per byte, with a row per run and a column per multiple of the training length T.

    `runs` is {name of a run: the records of `evaluate`}. If all runs have the same context in a column, the heading of
    the column shows this number of tokens. Otherwise every cell shows the context of its run. A run whose model halts
    tokens has a second row with the mean depth, in blocks.
    """
    contexts: dict[int, set[int]] = {}
    for record in (record for records in runs.values() for record in records):
        contexts.setdefault(record["multiple"], set()).add(record["context"])
    result = Table(title="held-out bits per byte")
    result.add_column("run")
    for m, all_runs in contexts.items():
        result.add_column(f"{m}x ({min(all_runs)})" if len(all_runs) == 1 else f"{m}x", justify="right")
    for name, records in runs.items():
        own = {record["multiple"]: record for record in records}
        own_context = {m: f" ({own[m]['context']})" if len(contexts[m]) > 1 else "" for m in own}
        cells = {m: f"{own[m]['bits_per_byte']:.3f}{own_context[m]}" for m in own}
        result.add_row(name, *(cells.get(m, "-") for m in contexts))
        if "depth" in records[0]:
            result.add_row("  mean depth", *(f"{own[m]['depth']:.2f}" if m in own else "-" for m in contexts))
    return result


def names(runs: Iterable[str]) -> dict[str, str]:
    """Give every run folder a short name for tables and plots, and return {name: the folder as in `runs`}.

    The name is the last part of the path. If several folders in `runs` have the same last part, more parts are added in
    front, until the names differ. A folder that occurs twice in `runs` is returned once.

    >>> list(names(["x/run", "y/run", "/data/old", "x/run/"]))
    ['x/run', 'y/run', 'old']
    """
    folders: dict[Path, str] = {}
    for run in runs:
        folders.setdefault(Path(os.path.abspath(run)), run)
    named = {}
    for path, folder in folders.items():
        parts = path.parts
        n = 1
        while any(other.parts[-n:] == parts[-n:] for other in folders if other != path):
            n += 1
        named[printable(Path(*parts[-n:]))] = folder
    return named


def _lengths(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise ValueError(
            f"--lengths={text} must be whole numbers above 0, separated by commas, such as 1,2,4; the number 2 stands "
            "for contexts of 2 * T tokens"
        )
    lengths = tuple(dict.fromkeys(map(int, words)))
    check_lengths(lengths)
    return lengths


def _parser() -> Parser:
    parser = Parser(prog="python -m stickjax.evaluate")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder, Hugging Face folder, or org/name on the hub; several: one table",
    )
    parser.add_argument("--step", type=step_or_best, help="step of the checkpoint, or best; by default the newest")
    parser.add_argument("--lengths", default="1,2,4,8", help="contexts, in multiples of T (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=2**17, help="largest number of tokens to score")
    parser.add_argument("--max-pairs", type=int, default=1024, help="largest number of examples to score per bucket")
    parser.add_argument("--part", default="test", help="examples to score: test, or valid to choose hyperparameters")
    parser.add_argument("--filtered", metavar="FILE", help="write to FILE the rows that the first run labels wrongly")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness, which need the extra eval")
    count = number(int, at_least=1)
    tasks.add_argument("--tasks", metavar="A,B", help="run these tasks, groups of tasks, or YAML files of tasks")
    tasks.add_argument("--tasks-path", metavar="DIR", help="a folder with YAML files of more tasks")
    tasks.add_argument("--num-fewshot", type=number(int, at_least=0), metavar="N", help="solved examples per question")
    tasks.add_argument("--limit", type=count, metavar="N", help="score only the first N examples of each task")
    tasks.add_argument("--max-length", type=count, metavar="N", help="tokens that the model reads at once (default: T)")
    tasks.add_argument("--json", metavar="FILE", help="write the scores here (default: tasks.json in each run folder)")
    parser.add_argument("--plot", metavar="PNG", help="path of the picture; by default in the first run's folder")
    parser.add_process_options()
    return parser


def _kind(configs: Iterable[Config], part: str) -> str:
    """Return how runs with these configs are evaluated: "text", "halting" or "examples".

    "text": bits per byte are computed.
    "halting": the accuracy is computed at several halting thresholds.
    "examples": the accuracy is computed.

    `part` says which examples are used, such as "test". Raises ValueError if the runs cannot be compared.
    """
    configs = list(configs)
    if len(reads := {config.model.reads for config in configs}) > 1:
        kinds = " and runs that read ".join(sorted(reads))
        raise ValueError(f"runs that read {kinds} cannot be compared; evaluate them in separate commands")
    if reads == {"text"}:
        if part != "test":
            raise ValueError(f"--part={part}: runs that read text have only the held-out text; leave --part out")
        return "text"
    if len(sources := {config.data.source for config in configs}) > 1:
        raise ValueError(
            f"runs on the data sources {' and '.join(sorted(sources))} cannot be compared; evaluate them in separate "
            "commands"
        )
    return "halting" if part == "test" and all(map(accuracy.scores_halting, configs)) else "examples"


# The fields of `config.data` that choose the held-out text.
_TEXT_FIELDS = ("source", "path", "mixture", "heldout_path", "heldout_every", "text_field", "examples", "split")


def _note_of_texts(results: dict[str, Records], configs: dict[str, Config]) -> str | None:
    """Return a line which says that the runs have different held-out texts; None if all have the same one.

    `results` is {name of a run: its records}, and `configs` is {name of a run: its config}. The hash of a text depends
    on the tokenizer. So two texts are the same if their hashes are equal, or if the configs choose the same text.
    """
    hashes = {name: records[0]["text"] for name, records in results.items()}
    chosen = {name: [getattr(configs[name].data, field) for field in _TEXT_FIELDS] for name in results}
    first = next(iter(results))
    if all(hashes[name] == hashes[first] or chosen[name] == chosen[first] for name in results):
        return None
    data = {name: configs[name].data for name in results}
    places = {name: d.heldout_path or d.path or d.mixture_text for name, d in data.items()}
    texts = (" ".join(filter(None, (f"{name}:", data[name].source, places[name], hashes[name]))) for name in results)
    return (
        f"the held-out texts differ, so the rows cannot be compared ({printable('; '.join(texts))}); choose one text "
        "for all runs, such as --data.source=text --data.path=FOLDER"
    )


def _records(kind: str, name: str, loaded: Loaded, place: Path | None, words, say: Callable[[str], None]) -> Records:
    """Evaluate a run, and return its records. `kind` is the result of `_kind`, and `name` is the name of the run.

    Numbers and pictures are written into the folder `place`. If `place` is None, nothing is written. `words` are the
    parsed arguments of the command. `say` is called with lines of progress.
    """
    model, config = loaded.model, loaded.config
    if kind == "halting":
        return accuracy.report(model, config, place, words.max_pairs, say)
    if kind == "examples":
        return examples.report(model, config, place, words.part, words.max_pairs, say)
    records = evaluate(model, config, lengths=words.lengths, max_tokens=words.max_tokens, say=say)
    if place:
        record = {"run": name, "step": loaded.step, "lengths": records}
        write_file(place / "evaluation.json", json_text(record, indent=2) + "\n")
    if place and "depth" in records[0]:
        plots.plot_depth(depths(model, config), place / "depth.png")
    return records


def _show(kind: str, results: dict[str, Records], bucket_name: str, picture: Path | str | None) -> None:
    """Print a table of the results of the runs, and draw curves of the results into the file `picture`.

    No curves are drawn if `picture` is None, or if all examples are in one bucket. `kind` is the result of `_kind`, and
    `results` is {name of a run: its records}. A bucket is a group of examples of about the same length. `bucket_name`
    is the unit of this length, such as "operators". It is "" if all examples are in one bucket, or if `kind` is "text".
    """
    if kind == "text":
        print_table(table(results))
        draw = plots.plot_length_curves
    elif kind == "halting":
        print_table(accuracy.table(results))
        if len(results) == 1:
            print_table(accuracy.savings(*results.values()))
        results = {name: accuracy.at_first_threshold(records) for name, records in results.items()}
        draw = plots.plot_accuracy
    else:
        print_table(examples.table(results, bucket_name))
        if not bucket_name:  # a single bucket makes no curve
            return
        draw = functools.partial(plots.plot_accuracy, xlabel=bucket_name)
    if picture:
        draw(results, picture)
        print(f"picture of the curves: {printable(picture)}")


def _check_parent(option: str, file: str | None) -> None:
    """Raise ValueError if the folder of the file that an option names does not exist."""
    if file and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"--{option}={file}: {printable(Path(file).parent)} is not a folder; make it first")


_OPTIONS_OF_TASKS = ("tasks_path", "num_fewshot", "limit", "max_length", "json")


def _run_tasks(runs: dict[str, Path], changes: dict[str, dict], words, writes: bool) -> None:
    """Run the tasks of --tasks on each run, print a table, and write the scores. `words` are the parsed arguments.

    `runs` is {name of a run: its folder}, `changes` is {name of a run: config fields to change}, and `writes` is True
    if this process prints and writes the results.
    """
    tasks = [name for word in words.tasks.split(",") if (name := word.strip())]
    if not tasks:
        raise UsageError("--tasks needs the name of a task, such as --tasks hellaswag,lambada_openai")
    _check_parent("json", words.json)
    manager = harness.task_manager(tasks, words.tasks_path)
    options = dict(num_fewshot=words.num_fewshot, limit=words.limit, max_length=words.max_length)
    results = {}
    for name, run in runs.items():
        say = lambda line, name=name: say_error(f"{name}: {line}") if writes else None  # noqa: E731
        say("reading the parameters")
        loaded = load(run, step=words.step, changes=changes[name], mesh="run")
        scores = harness.run_tasks(loaded, tasks, manager, generate, **options, say=say)
        results[name] = {"step": loaded.step, "num_fewshot": words.num_fewshot, "limit": words.limit} | scores
        elsewhere = "--json FILE writes the scores elsewhere"
        if writes and words.json is None and (place := results_folder(run, elsewhere)):
            write_file(place / "tasks.json", json_text({"run": name} | results[name], indent=2) + "\n")
        if writes and words.json is not None:  # after every run, so that an error in the next run loses nothing
            write_file(Path(words.json), json_text(results, indent=2) + "\n")
    if writes:
        print_table(harness.table({name: record["tasks"] for name, record in results.items()}))


@command
def main(argv: list[str] | None = None) -> int:
    words, rest = _parser().parse_with_fields(argv)
    keep_freed_memory()
    processes.initialize(words.coordinator, words.processes, words.process)
    writes = processes.is_writer()  # the other processes take part in the evaluation, but print and write nothing
    runs, words.lengths = names(words.runs), _lengths(words.lengths)
    runs = {name: Path(local_folder(run)) for name, run in runs.items()}
    configs = {name: read_config(run) for name, run in runs.items()}
    changes = {name: parse_changes(config, rest) for name, config in configs.items()}
    if words.tasks is not None:
        if words.plot or words.filtered:
            raise UsageError("--plot and --filtered cannot be given with --tasks, which writes only scores")
        _run_tasks(runs, changes, words, writes)
        return 0
    given = vars(words)
    if of_tasks := [name for name in _OPTIONS_OF_TASKS if given[name] is not None]:
        raise UsageError(f"--{of_tasks[0].replace('_', '-')} is an option for --tasks; give --tasks too")
    kind, first = _kind(configs.values(), words.part), next(iter(runs))
    if words.filtered:
        bias.check_filtered(configs[first].replace(changes[first]), Path(words.filtered))
    _check_parent("plot", words.plot)
    results, places = {}, {}
    for name, run in runs.items():
        say = lambda line, name=name: say_error(f"{name}: {line}") if writes else None  # noqa: E731
        say("reading the parameters")
        loaded = load(run, step=words.step, changes=changes[name], mesh="run")
        place = places[name] = results_folder(run) if writes else None
        if place and (rows := read_metrics(run)):
            plots.plot_training({name: rows}, place / "training.png")
        results[name], configs[name] = _records(kind, name, loaded, place, words, say), loaded.config
        if words.filtered and name == first:
            bias.report(loaded.model, loaded.config, Path(words.filtered), say)
    if not writes:
        return 0
    file = "length.png" if kind == "text" else "accuracy.png"
    bucket_name = "" if kind == "text" else task_of(configs[first]).bucket_name
    if kind == "text" and (note := _note_of_texts(results, configs)):
        say_error(note)
    _show(kind, results, bucket_name, words.plot or (places[first] and places[first] / file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
