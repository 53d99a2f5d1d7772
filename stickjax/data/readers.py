"""Choose the training data of a model, and the sizes that follow from it: a text, or examples."""

from collections.abc import Callable
from typing import NamedTuple

from stickjax.config import Config
from stickjax.data.batches import TrainingData, text_data
from stickjax.data.examples import TASKS_OF, example_data, task_of
from stickjax.data.tokenizer import load_tokenizer


class Reader(NamedTuple):
    """The functions that read one kind of training data, such as a text.

    `data(config)` returns the training data. `ids(config)` returns the sizes that a model needs for it, as {field of
    the model config: number}, such as {"V": 12, "classes": 7}: V is the number of ids, V_target the number of ids of
    targets of translations, and classes the number of labels. `source(config)` returns a text for messages that says
    where they come from, such as "tokenizer='byte'".
    """

    data: Callable[[Config], TrainingData]
    ids: Callable[[Config], dict[str, int]]
    source: Callable[[Config], str]


_EXAMPLES = Reader(example_data, lambda config: task_of(config).ids, lambda config: task_of(config).name)
# {`reads` of the config of a model: its reader}
READERS = {
    "text": Reader(
        text_data,
        lambda config: {"V": load_tokenizer(config.data.tokenizer, config.data.eot).vocab_size},
        lambda config: f"tokenizer={config.data.tokenizer!r}",
    ),
} | dict.fromkeys(TASKS_OF, _EXAMPLES)


def training_data(config: Config) -> TrainingData:
    """Load the training data that the model of a config reads: a text, pairs, sentences or translations.

    Raises ValueError if the source cannot be read, or does not have the kind of data that the model reads.
    """
    return READERS[config.model.reads].data(config)
