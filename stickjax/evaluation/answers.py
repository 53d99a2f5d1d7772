"""Apply a trained classifier or translation model to new texts: predict labels or translations, and induce trees."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from stickjax.config import Config
from stickjax.data.examples import task_of
from stickjax.data.task import Task
from stickjax.data.tasks import Examples
from stickjax.data.tasks.encoding import closing_brackets
from stickjax.evaluation.examples import batches_of
from stickjax.models.families import family_of
from stickjax.models.ordered_memory.parse import Tree

B = 128  # the largest number of texts in one call of the model
Text = str | tuple[str, str]


def predict(model, config: Config, texts: Sequence[Text]) -> list[str]:
    """Return an answer for each text: the most probable label, or the translation.

    Args:
      model: the module with the parameters.
      config: the config of the model. Its data section names the task, such as source="listops".
      texts: the texts, in the form of the training data. For a model that reads pairs, a text is a tuple (left, right).

    Raises:
      ValueError: the model is a language model; a text contains no tokens; a word is unknown to the task; or a text has
        the wrong form: it must be a tuple of two texts for a model that reads pairs, and a string for other models.
    """
    task, family = task_of(config), family_of(config.model)
    run = jax.jit(family.predict)
    text_of = task.decode["target"] if "target" in task.decode else lambda label: task.labels[label]
    return _answers(config, texts, lambda batch: [text_of(answer) for answer in jax.device_get(run(model, batch))])


def induced_trees(model, config: Config, texts: Sequence[Text]) -> list[Tree] | list[tuple[Tree, Tree]]:
    """Return the binary tree that the model induces over the tokens of each text; for a pair, a tuple of two trees.

    `stickjax.evaluation.trees` prints, draws and compares trees. The arguments and the errors are the same as
    in `predict`. If the model induces no trees, ValueError is raised too.
    """
    task, family = task_of(config), family_of(config.model)

    def trees(batch):
        found = family.induced_trees(model, batch)
        if found is None:
            raise ValueError(
                f"this model of family={config.model.family!r} induces no trees; use a model that does: one of "
                "family='ordered_memory', or of family='latent_tree' with encoder='ordered_memory'"
            )
        return list(zip(*found.values(), strict=True))

    found = _answers(config, texts, trees)
    return found if len(task.inputs) == 2 else [tree for (tree,) in found]


def _answers(config: Config, texts: Sequence[Text], answer: Callable[[dict], list]) -> list:
    """Return the answer for each text, in the order of `texts`.

    A batch is a dictionary of arrays. `answer(batch)` returns the list of the answers for the examples of the batch.
    """
    task = task_of(config)
    names, encoders = task.inputs, [task.encode]
    if "brackets" in family_of(config.model).example_batch(config):
        names, encoders = (*names, "brackets"), [*encoders, lambda text: closing_brackets(task.brackets(text))]
    rows = [(i, *_encoded(task, encoders, i, text)) for i, text in enumerate(texts)]
    size = max((len(ids) for _, *row in rows for ids in row), default=0)

    def arrays(row) -> dict[str, np.ndarray]:
        return {name: np.pad(ids, (0, size - len(ids))) for name, ids in zip(names, row[1:], strict=True)}

    examples = Examples(rows, arrays, (names,), lambda row: (max(map(len, row[1:])),))
    found = {}
    for batch, own in batches_of(examples, min(B, max(1, len(rows)))):
        found |= {row[0]: value for row, value in zip(own, answer(batch), strict=False)}  # a batch may repeat a row
    return [found[i] for i in range(len(rows))]


def _encoded(task: Task, encoders: Sequence[Callable], index: int, text: Text) -> list[np.ndarray]:
    """Return the arrays of a text, or of both texts of a pair. Each function in `encoders` makes one array from a text.

    `index` is the index of the text, for messages. Raise ValueError if the text has the wrong form or no tokens.
    """
    parts, count = (text,) if isinstance(text, str) else tuple(text), len(task.inputs)
    if len(parts) != count:
        form = "a tuple of two texts (left, right)" if count == 2 else "a string"
        raise ValueError(f"texts[{index}] must be {form}, not {text!r:.80}")
    try:
        encoded = [np.asarray(encode(part), np.int32) for part in parts for encode in encoders]
    except ValueError as error:
        raise ValueError(f"texts[{index}]: {error}") from None
    if not all(map(len, encoded)):
        part = ": one of the two texts" if count == 2 else ""
        raise ValueError(f"texts[{index}]{part} has no tokens: {text!r:.80}")
    return encoded
