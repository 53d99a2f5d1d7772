"""Read labelled rows from a file of JSON objects, one on each line, or from a table in a .tsv or .csv file."""

import csv
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from stickjax.config import DataConfig
from stickjax.config.fields import nearest, shown
from stickjax.data.sources import NotText, open_text
from stickjax.system.text import printable

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".ndjson", ".tsv", ".csv")


class Record(NamedTuple):
    """A labelled row as text: one or two texts, the label, and the number of its line in the file, from 1."""

    texts: tuple[str, ...]
    label: str
    line: int


def read_records(path: str, data: DataConfig, name: str = "data.path") -> list[Record]:
    """Read the labelled rows of a file.

    A .jsonl or .ndjson file has a JSON object on every line. A .tsv file has columns separated by tabs, without
    quotation marks around values. A .csv file has columns separated by commas. The first line of a .tsv or .csv file
    has the names of the columns. Empty lines are left out. Rows with the label `data.unlabelled` are also left out, and
    a log message gives their number.

    The texts and the label are in the fields `data.left_field`, `data.right_field` (if it is not None) and
    `data.label_field`. The label of a JSON object may also be a whole number, true or false.

    `name` is the config field that has the path, for messages. Raises ValueError if the file cannot be read, if a row
    has more or fewer columns than the first line, if a field is missing or empty, or if there are no rows. An error in
    a row names the file and the line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "rows.tsv")
    ...     _ = file.write_text("text\\tlabel\\nit rains\\tyes\\nit does not\\tno\\n")
    ...     read_records(str(file), DataConfig(source="labelled", path=str(file), left_field="text"))
    [Record(texts=('it rains',), label='yes', line=2), Record(texts=('it does not',), label='no', line=3)]
    """
    file, found, left_out = Path(path), [], 0
    if not file.exists() and not file.is_symlink():
        raise ValueError(f"{name}={path!r} does not exist; give the right path by --{name}=PATH")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES and not file.is_dir():
        raise ValueError(f"{name}={path!r}: labelled rows are read from files that end with {', '.join(SUFFIXES)}")
    fields = {"left_field": data.left_field, "right_field": data.right_field, "label_field": data.label_field}
    fields = {option: field for option, field in fields.items() if field is not None}
    try:
        lines = _lines(file)
        rows = _objects(file, lines) if suffix in SUFFIXES[:2] else _columns(file, lines, suffix, fields)
        for line, row in rows:
            record = _record(f"{printable(file)}:{line}", row, fields, line)
            if record.label == data.unlabelled:
                left_out += 1
                continue
            for text, option in zip(record.texts, fields, strict=False):
                if not text.strip():
                    raise ValueError(f"{printable(file)}:{line}: the field {fields[option]!r} is empty")
            found.append(record)
    except NotText as error:
        raise ValueError(": ".join([f"{name}={path!r} is {error.args[0]}", *error.args[1:]])) from error
    if left_out:
        log.warning("%s=%r: left out %s rows with the label %r", name, path, f"{left_out:,}", data.unlabelled)
    if not found:
        raise ValueError(f"{name}={path!r} has no labelled rows")
    return found


def _lines(file: Path) -> Iterator[str]:
    with open_text(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{printable(file)}:{number}: this line is not UTF-8 text: {error.reason}") from error


def _objects(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict]]:
    """Yield (number of the line, from 1; its JSON object) for all lines that are not empty.

    `file` is the path of the file, for messages.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{printable(file)}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: this line is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: this line must be a JSON object, not a {type(row).__name__}")
        yield number, row


def _columns(file: Path, lines: Iterable[str], suffix: str, fields: dict) -> Iterator[tuple[int, dict]]:
    """Yield (number of the line, from 1; {name of a column: value}) for every row of a table after its first line.

    A value in a .csv file may contain line breaks. Then the number belongs to the last line of the row. `file` is the
    path of the table, and `suffix` is its ending, such as ".csv". `fields` is {config field: name of a column}. These
    columns must exist.
    """
    tabs = suffix == ".tsv"
    reader = csv.reader(
        lines, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL, strict=True
    )
    names: list[str] = []
    try:
        for row in reader:
            where = f"{printable(file)}:{reader.line_num}"
            if not row:
                continue
            if not names:
                names = row
                if twice := [field for field in fields.values() if names.count(field) > 1]:
                    raise ValueError(f"{where}: {names.count(twice[0])} columns have the name {twice[0]!r}")
                for option, field in fields.items():
                    _check_field(where, option, field, names)
            elif len(row) != len(names):
                raise ValueError(f"{where}: the row has {len(row)} columns, but the first line has {len(names)}")
            else:
                yield reader.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{printable(file)}:{reader.line_num}: not a row of a table: {error}") from error


def _check_field(where: str, option: str, field: str, known: Iterable[str]) -> None:
    if field not in known:
        names = ", ".join(map(repr, known)) or "none"
        raise ValueError(
            f"{where}: no field {field!r}, which data.{option} names{nearest(field, known)}; "
            f"the fields are {names:.100}"
        )


def _record(where: str, row: dict, fields: dict[str, str], line: int) -> Record:
    """Return the Record of a row.

    `where` is the file and the line, for messages. `row` is {name of a field: value}. `fields` is {config field, such
    as "left_field": name of a field}. It lists the fields of the texts first, then the field of the label. `line` is
    the number of the line in the file.
    """
    for option, field in fields.items():
        _check_field(where, option, field, row)
        value, is_label = row[field], option == "label_field"
        if is_label and value in (None, ""):
            raise ValueError(f"{where}: the row has no label: the field {field!r} is empty")
        if not isinstance(value, str | int if is_label else str):
            kinds = "text or a whole number" if is_label else "text"
            raise ValueError(f"{where}: the field {field!r} must be {kinds}, not {shown(value)}")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):  # possible in JSON, but not in UTF-8
            raise ValueError(f"{where}: the field {field!r} has half a surrogate pair, which is not a character")
    *texts, label = (row[field] for field in fields.values())
    return Record(tuple(texts), str(label).strip(), line)
