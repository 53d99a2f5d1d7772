"""Choose the training data of a model, and the sizes that follow from it: a text, or examples."""

from collections.abc import Callable
from typing import NamedTuple

from stickjax.config import Config
from stickjax.data.batches import TrainingData, text_data
from stickjax.data.examples import TASKS_OF, example_data, task_of
from stickjax.data.tokenizer import load_tokenizer


class Reader(NamedTuple):
    """The functions for one kind of training data, such as a text. Each function takes a Config.

    `data`: returns the training data.
    `ids`: returns the sizes of the data as {field of the model config: number}, such as {"V": 12, "classes": 7}. V is
      the number of token ids, V_target is the number of ids of the targets of translations, and classes is the number
      of labels.
    `source`: returns a text for messages, which says where the ids come from, such as "tokenizer='byte'".
    """

    data: Callable[[Config], TrainingData]
    ids: Callable[[Config], dict[str, int]]
    source: Callable[[Config], str]


_EXAMPLES = Reader(example_data, lambda config: task_of(config).ids, lambda config: task_of(config).name)
# {kind of data, as in the field `reads` of a model's config: the functions for this kind}
READERS = {
    "text": Reader(
        text_data,
        lambda config: {"V": load_tokenizer(config.data.tokenizer, config.data.eot).vocab_size},
        lambda config: f"tokenizer={config.data.tokenizer!r}",
    ),
} | dict.fromkeys(TASKS_OF, _EXAMPLES)


def training_data(config: Config) -> TrainingData:
    """Load the training data of a config, of the kind that its model reads.

    A language model reads a text. A classifier reads pairs of sentences or single sentences. A model of translations
    reads translations.

    Raises ValueError if `config.data.source` cannot be read, or is not the kind of data that the model needs.
    """
    return READERS[config.model.reads].data(config)
