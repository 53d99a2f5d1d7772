"""The class Task: a source of examples. Some models, such as classifiers, read examples instead of a text."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from stickjax.data.tasks import Examples
from stickjax.data.tokenizer import Tokenizer


class Task(NamedTuple):
    """A source of examples: pairs of sentences with a label, single sentences with a label, or translations.

    `name`: the name in messages, such as "pairs of logic".
    `ids`: the sizes that the model needs, {field of the model config: number}. The fields are V, the number of token
      ids; V_target, the number of token ids of the targets of translations; and classes, the number of labels.
    `examples`: the function `examples(part, T=..., **options)`. It returns the examples for `part`, such as "train" or
      "test". A text has at most T tokens. If T is None, a text may have any number of tokens.
    `encode`: a function that converts a text that the model reads to its token ids, without padding.
    `decode`: {name of an array of token ids: a function that converts the ids of one text to the text}. The arrays of
      the model's inputs come first, in the order of the texts of an example. For a translation, "target" follows.
    `labels`: the names of the labels, in the order of their ids.
    `bucket`: a function from a row (see `Examples`) to a number that measures its length, such as its number of
      operators. The rows with the same number form a bucket. An evaluation computes the accuracy of each bucket. None:
      all rows are in one bucket.
    `bucket_name`: what the number of a bucket counts, such as "operators".
    `brackets`: a function from a text that the model reads to the same text with brackets "(" and ")", which show its
      true tree. None: the texts have no trees.

    Three fields are set for labelled rows only:

    `tokenizer`: the tokenizer that converts a text to ids.
    `heldout`: the path of the file with the held-out rows, for messages.
    `files`: {name: content} of the files that training writes into the run folder, besides the tokenizer.
    """

    name: str
    ids: dict[str, int]
    examples: Callable[..., Examples]
    encode: Callable[[str], Sequence[int]]
    decode: Mapping[str, Callable]
    labels: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    heldout: str | None = None
    files: Mapping[str, bytes] = {}
    bucket: Callable[..., int] | None = None
    bucket_name: str = ""
    brackets: Callable[[str], str] | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the texts that the model reads, such as ("left", "right"). A target is not one of them."""
        return tuple(name for name in self.decode if name != "target")
