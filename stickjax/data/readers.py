"""Choose the training data and the vocabulary of a model: a text, or pairs of sentences."""

from collections.abc import Callable
from typing import NamedTuple

from stickjax.config import Config
from stickjax.data.batches import TrainingData, text_data
from stickjax.data.pairs import pair_data
from stickjax.data.tasks import logic
from stickjax.data.tokenizer import load_tokenizer


class Reader(NamedTuple):
    """The functions that read one kind of training data, such as a text.

    `data(config)` returns the training data, and `ids(config)` returns the vocabulary size. `source(config)` returns a
    text for messages that says where the vocabulary comes from, such as "tokenizer='byte'".
    """

    data: Callable[[Config], TrainingData]
    ids: Callable[[Config], int]
    source: Callable[[Config], str]


# {`reads` of the config of a model: its reader}
READERS = {
    "text": Reader(
        text_data,
        lambda config: load_tokenizer(config.data.tokenizer, config.data.eot).vocab_size,
        lambda config: f"tokenizer={config.data.tokenizer!r}",
    ),
    "pairs": Reader(pair_data, lambda config: len(logic.VOCABULARY), lambda config: f"pairs of {config.data.source}"),
}


def training_data(config: Config) -> TrainingData:
    """Load the training data that the model of a config reads: a text, or pairs of sentences.

    Raises ValueError if the source cannot be read, or does not have the kind of data that the model reads.
    """
    return READERS[config.model.reads].data(config)
