"""Pairs of sentences for the evaluation of a classifier."""

from stickjax.config import Config
from stickjax.data.examples import examples_of
from stickjax.data.tasks import Examples


def pair_examples(config: Config, part: str, **options) -> Examples:
    """Return labelled pairs of sentences to train or test the classifier of a config.

    `part` is "train", "valid" or "test".

    `options` are arguments for the function `examples` of the source, such as `buckets` for
    `stickjax.data.tasks.logic.examples`. A sentence has at most `config.data.T` tokens, or T if T is among the options.

    Raises ValueError if `config.data.source` has no pairs, if it has no buckets but `buckets` is one of the options, or
    if a sentence has more than T tokens.
    """
    if "buckets" in options and config.data.source != "logic":
        raise ValueError(f"pairs by their number of operators need source='logic', not {config.data.source!r}")
    return examples_of(config, part, **{"T": config.data.T} | options)
