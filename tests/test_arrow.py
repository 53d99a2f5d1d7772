"""Test parquet and Arrow files and Hugging Face datasets on disk: the texts in them, and bad input."""

import json
import random
import sys

import numpy as np
import pytest

from stickjax.config import DataConfig
from stickjax.data.__main__ import main
from stickjax.data.arrow import without_dataset_descriptions
from stickjax.data.corpus import load_corpus
from stickjax.data.sources import text_documents

TEXTS = [f"Document {n} is é 漢." for n in range(40)]
KINDS = ("x.parquet", "x.PARQUET", "x.arrow", "file.arrow")


@pytest.fixture
def pyarrow():
    return pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'stickjax[hf]'")


def write(path, pyarrow, columns: dict, kind=None) -> None:
    """Write the table `columns`, {name: values}, in batches of at most 25 rows. `kind` is the type of all columns.

    The format is parquet for a .parquet file, the Arrow file format for file.arrow, else the Arrow stream format.
    """
    table = pyarrow.table({name: pyarrow.array(values, kind) for name, values in columns.items()})
    if path.suffix.lower() == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=25)
        return
    new = pyarrow.ipc.new_file if path.stem == "file" else pyarrow.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=25)


def read(path, **options) -> list[str]:
    return list(text_documents(str(path), **options))


@pytest.mark.parametrize("name", KINDS)
def test_every_row_is_a_document(tmp_path, pyarrow, name):
    write(tmp_path / name, pyarrow, {"id": range(40), "text": TEXTS})
    assert read(tmp_path / name) == read(tmp_path) == TEXTS
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
    for kind in kinds:
        write(tmp_path / name, pyarrow, {"body": ["one", "", "two", "one"]}, kind)
        assert read(tmp_path / name, text_field="body") == ["one", "two", "one"]


def test_a_table_gives_the_stream_of_the_same_jsonl(tmp_path, pyarrow):
    write(tmp_path / "x.parquet", pyarrow, {"text": TEXTS})
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    found, expected = (
        load_corpus(DataConfig(source="text", path=tmp_path / f"x.{end}")) for end in ("parquet", "jsonl")
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.hash == theirs.hash and np.array_equal(ours.tokens, theirs.tokens)


BAD = [
    ({"id": [1]}, {}, "{}: no column 'text' (data.text_field or --text-field); the columns are 'id'"),
    ({"text": [1, 2]}, {}, "{}: the column 'text' (data.text_field or --text-field) must be text, not int64"),
    ({"text": [["a"]]}, {}, "must be text, not list<"),
    ({"text": [b"a"]}, {}, "must be text, not binary"),
    ({"text": TEXTS + [None]}, {}, "{}: row 41 has no text in the column 'text'"),
    ({"text": [""]}, {}, "contains no text"),
    ({"text": []}, {}, "must be text, not null"),
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("columns, options, message", BAD)
def test_bad_columns_are_one_line(tmp_path, pyarrow, name, columns, options, message, capsys):
    path = tmp_path / name
    write(path, pyarrow, columns)
    with pytest.raises(ValueError) as error:
        read(path, **options)
    assert message.format(path) in str(error.value) and "\n" not in str(error.value)
    assert main(["tokenize", str(path), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == [name], "nothing is half-written"


def test_two_columns_of_one_name_are_an_error(tmp_path, pyarrow):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    with pyarrow.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="x.arrow: 2 columns 'text'"):
        read(tmp_path)


@pytest.mark.parametrize("name", KINDS[1:])
def test_damaged_files_are_one_line(tmp_path, pyarrow, name):
    """A file that is cut off gives one line of error. A file with wrong bytes is read, or gives one line of error."""
    path, rng = tmp_path / name, random.Random(0)
    write(path, pyarrow, {"text": TEXTS})
    good, refused = path.read_bytes(), 0
    for content in (b"", b"PAR1", b"text", good[:100], good[: len(good) // 2], good[: len(good) // 2 + 100]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot read .*: its data are damaged or cut off") as error:
            read(path)
        assert "\n" not in str(error.value)
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 3])):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bad)
        try:
            read(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused > 20


@pytest.mark.parametrize("name", KINDS)
def test_without_the_package_its_extra_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(ValueError) as error:
        read(tmp_path)
    assert str(error.value) == f"{tmp_path / name} needs the package pyarrow: pip install 'stickjax[hf]'"


def saved(folder, pyarrow, shards: int = 2) -> None:
    """Write the files that `Dataset.save_to_disk` writes for TEXTS, and a cache file as `Dataset.map` writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for name, part in zip(names, np.array_split(TEXTS, shards), strict=True):
        write(folder / name, pyarrow, {"text": part.tolist(), "id": range(len(part))})
    write(folder / "cache-0123456789abcdef.arrow", pyarrow, {"text": ["from the cache"]})
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))


def test_only_the_data_files_of_a_dataset_are_read(tmp_path, pyarrow, caplog):
    saved(tmp_path / "one", pyarrow)
    assert read(tmp_path / "one") == TEXTS
    assert not caplog.text
    (tmp_path / "more.txt").write_text("more")
    assert read(tmp_path) == ["more", *TEXTS]
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="state.json names the data file 'data-00001-of-00002.arrow', which does not"):
        read(tmp_path / "one")


def test_the_splits_of_a_dataset_are_not_mixed(tmp_path, pyarrow):
    for split in ("train", "test"):
        saved(tmp_path / "both" / split, pyarrow)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(tmp_path / "both" / "test") == TEXTS
    for folder in (tmp_path / "both", tmp_path):
        with pytest.raises(ValueError) as error:
            read(folder)
        both = tmp_path / "both"
        assert str(error.value) == (
            f"{both} is a dataset with the splits 'train', 'test'; give the folder of one split, such as {both}/train"
        )


@pytest.mark.parametrize("content", ["{}", "[1]", "not JSON", '{"_data_files": 3}', "[" * 9**6])
def test_other_files_of_these_names_stay(tmp_path, content):
    for name in ("state.json", "dataset_dict.json", "a.txt"):
        (tmp_path / name).write_text(content)
    files = sorted(tmp_path.iterdir())
    assert without_dataset_descriptions(files) == files


def test_datasets_that_the_package_saves_are_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    whole = datasets.Dataset.from_dict({"id": list(range(40)), "text": TEXTS})
    chosen = whole.shuffle(seed=1).select(range(15)).map(lambda row: {"text": row["text"].upper()})
    whole.save_to_disk(str(tmp_path / "whole"), num_shards=3)
    chosen.save_to_disk(str(tmp_path / "chosen"))
    datasets.DatasetDict(train=whole, test=chosen).save_to_disk(str(tmp_path / "both"))
    whole.to_parquet(str(tmp_path / "x.parquet"))
    assert read(tmp_path / "whole") == read(tmp_path / "both" / "train") == read(tmp_path / "x.parquet") == TEXTS
    assert read(tmp_path / "chosen") == read(tmp_path / "both" / "test") == chosen["text"][:]
    with pytest.raises(ValueError, match="give the folder of one split"):
        read(tmp_path / "both")
