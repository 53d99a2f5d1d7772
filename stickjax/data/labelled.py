"""Make examples for a classifier from the rows of a file. A row has one or two texts, and a label."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stickjax.config import DataConfig
from stickjax.config.fields import one_of
from stickjax.data.tables import Record, read_records
from stickjax.data.task import Task
from stickjax.data.tasks import Examples
from stickjax.data.tasks.encoding import PARTS, divided
from stickjax.data.tokenizer import Tokenizer, WordTokenizer, load_tokenizer
from stickjax.system.text import printable

LABELS_FILE = "labels.json"  # a JSON list of the labels; the label with index i has id i


class Row(NamedTuple):
    """A labelled row of a file. The texts and the label are converted to ids.

    `texts`: the token ids of each text, as the bytes of little-endian 32-bit integers. A token id is the id of the
      tokenizer plus one, because 0 is padding.
    `label`: the id of the label.
    `line`: the number of the row's line in the file, from 1.
    """

    texts: tuple[bytes, ...]
    label: int
    line: int


class LabelledExamples(Examples):
    """Examples whose `rows` are objects of the class `Row`. `digest` does not depend on the line numbers."""

    rows: Sequence[Row]

    def digest(self) -> str:
        found = hashlib.sha256()
        for row in self.rows:
            found.update(f"{row.label} {[len(text) for text in row.texts]}".encode())
            found.update(b"".join(row.texts))
        return found.hexdigest()[:16]


def labelled_task(d: DataConfig, names: tuple[str, ...]) -> Task:
    """Return the Task to predict the label of a row from its one or two texts.

    The data config `d` names the files with the rows. `names` are the names of the arrays with the token ids, one name
    for each text of a row, such as ("left", "right").

    A token id in these arrays is the id of the tokenizer plus one, because id 0 is padding. So V, the number of ids, is
    the `vocab_size` of the tokenizer plus one.

    Raises ValueError if `names` has one name and `d.right_field` is set, or if `names` has two names and
    `d.right_field` is None. Also raises it if the labels or the tokenizer cannot be read, or cannot be made from the
    training rows.
    """
    if len(names) == 2 and d.right_field is None:
        raise ValueError("this model reads pairs: data.right_field must be the name of the field with the second text")
    if len(names) == 1 and d.right_field is not None:
        raise ValueError(
            f"right_field={d.right_field!r} is not used: this model reads one text; leave data.right_field out"
        )
    rows = LabelledRows(d, names)
    kind = "pairs" if len(names) == 2 else "sentences"
    name, heldout = f"{kind} of {printable(d.path or '')}", d.path if d.heldout_path is None else d.heldout_path
    files = {LABELS_FILE: (json.dumps(rows.labels, ensure_ascii=False) + "\n").encode()}
    ids = {"V": rows.tokenizer.vocab_size + 1, "classes": len(rows.labels)}
    return Task(
        name, ids, rows.examples, rows.encode, dict.fromkeys(names, rows.decode), rows.labels, rows.tokenizer, heldout,
        files,
    )  # fmt: skip


class LabelledRows:
    """The labelled rows that a data config names. The file `data.path` is read when its rows are first needed.

    `names` are the names of the arrays with the token ids, one name for each text of a row.

    The training rows are needed for the labels if `data.labels` is None, and for the tokenizer if `data.tokenizer` is
    "words". A run folder contains its labels and its tokenizer as files, and the config of the run names these files.
    So the held-out rows of a run can be read without the training rows, if `data.heldout_path` is set.
    """

    def __init__(self, data: DataConfig, names: tuple[str, ...]):
        self.data, self.names = data, names

    @functools.cached_property
    def _rows(self) -> list[Record]:
        return read_records(self.data.path, self.data)

    def records(self, part: str) -> Sequence[Record]:
        """Return the rows for training ("train"), for validation ("valid") or for tests ("test"), as text.

        `part` is one of these three names. The rows for tests are the held-out rows.

        Raises ValueError if the file cannot be read, if `part` is another name, or if `part` is "valid" and
        `data.valid_every` is 0. Also raises it if `data.path` has a single row and there is no `data.heldout_path`.
        """
        one_of("part", part, PARTS)
        d = self.data
        if part == "test" and d.heldout_path is not None:
            return read_records(d.heldout_path, d, "data.heldout_path")
        if d.heldout_path is not None:
            train = self._rows
        else:
            if len(self._rows) < 2:
                raise ValueError(
                    f"data.path={d.path!r} has 1 row, but a training part and a held-out part need one row each; "
                    "add rows, or set data.heldout_path"
                )
            if part == "test":
                return self._rows[:: d.heldout_every]
            train = [row for i, row in enumerate(self._rows) if i % d.heldout_every]
        return divided(train, part, d.valid_every, key=lambda row: row[:2])

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of their ids. They are read from the file `data.labels`.

        If `data.labels` is None, they are the labels of the training rows, in sorted order: sorted as numbers if all
        labels are whole numbers, otherwise as texts.
        """
        if self.data.labels is not None:
            return read_labels(self.data.labels)
        found = {row.label for row in self.records("train")}
        as_number = all(label.removeprefix("-").isdecimal() for label in found)
        labels = tuple(sorted(found, key=int if as_number else str))
        if len(labels) < 2:
            raise ValueError(
                f"data.path={self.data.path!r}: all training rows have the same label {labels[0]!r}; a classifier "
                "needs two labels or more"
            )
        return labels

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        if self.data.tokenizer != "words":
            return load_tokenizer(self.data.tokenizer, self.data.eot)
        texts = (text for row in self.records("train") for text in row.texts)
        return WordTokenizer.made_of(texts, self.data.min_count)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text), "<i4") + 1

    def decode(self, ids) -> str:
        return self.tokenizer.decode([int(i) - 1 for i in ids if i])

    def examples(self, part: str, T: int | None = None) -> LabelledExamples:
        """Return the examples for training ("train"), for validation ("valid") or for tests ("test").

        An example has int32 arrays. Each name in `names` is an array [T]: the token ids of a text, padded with 0.
        `label` [] is the id of the label. If T is None, T is the number of tokens of the part's longest text.

        Raises ValueError, with the file and the line, for a text without tokens, for a text of more than T tokens, and
        for a label that is not in `labels`.
        """
        d, label_ids = self.data, {label: i for i, label in enumerate(self.labels)}
        file = printable((part == "test" and d.heldout_path) or d.path or "")
        rows, too_long = [], []
        for record in self.records(part):
            where = f"{file}:{record.line}"
            if record.label not in label_ids:
                known = ", ".join(map(repr, self.labels))
                source = "the training rows" if d.labels is None else f"data.labels={d.labels!r}"
                raise ValueError(
                    f"{where}: the label {record.label!r} is not one of {known:.100}, the labels of {source}"
                )
            ids = [self.encode(text) for text in record.texts]
            if not all(map(len, ids)):
                raise ValueError(f"{where}: a text of this row has no tokens; remove the row")
            if T is not None and (longest := max(map(len, ids))) > T:
                too_long.append((where, longest))
            rows.append(Row(tuple(x.astype("<i4").tobytes() for x in ids), label_ids[record.label], record.line))
        if too_long:
            (where, n), most = too_long[0], max(n for _, n in too_long)
            raise ValueError(
                f"{where}: a text of {n} tokens is longer than T={T}; the longest text has {most} tokens; "
                f"set data.T to {most} or more, or remove the long rows"
            )
        size = T or max((len(text) for row in rows for text in row.texts), default=0) // 4
        lengths = lambda row: (max(map(len, row.texts)) // 4,)  # noqa: E731
        return LabelledExamples(rows, functools.partial(_arrays, self.names, size), (self.names,), lengths)


def _arrays(names: tuple[str, ...], T: int, row: Row) -> dict[str, np.ndarray]:
    arrays = {name: np.zeros(T, np.int32) for name in names}
    for name, text in zip(names, row.texts, strict=True):
        ids = np.frombuffer(text, "<i4")
        arrays[name][: len(ids)] = ids
    return arrays | {"label": np.int32(row.label)}


def read_labels(path: str) -> tuple[str, ...]:
    """Return the labels in a JSON file, in the order of their ids. `path` is the path of the file.

    Raises ValueError if the file cannot be read, or is not a JSON list of two or more different texts.
    """
    where = f"data.labels={path!r}"
    try:
        labels = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(labels, list):
        raise ValueError(f'{where} must be a JSON list of labels, such as ["no", "yes"]')
    if wrong := [label for label in labels if not isinstance(label, str)]:
        raise ValueError(f"{where}: the label {wrong[0]!r:.80} must be a text, in quotation marks")
    if len(labels) < 2:
        raise ValueError(f"{where} must have two labels or more, not {len(labels)}")
    if len(set(labels)) < len(labels):
        raise ValueError(f"{where}: the label {max(labels, key=labels.count)!r} occurs more than once")
    return tuple(labels)
