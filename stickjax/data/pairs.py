"""Pairs of sentences for the evaluation of a classifier."""

from stickjax.config import Config
from stickjax.data.examples import examples_of
from stickjax.data.tasks import Examples


def pair_examples(config: Config, part: str, **options) -> Examples:
    """Return the pairs of sentences for the classifier of a config; `part` is "train", "valid" or "test".

    Texts have at most `config.data.T` tokens, or T if it is one of the `options`; the others are passed to the source,
    such as `buckets` to `stickjax.data.tasks.logic.examples`. Raises ValueError if the source has no pairs, or no
    buckets.
    """
    if "buckets" in options and config.data.source != "logic":
        raise ValueError(f"pairs by their number of operators need source='logic', not {config.data.source!r}")
    return examples_of(config, part, **{"T": config.data.T} | options)
