"""Labelled pairs of sentences for a classifier."""

from stickjax.config import Config
from stickjax.data.examples import examples_of
from stickjax.data.tasks import Examples


def pair_examples(config: Config, part: str, **options) -> Examples:
    """Return labelled pairs of sentences to train or test the classifier of a config.

    The model of the config must read pairs. `part` is "train", "valid" or "test".

    `options` are keyword arguments of the source's function `examples`, such as `buckets` of
    `stickjax.data.tasks.logic.examples`. T is one of them: the largest number of tokens of a sentence. The default is
    `config.data.T`.

    Raises ValueError if `config.data.source` has no pairs, if `buckets` is given for another source than "logic", or if
    a sentence has more than T tokens.
    """
    if "buckets" in options and config.data.source != "logic":
        raise ValueError(f"buckets of pairs need data.source='logic', not {config.data.source!r}")
    return examples_of(config, part, **{"T": config.data.T} | options)
