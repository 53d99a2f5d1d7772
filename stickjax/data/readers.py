"""Load the training data of a model, which is a text or examples, and find the model sizes that depend on the data."""

from collections.abc import Callable
from typing import NamedTuple

from stickjax.config import Config
from stickjax.data.batches import TrainingData, text_data
from stickjax.data.examples import TASKS_OF, example_data, task_of
from stickjax.data.tokenizer import load_tokenizer


class Reader(NamedTuple):
    """Three functions for training data of one form, such as a text or pairs of sentences. Each takes a Config.

    `data`: returns the training data.
    `ids`: returns the sizes that the model needs as {field of the model config: number}, such as {"V": 12,
      "classes": 7}. V is the number of token ids. V_target is the number of token ids of the target texts, if the data
      are translations. classes is the number of labels.
    `source`: returns where the ids come from, as a text for messages, such as "tokenizer='byte'".
    """

    data: Callable[[Config], TrainingData]
    ids: Callable[[Config], dict[str, int]]
    source: Callable[[Config], str]


_EXAMPLES = Reader(example_data, lambda config: task_of(config).ids, lambda config: task_of(config).name)
# {what a model reads, as in the field `reads` of its config: the functions for data of this form}
READERS = {
    "text": Reader(
        text_data,
        lambda config: {"V": load_tokenizer(config.data.tokenizer, config.data.eot).vocab_size},
        lambda config: f"tokenizer={config.data.tokenizer!r}",
    ),
} | dict.fromkeys(TASKS_OF, _EXAMPLES)


def training_data(config: Config) -> TrainingData:
    """Load the training data of a config, in the form that its model reads.

    A language model reads a text. A classifier reads pairs of sentences or single sentences. A model of translations
    reads translations.

    Raises ValueError if `config.data.source` cannot be read, or does not have data of the form that the model reads.
    """
    return READERS[config.model.reads].data(config)
