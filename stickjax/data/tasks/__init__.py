"""Synthetic tasks, whose examples are generated when they are needed. The same seed generates the same examples.

Every task is a module with two functions, and with vocabularies whose id 0 is padding:

    examples(part, *, seed, ...) -> Examples   random access to dictionaries of arrays; part is such as "train"
    text(seed, count) -> Iterator[str]         `count` different lines of text for a language model

`stickjax.data.task_loader` makes batches of examples. `documents` joins lines of text into documents, for a config
whose source of text is the task, such as `DataConfig(source="listops")`.
"""

from collections.abc import Iterator

from stickjax.data.tasks import listops, logic, questions, recall, scan
from stickjax.data.tasks.encoding import Examples, Parts, Vocabulary

__all__ = ["TASKS", "Examples", "Parts", "Vocabulary", "documents"]

TASKS = {"listops": listops, "logic": logic, "questions": questions, "recall": recall, "scan": scan}


def documents(task: str, count: int) -> Iterator[str]:
    """Yield documents made of `count` lines of a task. A document ends when it has 4096 characters or more.

    The lines are `text(0, count)` of the task, so they are the same in every run.

    >>> [len(document) for document in documents("logic", 100)]
    [4112, 194]
    """
    lines, size = [], 0
    for line in TASKS[task].text(0, count):
        lines.append(line + "\n")
        size += len(lines[-1])
        if size >= 4096:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)
