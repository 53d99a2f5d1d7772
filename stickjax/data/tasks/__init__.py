"""Synthetic tasks, which are generated when they are needed. The same seed generates the same examples.

Every task is a module with

    examples(part, *, seed, ...) -> Examples   random access to dicts of arrays, part "train" or "test"
    text(seed, count) -> Iterator[str]         different lines for a language model

and vocabularies whose id 0 is padding. `stickjax.data.task_loader` makes batches of examples. `documents` makes a text
of a task, for the source with the name of the task in `DataConfig.source`.
"""

from collections.abc import Iterator

from stickjax.data.tasks import listops, logic, recall, scan
from stickjax.data.tasks.encoding import Examples, Parts, Vocabulary

__all__ = ["TASKS", "Examples", "Parts", "Vocabulary", "documents"]

TASKS = {"listops": listops, "logic": logic, "recall": recall, "scan": scan}


def documents(task: str, count: int) -> Iterator[str]:
    """Join the lines of `text` with seed 0 into documents. A document ends when it has 4096 characters or more.

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
