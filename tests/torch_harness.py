"""Run tasks of lm-evaluation-harness with transformers, without jax: python tests/torch_harness.py TASKS OUT FOLDER...

TASKS is a folder with the YAML files of the tasks, and each FOLDER is a Hugging Face folder. The results are written to
the JSON file OUT, as {FOLDER: {"scores": {task: {"metric,filter": number}}, "requests": {kind: requests}}}. A kind of
requests is, for example, "loglikelihood". `requests` is a list with [arguments, answer of the model] for each request.
"""

import json
import sys
from pathlib import Path

import lm_eval
import torch
import transformers
from lm_eval.tasks import TaskManager


def run(folder: str, tasks: str) -> dict:
    manager = TaskManager(include_path=tasks, include_defaults=False)
    options = dict(pretrained=folder, dtype="float32", trust_remote_code=True)
    found = lm_eval.simple_evaluate(
        "hf", options, manager.all_subtasks, task_manager=manager, device="cpu", batch_size=4
    )
    requests: dict[str, list] = {}
    for task, samples in found["samples"].items():
        kind = found["configs"][task]["output_type"].replace("multiple_choice", "loglikelihood")
        for sample in samples:
            answers = [answer for (answer,) in sample["resps"]]
            requests.setdefault(kind, []).extend(zip(sample["arguments"], answers, strict=True))
    return {"scores": found["results"], "requests": requests}


if __name__ == "__main__":
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    _, tasks, out, *folders = sys.argv
    Path(out).write_text(json.dumps({folder: run(folder, tasks) for folder in folders}))
