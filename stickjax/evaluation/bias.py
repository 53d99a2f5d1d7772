"""Find the words that reveal the label of a row, and write the held-out rows that a classifier labels wrongly.

`python -m stickjax.evaluate RUN --filtered FILE` calls `report` for a classifier of labelled rows, such as a model that
reads only the second of two texts (see `configs/nli_hypothesis_only.py`). The held-out rows are written into FILE.
"""

from collections.abc import Callable
from pathlib import Path

import jax
from rich.table import Table

from stickjax.config import Config
from stickjax.data.examples import examples_of, task_of
from stickjax.data.labelled import LabelledRows
from stickjax.data.nli_bias import Association, lines_of, word_associations
from stickjax.evaluation.examples import batches_of
from stickjax.models.families import family_of
from stickjax.system.disk import write_file
from stickjax.system.tables import print_table
from stickjax.system.text import printable


def rows_of(config: Config) -> LabelledRows:
    """Return the labelled rows that a config names. Raises ValueError if `config.data.source` is not "labelled"."""
    if config.data.source != "labelled":
        raise ValueError(f"--filtered needs a run on labelled rows (source='labelled'), not {config.data.source!r}")
    return LabelledRows(config.data, ("left", "right") if config.model.reads == "pairs" else ("tokens",))


def words_by_label(config: Config) -> dict[str, list[Association]]:
    """Find the words of the training rows that occur more often with one label than with the others.

    Return {label: [Association, ...]}. The words of a label are sorted by their pointwise mutual information with it,
    the highest first (see `word_associations`). If a row has two texts, only the words of the second text are counted.
    """
    rows = rows_of(config).records("train")
    return word_associations(((row.texts[-1], row.label) for row in rows), min_count=config.data.min_count)


def words_table(words: dict[str, list[Association]], count: int = 8) -> Table:
    """Return a table of the words that reveal a label, with a column per label.

    A column has the `count` words with the highest pointwise mutual information with the label. `words` is the result
    of `words_by_label`.
    """
    result = Table(title="words that occur with a label (pointwise mutual information in bits)")
    for label in words:
        result.add_column(label)
    for i in range(min(count, max(map(len, words.values()), default=0))):
        cells = [own[i] if i < len(own) else None for own in words.values()]
        result.add_row(*("" if one is None else f"{one.word} {one.pmi:.2f}" for one in cells))
    return result


def check_filtered(config: Config, path: Path) -> None:
    """Raise ValueError if `report` cannot write its rows into the file `path`.

    `config` is the config of the run. `path` must not exist, and must have the same ending as the file with the
    held-out rows, such as ".tsv".
    """
    rows_of(config)
    if (suffix := _source(config).suffix.lower()) != path.suffix.lower():
        raise ValueError(f"--filtered={path} must end in {suffix!r}, like the file of held-out rows {_source(config)}")
    if path.exists():
        raise ValueError(f"--filtered={path} exists already; name another file")


def _source(config: Config) -> Path:
    """Return the path of the data file from which the held-out rows are read."""
    return Path(config.data.path if config.data.heldout_path is None else config.data.heldout_path)


def report(model, config: Config, path: Path, say: Callable[[str], None], B: int = 128) -> None:
    """Print the words that reveal each label, and write the held-out rows that the model labels wrongly.

    The rows are written into the file `path`, in the same format as the file of all held-out rows (see
    `stickjax.data.nli_bias.lines_of`). `say` is called with a line of progress, and B is the number of rows in one call
    of the model.
    """
    examples, predict = examples_of(config, "test"), jax.jit(family_of(config.model).predict)
    say(f"labelling {len(examples):,} {task_of(config).name}")
    wrong = []
    for batch, rows in batches_of(examples, B):
        answers = jax.device_get(predict(model, batch))
        wrong += [row.line for row, answer in zip(rows, answers, strict=False) if row.label != answer]
    write_file(path, lines_of(_source(config), wrong))
    print_table(words_table(words_by_label(config)))
    print(f"{len(wrong):,} of {len(examples):,} held-out rows are labelled wrongly; they are in {printable(path)}")
