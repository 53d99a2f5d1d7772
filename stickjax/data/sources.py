"""Read texts: iterate over the documents in files, in folders and in Python's standard library."""

import codecs
import json
import logging
import os
import re
import stat
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from stickjax.data import arrow
from stickjax.data.compressed import ENDINGS, content_suffix, open_compressed
from stickjax.system.text import printable

log = logging.getLogger(__name__)

TOKENS_FORMAT = "stickjax-tokens"  # the value of "format" in the .json of a token file
_COMPRESSED = (".bz2", ".xz", ".lz4", ".zip", ".7z")  # unlike the files in `compressed.ENDINGS`, these are not read
# BOM_UTF32_LE is not in this list: it begins with BOM_UTF16_LE.
_OTHER_UNICODE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)

# What `stdlib_documents` leaves out: folders without library code, files that are tables of data, generated files.
_NOT_LIBRARY = re.compile(
    r"(site-packages|dist-packages|tests?|idlelib|lib2to3|pydoc_data|encodings|ensurepip|__pycache__|config-.*)$"
)
_TABLES = re.compile(r"html/entities\.py$|_sysconfigdata.*\.py$")
_GENERATED = re.compile(r"generated (by|from)|automatically generated", re.IGNORECASE)


class NotText(Exception):
    """Raised for a file that is not text.

    Its arguments are texts for messages: what the file is, such as "compressed"; and for some files a second text, such
    as what the user can do ("unpack it first") or where the error is.
    """


def files_below(folder: Path, skip: re.Pattern | None = None) -> list[Path]:
    """Return the paths of all files in a folder and its subfolders, sorted by the path relative to the folder.

    Hidden files and folders are left out. Folders whose name matches `skip` are left out too. Symbolic links are
    followed. A file that can be reached by several paths is returned once: by a path without a link if there is one,
    otherwise by a path with a link.

    Raises ValueError if a folder cannot be read.
    """
    own, links = deque([(folder, os.path.realpath(folder))]), deque()
    found, seen = [], set()
    while own or links:
        path, real = own.popleft() if own else links.popleft()
        if real in seen:
            continue
        seen.add(real)
        if not os.path.isdir(path):
            found.append(path)
            continue
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"cannot read the folder {printable(path)}: {error.strerror}") from error
        for entry in entries:
            name = entry.name
            if name.startswith(".") or (skip and skip.match(name) and entry.is_dir()):
                continue
            if entry.is_symlink():
                links.append((path / name, os.path.realpath(entry)))
            else:
                own.append((path / name, os.path.join(real, name)))
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def open_text(file: Path) -> BinaryIO:
    """Open a text file to read its bytes. A byte order mark of UTF-8 at the start of the text is skipped.

    The bytes of a .gz or .zst file are decompressed. Raises NotText if the file is not a regular file, if it is an
    archive such as .tar.gz, or if the text begins with a byte order mark of UTF-16 or UTF-32. Raises ValueError if the
    file cannot be read.
    """
    packed = file.suffix.lower() in ENDINGS
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            raise NotText("a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device")
        if packed and content_suffix(file) == ".tar":
            raise NotText("compressed", "unpack it first")
        stream = open_compressed(file) if packed else file.open("rb")
        try:
            mark = stream.peek(4)
        except BaseException:
            stream.close()
            raise
        if mark.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
    except OSError as error:
        if file.is_symlink() and not file.exists():
            raise NotText("a broken link") from error
        raise ValueError(f"cannot read {printable(file)}: {error.strerror}") from error
    if mark.startswith(_OTHER_UNICODE):
        stream.close()
        raise NotText("UTF-16 or UTF-32, not UTF-8 text", "convert it, for example by iconv -t UTF-8")
    return stream


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file, without the byte order mark that some files begin with.

    Raises NotText if the file is not UTF-8 text, and ValueError if it cannot be read.
    """
    with open_text(file) as stream:
        try:
            content = stream.read()
            return content.decode()
        except OSError as error:
            raise ValueError(f"cannot read {printable(file)}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            if file.suffix.lower() in _COMPRESSED:
                raise NotText("compressed", "unpack it first") from error
            raise NotText("not UTF-8 text", f"{error.reason} at byte {error.start}") from error


def stdlib_documents() -> Iterator[str]:
    """Yield the text of each Python file in the standard library of the running Python.

    A model can be trained on this text without a download. Tests, generated files, tables of data, files that are not
    UTF-8, and a few folders such as idlelib are left out.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    for file in files_below(folder, _NOT_LIBRARY):
        if file.suffix != ".py" or _TABLES.search(file.relative_to(folder).as_posix()):
            continue
        try:
            text = read_text(file)
        except NotText:
            continue
        if text and not _GENERATED.search(text[:200]):
            yield text


def _text_of(record: Any, text_field: str, where: str) -> str:
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        more = f"; this value is a {type(record).__name__}, not a JSON object"
        if isinstance(record, dict):
            fields = f"the fields of this object are {', '.join(map(repr, record)) or 'none'}"
            more = f": its value is {text!r:.40}" if text_field in record else f"; {fields:.100}"
        raise ValueError(f"{where}: no text in the field {text_field!r} (data.text_field or --text-field){more}")
    if re.search("[\ud800-\udfff]", text):  # possible in JSON, but not in UTF-8
        raise ValueError(
            f"{where}: the field {text_field!r} contains half of a surrogate pair, which is not a character"
        )
    return text


def _jsonl_documents(file: Path, text_field: str) -> Iterator[str]:
    with open_text(file) as lines:
        yield from _lines_of_json(file, lines, text_field)


def _lines_of_json(file: Path, lines: Iterable[bytes], text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{printable(file)}:{number}"
        try:
            record = json.loads(line)
        except RecursionError as error:
            raise ValueError(f"{where}: this line of JSON is nested too deeply") from error
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"{where}: this line is not JSON: {error}") from error
        yield _text_of(record, text_field, where)


def _arrow_documents(file: Path, text_field: str) -> Iterator[str]:
    with open_text(file) as stream:
        yield from arrow.arrow_texts(stream, file, text_field)


def _is_token_file(file: Path) -> bool:
    """Return True if `file` belongs to a token file, which is a tokenized text on disk.

    A token file consists of two files: NAME.bin has the token ids, and NAME.json describes them. The value of "format"
    in NAME.json is TOKENS_FORMAT.
    """
    description = file.with_suffix(".json")
    try:
        if description.stat().st_size > 2**16:  # the description of a token file has less than a KiB
            return False
        meta = json.loads(read_text(description))
    except (OSError, NotText, ValueError, RecursionError):
        return False
    return isinstance(meta, dict) and meta.get("format") == TOKENS_FORMAT


def _records(file: Path, text: str, text_field: str) -> Iterable[str] | None:
    """Return the texts of the records in a .json file; None if the file has no records.

    A record is a JSON object that has a text in its field `text_field`. The file may contain an array of records, one
    record on every line, or a single record. `text` is the content of the file, and `file` is its path for messages.

    Only the first object decides whether the file has records. If a later object is not a record, the returned
    iterable raises ValueError.
    """
    first = next((line for line in text.split("\n") if line.strip()), "")
    for part in (text, first):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        records = value if isinstance(value, list) else [value]
        if not (records and isinstance(records[0], dict) and isinstance(records[0].get(text_field), str)):
            return None
        if part is not text:
            return _lines_of_json(file, text.encode().split(b"\n"), text_field)
        where = f"{printable(file)}: record "
        return (_text_of(record, text_field, f"{where}{n}") for n, record in enumerate(records, 1))
    return None


def _documents(file: Path, text_field: str) -> tuple[Iterable[str], bool]:
    """Return (the documents of a file, True if the file is a .json file that is read as one document).

    `text_field` is the name of the field in which a JSON object has its text. Raises NotText if the file is not text.
    """
    suffix = content_suffix(file)
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl_documents(file, text_field), False
    if file.suffix.lower() in arrow.SUFFIXES:
        return _arrow_documents(file, text_field), False
    if suffix in (".bin", ".json") and _is_token_file(file):
        raise NotText("a token file", "set data.source='tokens' to read it")
    text = read_text(file)
    if "\0" in text:  # UTF-16 without a byte order mark may be valid UTF-8 by accident
        raise NotText("not UTF-8 text", "it has NUL bytes (0x00), as UTF-16 has")
    records = _records(file, text, text_field) if suffix == ".json" else None
    return ([text], suffix == ".json") if records is None else (records, False)


def _count(files: list[Path], root: Path) -> str:
    return f"{len(files)}: {printable(os.path.relpath(files[0], root.parent))}{', ...' if files[1:] else ''}"


def text_documents(path: str, text_field: str = "text", name: str = "data.path") -> Iterator[str]:
    """Yield the documents of a text file, or of all text files in a folder and its subfolders, sorted by path.

    A document is a text. Most files are one document. A .jsonl or .ndjson file has one document per line: the field
    `text_field` of the JSON object on the line. A .json file may contain such objects too: a single object, one object
    on every line, or an array of objects. Then each object is a document. Any other .json file is one document, and a
    warning is logged. A .parquet or .arrow file has one document per row, in the column `text_field`. In the folder
    of a saved Hugging Face dataset, only the files with rows are read. Empty documents are left out. A byte order mark
    is removed. A file that is compressed by gzip or zstd, such as a.jsonl.gz, is read like the file that it contains.

    In a folder, hidden files are skipped. Files that are not text are left out too, and a log message gives their
    number. They are files that are not UTF-8 or have NUL bytes, archives such as .tar.gz, token files, pipes, sockets,
    devices and broken links. Links to folders are followed. No file is read twice.

    Args:
      path: the file or folder.
      text_field: the name of the field in which a JSON object has its text, or of the column of a table.
      name: the name of the config field or argument that has the path, for messages.

    Raises ValueError if the path does not exist, cannot be read, has no text, or is a file that is not text; if a
    compressed file or a table is damaged; or if the package that a file needs, `zstandard` or `pyarrow`, is missing.
    Also raises ValueError, with the file and the number of the line or row, if a line of a .jsonl or .ndjson file, or a
    row of a table, has no text in `text_field`. If the first object of a .json file has such a text, all objects must.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "b.jsonl").write_text('{"text": "two"}\\n{"text": "three"}\\n')
    ...     _ = Path(folder, "a.txt").write_text("one")
    ...     list(text_documents(folder))
    ['one', 'two', 'three']
    """
    root, empty, left_out, as_they_stand = Path(path), True, {}, []
    if not os.path.lexists(root):
        hint = f"; give the right path by --{name}=PATH" if name.startswith("data.") else ""
        raise ValueError(f"{name}={path!r} does not exist{hint}")
    for file in arrow.without_dataset_descriptions(files_below(root)) if root.is_dir() else [root]:
        try:
            documents, whole = _documents(file, text_field)
            if whole:
                as_they_stand.append(file)
            for text in documents:
                if text:
                    empty = False
                    yield text
        except NotText as error:
            kind, *more = error.args
            if file == root:
                raise ValueError(": ".join([f"{name}={path!r} is {kind}", *more])) from error
            left_out.setdefault(kind, []).append(file)
    if left_out:
        n = sum(map(len, left_out.values()))
        kinds = ", ".join(f"{kind} ({_count(files, root)})" for kind, files in left_out.items())
        log.warning("%s=%r: left out %d file%s: %s", name, path, n, "s"[n == 1 :], kinds)
    if as_they_stand:
        counts = _count(as_they_stand, root)
        log.warning(
            "%s=%r: a .json file without a field %r is read as one document (%s)", name, path, text_field, counts
        )
    if empty:
        raise ValueError(f"{name}={path!r} contains no text")
