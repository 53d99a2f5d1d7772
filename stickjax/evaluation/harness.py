"""Run tasks of EleutherAI's lm-evaluation-harness (the optional package lm_eval) on a trained language model.

The harness reads the tasks, makes requests, and computes metrics from the answers. `HarnessModel` answers the requests.
"""

import contextlib
import logging
import os
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from stickjax.config.synonyms import suggestion
from stickjax.evaluation import task_requests
from stickjax.evaluation.length_buckets import padded_length
from stickjax.storage.run_folder import Loaded

BOOTSTRAP = 1000  # the number of resamples for the standard errors that have no formula
Scores = dict[str, dict[str, Any]]


class HarnessModel:
    """Answers the three kinds of requests of the harness: it has the methods of `lm_eval.api.model.LM`.

    A request is an object with `args`, a tuple. The answers are in the order of the requests.

    Args:
      loaded: the model with its tokenizer, from `stickjax.load(run)`.
      generate: the function `stickjax.generate.generate`.
      max_length: the largest number of tokens that the model reads at once.
      say: a function that is called with a line of progress before each kind of requests is answered.
    """

    def __init__(
        self, loaded: Loaded, generate: Callable, max_length: int, say: Callable[[str], None] = lambda text: None
    ):
        super().__init__()
        self._model, self._tokenizer, self._generate = loaded.model, loaded.tokenizer, generate
        self._max_length, self._say = max_length, say
        self._first = task_requests.first_token(loaded.tokenizer)

    def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) of the continuation in each request.

        The `args` of a request are (context, continuation). A continuation is greedy if each of its tokens is the most
        likely one after the previous tokens.
        """
        pairs = [task_requests.encoded_pair(self._tokenizer, *request.args, self._first) for request in requests]
        self._say(f"scoring {len(pairs):,} continuations")
        self._say_cut(sum(len(pair.context) + len(pair.continuation) > self._max_length + 1 for pair in pairs))
        return task_requests.log_likelihoods(self._model, pairs, self._max_length)

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of the text in each request. The `args` of a request are (text,)."""
        rolling = lambda text: task_requests.rolling_pairs(self._tokenizer, text, self._max_length, self._first)  # noqa: E731
        texts = [list(rolling(*request.args)) for request in requests]
        self._say(f"scoring {len(texts):,} texts")
        scores = iter(
            task_requests.log_likelihoods(self._model, [pair for pairs in texts for pair in pairs], self._max_length)
        )
        return [sum(next(scores)[0] for _ in pairs) for pairs in texts]

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Return the text that continues each context. The `args` of a request are (context, options)."""
        groups: dict[task_requests.Sampling, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(task_requests.sampling(request.args[1]), []).append(i)
        self._say(f"continuing {len(requests):,} prompts")
        found = {}
        for sampling, rows in groups.items():
            room = task_requests.prompt_room(self._max_length, sampling.max_new_tokens)
            whole = {i: self._tokenizer.prompt(requests[i].args[0], special=True) for i in rows}
            self._say_cut(sum(len(ids) > room for ids in whole.values()))
            prompts = {i: ids[-room:] for i, ids in whole.items()}
            rows.sort(key=lambda i, prompts=prompts: -len(prompts[i]))
            while rows:  # the longest prompts first, so that too little memory is noticed early
                size = padded_length(len(prompts[rows[0]])) + sampling.max_new_tokens
                own, rows = rows[: (B := max(1, task_requests.BATCH_TOKENS // size))], rows[B:]
                # The number of rows is B or a power of two, so that few programs are compiled.
                more = min(B, 1 << (len(own) - 1).bit_length()) - len(own)
                # Another seed for every batch: tasks that draw several texts for one prompt need different draws.
                texts = self._continued([prompts[i] for i in (*own, *own[-1:] * more)], sampling, seed=len(found))
                found |= zip(own, texts, strict=False)
        return [found[i] for i in range(len(requests))]

    def _say_cut(self, count: int) -> None:
        """Say that the beginnings of `count` contexts are left out."""
        if count:
            self._say(
                f"contexts that are too long: {count:,}; their beginnings are left out, because the model reads at "
                f"most {self._max_length} tokens at once (--max-length)"
            )

    def _continued(self, prompts: list[np.ndarray], sampling: task_requests.Sampling, seed: int) -> list[str]:
        """Return the text that follows each prompt. As in the harness, the new ids are decoded without the prompt."""
        tokenizer = self._tokenizer
        ends = tokenizer.ends | {tokenizer.special_id(text) for text in sampling.stop}
        rows: list[list[int]] = [[] for _ in prompts]
        # A new stop string is in the last tokens, because a token is at least one byte. Special tokens may be no bytes;
        # then the text only becomes longer than necessary, and `cut` shortens it.
        tail = max((len(text.encode()) for text in sampling.stop), default=0) + 8

        def on_token(row: int, token: int) -> bool:
            if token in ends:
                return True
            rows[row].append(token)
            text = tokenizer.decode(rows[row][-tail:]) if sampling.stop else ""
            return any(stop in text for stop in sampling.stop)

        options = sampling._asdict()
        stop = options.pop("stop")
        self._generate(
            self._model, prompts, vocab_size=tokenizer.vocab_size, on_token=on_token, seed=seed, **options
        )  # fmt: skip
        return [task_requests.cut(tokenizer.decode(row), stop) for row in rows]


def package():
    """Return the package lm_eval. Raise ValueError if it is not installed."""
    try:
        import lm_eval
    except ImportError as error:
        raise ValueError(f"--tasks needs the package lm_eval: pip install 'stickjax[eval]' ({error})") from error
    return lm_eval


def task_manager(tasks: Sequence[str], tasks_path: str | None = None):
    """Return an object of the harness's class TaskManager, which finds and reads tasks.

    The files of all tasks of the harness are read only if necessary, because there are thousands.

    Args:
      tasks: names of tasks, groups or tags, or paths of YAML files of tasks.
      tasks_path: a folder with YAML files of more tasks.

    Raises ValueError if the package lm_eval is missing, the folder does not exist, or a task is unknown. The method
    `load` of the result raises ValueError if a task cannot be read.
    """
    package()
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        max_length: int | None = None  # the largest number of tokens that the model reads at once

        def load(self, names):
            try:
                loaded = super().load(names)
            except Exception as error:  # from the files of tasks, which may contain code, or from reading data sets
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"the tasks {', '.join(names)} cannot be read: {reason}") from error
            for task in loaded["tasks"].values():  # find wrong options before the model answers other requests
                if self.max_length is not None and task.OUTPUT_TYPE == "generate_until":
                    options = task_requests.sampling(task.get_config("generation_kwargs") or {})
                    task_requests.prompt_room(self.max_length, options.max_new_tokens)
            return loaded

    if tasks_path is not None and not os.path.isdir(tasks_path):
        raise ValueError(f"--tasks-path={tasks_path} is not a folder")
    is_file = lambda name: name.endswith((".yaml", ".yml")) and os.path.isfile(name)  # noqa: E731
    is_group = lambda name: re.search(r"^group\s*:", Path(name).read_text(errors="replace"), re.MULTILINE)  # noqa: E731
    manager = Manager(include_path=tasks_path, include_defaults=False)
    # A group or a tag may contain tasks of the harness. A single task does not.
    if all(name in manager.all_subtasks or (is_file(name) and not is_group(name)) for name in tasks):
        return manager
    manager = Manager(include_path=tasks_path)
    for name in tasks:
        if name not in manager.task_index and not is_file(name):
            more = "" if tasks_path else "; --tasks-path DIR adds the tasks of a folder"
            raise ValueError(f"unknown task {name!r}{suggestion(name, manager.all_tasks)}{more}")
    return manager


def run_tasks(
    loaded: Loaded,
    tasks: Sequence[str],
    manager,
    generate: Callable,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run tasks of the harness, and return their scores.

    Args:
      loaded: the model with its tokenizer, from `stickjax.load(run)`.
      tasks: names of tasks, groups or tags, or paths of YAML files of tasks.
      manager: the result of `task_manager(tasks)`.
      generate: the function `stickjax.generate.generate`.
      num_fewshot: the number of solved examples in front of each question; None: the number that the task
        sets, or 0 if it sets none.
      limit: the largest number of examples per task, from the first example on; None: all examples.
      max_length: the largest number of tokens that the model reads at once; None: the T of the config.
      say: a function that is called with lines of progress.

    Returns:
      A dictionary with "tasks": {name of the task: {"metric,filter": number}}, as the harness gives them; "versions",
      "n-shot" and "n-samples" of each task; "max_length"; and "lm_eval", the version of the harness.

    Raises:
      ValueError: the model is not a language model with a tokenizer, a task cannot be read, or a request is too long.
    """
    from lm_eval.api.model import LM

    config = loaded.config
    if config.model.reads != "text":
        raise ValueError(f"--tasks is for language models, and this model reads {config.model.reads}")
    if loaded.tokenizer is None:
        raise ValueError(
            f"the tokenizer {config.data.tokenizer} of the model does not exist: set data.tokenizer to the path of its "
            "tokenizer.json, or to byte for a model of bytes"
        )
    if loaded.tokenizer.vocab_size > config.model.vocabulary:
        raise ValueError(
            f"data.tokenizer={config.data.tokenizer!r} has {loaded.tokenizer.vocab_size} ids, but the model has only "
            f"V={config.model.vocabulary}; set data.tokenizer to the tokenizer of the model"
        )
    model = type("StickjaxModel", (HarnessModel, LM), {})
    max_length = manager.max_length = config.data.T if max_length is None else max_length
    with _one_process(), _errors_in_one_line(tasks):
        results = package().simple_evaluate(
            model(loaded, generate, max_length, say), tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot,
            limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False,
        )  # fmt: skip
    for task, shots in results.get("n-shot", {}).items():
        if num_fewshot is not None and shots != num_fewshot:
            say(f"{task} has {shots} solved examples in front of each question, as its file says, not {num_fewshot}")
    found = {name: results.get(name, {}) for name in ("versions", "n-shot", "n-samples")}
    scores = {task: _scores(values) for task, values in results["results"].items()}
    return dict(tasks=scores, **found, max_length=max_length, lm_eval=package().__version__)


@contextlib.contextmanager
def _errors_in_one_line(tasks: Sequence[str]):
    """A context in which an error of the harness, or of the code of a task, becomes a ValueError of one line.

    Errors that code of stickjax raises are not changed.
    """
    try:
        yield
    except Exception as error:
        here, *frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
        if any(Path(here).parents[1] in Path(file).parents for file in frames[1:]):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"lm-evaluation-harness cannot run {', '.join(tasks)}: {reason}") from error


@contextlib.contextmanager
def _one_process():
    """A context in which the harness computes standard errors in this process.

    Otherwise the harness would fork processes, which would inherit the locks of JAX. In this context, the harness also:
    - returns the results in every process, if stickjax runs as several processes;
    - prints no warnings, because most warnings are about default values in the harness's own tasks;
    - does not call git, because git prints an error outside of a repository.
    """
    from lm_eval import evaluator

    changes, logger = {"DISABLE_MULTIPROC": "1", "LOCAL_RANK": "0"}, logging.getLogger("lm_eval")
    before, level = {name: os.environ.get(name) for name in changes}, logger.level
    os.environ.update(changes)
    logger.setLevel(logging.ERROR)
    find_commit, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    try:
        yield
    finally:
        logger.setLevel(level)
        evaluator.get_git_commit_hash = find_commit
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _scores(values: dict) -> dict[str, float]:
    """Return the numbers among the results of one task, {"metric,filter": number}."""
    return {name: float(value) for name, value in values.items() if "," in name and not isinstance(value, str)}


def table(results: dict[str, Scores]) -> Table:
    """Return a table with a row for each metric of each task. `results` is {name of a run: scores of its tasks}.

    The scores of a task are {"metric,filter": number}. The standard error of a metric has the name
    "metric_stderr,filter". A filter is how a task reads an answer from a generated text; the filter "none" is not
    shown.
    """
    several = len(results) > 1
    found = Table(title="lm-evaluation-harness")
    for name in (*(["run"] if several else []), "task", "metric"):
        found.add_column(name)
    for name in ("value", "stderr"):
        found.add_column(name, justify="right")
    for run, tasks in results.items():
        for task, scores in tasks.items():
            for name, value in scores.items():
                metric, _, chosen = name.partition(",")
                if metric.endswith("_stderr"):
                    continue
                error = scores.get(f"{metric}_stderr,{chosen}")
                shown = metric if chosen == "none" else f"{metric} ({chosen})"
                cells = task, shown, f"{value:.4f}", "-" if error is None else f"{error:.4f}"
                found.add_row(*([run] if several else []), *cells)
    return found
