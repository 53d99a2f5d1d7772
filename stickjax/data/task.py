"""What all sources of examples have in common, for models that do not read a text."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from stickjax.data.tasks import Examples
from stickjax.data.tokenizer import Tokenizer


class Task(NamedTuple):
    """One source of examples, in the form that one kind of model reads.

    `name`: the name in messages. `ids`: the sizes that the model needs: V (the number of ids), V_target (the number of
    ids of targets, for translations) and classes (the number of labels), each as {field of the model config: number}.
    `examples(part, T=..., **options)`: returns the examples of a part, such as "train", with at most T tokens in a
    text; T None: texts of any length. `decode`: for each array of ids the function that returns its text. `labels`: the
    names of the labels, in the order of their ids.

    `bucket(row)`: the number by which an evaluation groups examples, and `bucket_name` what it counts; None: one group.
    `brackets(row)`: for every text of a row the same text with all brackets of its tree; None: there are no trees.

    The other fields are for labelled rows only. `tokenizer`: converts text to ids. `heldout`: the name of the held-out
    rows in messages. `files`: {name: content} of the files that a run folder keeps besides the files of the tokenizer.
    """

    name: str
    ids: dict[str, int]
    examples: Callable[..., Examples]
    decode: Mapping[str, Callable]
    labels: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    heldout: str | None = None
    files: Mapping[str, bytes] = {}
    bucket: Callable[..., int] | None = None
    bucket_name: str = ""
    brackets: Callable[..., list[str]] | None = None
