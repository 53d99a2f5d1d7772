"""Read texts from parquet files, and from Arrow files, such as the files of a Hugging Face dataset on disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stickjax.system.text import printable

SUFFIXES = (".parquet", ".arrow")
_ROWS = 1024  # rows of a parquet file that are read at a time


def arrow_texts(stream: BinaryIO, file: Path, text_field: str) -> Iterator[str]:
    """Yield the text in the column `text_field` of every row of a parquet or Arrow file.

    `stream` is the open file, and `file` is its path, for messages. The rows are read in parts, so only a part of the
    file is in memory.

    Raises ValueError, in one line with the path, if the package `pyarrow` is missing, if the file is damaged, or if the
    column is missing or is not text. Also raises it, with the number of the row from 1, if a row has no text.
    """
    where = printable(file)
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{where} needs the package pyarrow: pip install 'stickjax[hf]'") from error
    number = 0
    try:
        for column in _columns(stream, file, text_field):
            for value in column:
                number += 1
                if (text := value.as_py()) is None:
                    raise ValueError(f"{where}: row {number} has no text in the column {text_field!r}")
                yield text
    # In a damaged file, a column name may not be valid UTF-8, and a size may ask for more memory than the machine has.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or "the memory is not enough"
        raise ValueError(f"cannot read {where}: its data are damaged or cut off: {reason:.200}") from error


def _columns(stream: BinaryIO, file: Path, text_field: str) -> Iterator:
    """Yield the column `text_field` of the open file `stream` in parts, as pyarrow arrays.

    `file` is the path of the file. A file whose name ends in .parquet is read as parquet, and any other file as Arrow:
    its first bytes say whether it has the file format or the stream format. Raise ValueError if the column is missing,
    occurs twice, or is not text.
    """
    import pyarrow

    if file.suffix.lower() == ".parquet":
        from pyarrow import parquet

        table = parquet.ParquetFile(stream)
        _check_column(table.schema_arrow, text_field, file)
        batches = table.iter_batches(batch_size=_ROWS, columns=[text_field])
    elif stream.peek(6).startswith(b"ARROW1"):  # the file format, such as Feather; datasets have the stream format
        table = pyarrow.ipc.open_file(stream)
        _check_column(table.schema, text_field, file)
        batches = (table.get_batch(i) for i in range(table.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(stream)
        _check_column(batches.schema, text_field, file)
    for batch in batches:
        column = batch.column(text_field)
        column.validate(full=True)  # reading a damaged array could end the process
        yield column


def _check_column(schema, text_field: str, file: Path) -> None:
    from pyarrow import types

    where = printable(file)
    if (count := schema.names.count(text_field)) != 1:
        names = ", ".join(map(repr, schema.names)) or "none"
        found = f"no column {text_field!r}" if count == 0 else f"{count} columns {text_field!r}"
        raise ValueError(f"{where}: {found} (data.text_field or --text-field); the columns are {names:.200}")
    kind = schema.field(text_field).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        raise ValueError(
            f"{where}: the column {text_field!r} (data.text_field or --text-field) must be text, not {str(kind):.80}"
        )


def without_dataset_descriptions(files: list[Path]) -> list[Path]:
    """Return `files` without the description files of Hugging Face datasets, such as dataset_info.json.

    `Dataset.save_to_disk` writes a state.json with the names of the data files. If a folder has such a state.json, only
    the data files of this folder are kept. All files of other folders are kept.

    Raises ValueError if a data file is missing, or if a folder is a `DatasetDict`: its splits, such as training and
    test parts, must not be mixed.
    """
    kept: dict[Path, set[str]] = {}
    for file in files:
        if file.name == "state.json" and (entries := _entry(file, "_data_files")) is not None:
            kept[file.parent] = {str(entry["filename"]) for entry in entries if isinstance(entry, dict)}
            if missing := kept[file.parent] - {other.name for other in files if other.parent == file.parent}:
                raise ValueError(f"{printable(file)} names the data file {min(missing)!r}, which does not exist")
        elif file.name == "dataset_dict.json" and (splits := _entry(file, "splits")):
            raise ValueError(
                f"{printable(file.parent)} is a dataset with the splits {', '.join(map(repr, splits)):.200}; give the "
                f"folder of one split, such as {printable(file.parent / str(splits[0]))}"
            )
    return [file for file in files if file.parent not in kept or file.name in kept[file.parent]]


def _entry(file: Path, name: str) -> list | None:
    """Return the list that the JSON object in a file has under the key `name`; None if the file has no such list."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, list) else None
