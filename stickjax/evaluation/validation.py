"""Validation: during a training, measure repeatedly how good the model is on data that it is not trained on.

A language model is scored by its loss on held-out text. A model that reads examples, such as a classifier, is scored by
its accuracy on the part "valid" of the examples. The data are chosen once, and are the same in every validation.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from stickjax.config import Config
from stickjax.data.batches import TrainingData
from stickjax.data.corpus import Corpus
from stickjax.data.examples import examples_of
from stickjax.data.heldout import heldout_windows
from stickjax.data.tasks import Examples
from stickjax.evaluation.examples import batches_of, right_answers
from stickjax.evaluation.held_out import total_sums
from stickjax.models.families import family_of
from stickjax.parallel.mesh import on_one_device


class Validation(NamedTuple):
    """How a training measures its model on data that the model is not trained on.

    `measure`: a function from the model to its scores, {name of a metric: number}. On a mesh, the model is sharded, and
      every process must call the function.
    `metric`: the name of the score that decides which model is the best one.
    `sign`: 1 if a lower score is better, as for a loss; -1 if a higher score is better, as for an accuracy.
    `summary`: a line that says what is measured.
    """

    measure: Callable[..., dict[str, float]]
    metric: str
    sign: int
    summary: str


def validation_of(config: Config, data: TrainingData) -> Validation | str:
    """Return the validation of a training. If the data have no part for it, return a line that gives the reason.

    Args:
      config: the config of the training. At most `train.eval_tokens` tokens are scored, but always at least one window
        of text, or one example.
      data: the training data of this config.

    Raises ValueError if the config field `data.valid_every` asks for a part "valid", but the part has no examples or
    cannot be made.

    >>> from stickjax.config import SutConfig
    >>> from stickjax.data.readers import training_data
    >>> config = Config(SutConfig(classes=7)).replace({"data.source": "logic", "data.examples": 1000, "data.T": 50})
    >>> validation_of(config, training_data(config))[:76]
    'validation is not available: valid_every=0 leaves no examples for validation'
    """
    if data.heldout is not None:
        return _of_text(config, data.heldout)
    try:
        examples = examples_of(config, "valid")
    except ValueError as error:
        if config.data.valid_every:
            raise
        return f"validation is not available: {error}"
    return _of_examples(config, examples, data.source)


def _of_text(config: Config, corpus: Corpus) -> Validation:
    """Return the `Validation` that measures a language model's loss on the held-out text, with contexts of T tokens."""
    windows = heldout_windows(corpus, config.data.T, lengths=(1,), max_tokens=config.train.eval_tokens)
    tokens, mask = windows.pieces(1)
    B = config.data.B // config.train.accumulate  # a microbatch of B sequences fits into memory
    targets = int(windows.targets.sum())

    def measure(model) -> dict[str, float]:
        nll = total_sums(model, tokens, mask, B)["nll"]
        bits = nll / math.log(2)
        return {
            "heldout_loss": nll / targets,
            "heldout_bits_per_byte": bits / windows.bytes if windows.bytes else math.nan,
        }

    return Validation(measure, "heldout_loss", 1, f"{targets:,} held-out tokens ({windows.bytes:,} bytes)")


def _of_examples(config: Config, examples: Examples, source: str) -> Validation:
    """Return the validation of a model that reads examples: its accuracy on `examples`, the part "valid".

    The examples that are used are drawn at random: as many as fit into `train.eval_tokens` tokens, but at least one.
    They are the same in every run. `source` is the name of the examples in messages.

    Raises ValueError if there are no examples.
    """
    if not len(examples):
        raise ValueError(f"the part 'valid' of {source} has no examples; use a smaller data.valid_every, or more data")
    order = np.random.default_rng(0).permutation(len(examples))
    tokens = np.cumsum(examples.lengths().sum(1)[order])
    chosen = order[: max(1, int((tokens <= config.train.eval_tokens).sum()))]
    examples = examples.with_rows([examples.rows[i] for i in chosen])
    batches = [(batch, len(rows)) for batch, rows in batches_of(examples, config.data.B)]
    predict = jax.jit(family_of(config.model).predict)

    def measure(model) -> dict[str, float]:
        model = on_one_device(model)
        right = sum(int(right_answers(predict, model, batch, count)[0].sum()) for batch, count in batches)
        return {"valid_accuracy": right / len(examples)}

    return Validation(measure, "valid_accuracy", -1, f"{len(examples):,} {source}")
