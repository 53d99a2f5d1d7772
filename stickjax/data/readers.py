"""Choose the training data of a model, which are a text or pairs of sentences, and its vocabulary."""

from collections.abc import Callable
from typing import NamedTuple

from stickjax.config import Config
from stickjax.data.batches import TrainingData, text_data
from stickjax.data.pairs import pair_data
from stickjax.data.tasks import logic
from stickjax.data.tokenizer import load_tokenizer


class Reader(NamedTuple):
    """The functions for one kind of training data, such as a text. Each function takes a Config.

    `data`: returns the training data.
    `ids`: returns the number of token ids, which is the size of the vocabulary of the data.
    `source`: returns a text for messages, which says where the ids come from, such as "tokenizer='byte'".
    """

    data: Callable[[Config], TrainingData]
    ids: Callable[[Config], int]
    source: Callable[[Config], str]


# {kind of data, as in the field `reads` of a model's config: the functions for this kind}
READERS = {
    "text": Reader(
        text_data,
        lambda config: load_tokenizer(config.data.tokenizer, config.data.eot).vocab_size,
        lambda config: f"tokenizer={config.data.tokenizer!r}",
    ),
    "pairs": Reader(pair_data, lambda config: len(logic.VOCABULARY), lambda config: f"pairs of {config.data.source}"),
}


def training_data(config: Config) -> TrainingData:
    """Load the training data of a config: a text for a language model, or pairs of sentences for a classifier.

    Raises ValueError if `config.data.source` cannot be read, or is not the kind of data that the model needs.
    """
    return READERS[config.model.reads].data(config)
