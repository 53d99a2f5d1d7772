"""Test weighted mixtures: the shares, the epochs of each source, exact resume, what is recorded, and bad input."""

import json

import grain
import numpy as np
import pytest
from conftest import assert_same_state

from stickjax.config import Config, DataConfig
from stickjax.config.command_line import parse
from stickjax.data.batches import train_loader
from stickjax.data.corpus import Corpus, load_corpora, load_corpus
from stickjax.data.mixture import Mixture
from stickjax.data.readers import training_data
from stickjax.data.token_files import tokenize
from stickjax.data.tokenizer import ByteTokenizer
from stickjax.evaluate import evaluate
from stickjax.storage.run_config import read_config
from stickjax.storage.run_folder import load
from stickjax.surgery.__main__ import source_of
from stickjax.train import fit, main
from stickjax.training.metrics import read_metrics

WEIGHTS = (5, 3, 2)
CONFIG = DataConfig(mixture=[("text", "a", 5), ("text", "b", 3), ("stdlib", None, 2)], T=8, B=4, seed=3)
SIZES = (4000, 100, 300)  # windows of each source; the second source is read more than twice


def corpora() -> list[Corpus]:
    """Return corpora 1 to 3. Token i of corpus c is 100,000 * c + i, so that a token shows its corpus and position."""
    return [
        Corpus(np.arange(8 * n + 1, dtype=np.uint32) + 100_000 * c, ByteTokenizer(), "memory", 1, n, f"{c}" * 16)
        for c, n in enumerate(SIZES, 1)
    ]


def drawn(loader, sequences: int) -> np.ndarray:
    """Return the first token of each of the next `sequences` sequences of a loader, whose batches have 4 sequences."""
    return np.concatenate([next(loader)["tokens"][:, 0] for _ in range(sequences // 4)]).astype(int)


def test_the_shares_are_the_weights():
    sources = drawn(train_loader(corpora(), CONFIG), 10_000) // 100_000
    for n in (10_000, 1000, 100):
        shares = [(sources[:n] == c).mean() for c in (1, 2, 3)]
        np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.01)
    assert max(np.diff(np.flatnonzero(sources == 3))) < 10, "the sources alternate"


def test_the_sources_alternate_as_in_grain():
    """For weights that grain does not round, `Mixture` draws the same examples as `grain.MapDataset.mix`."""
    sources = [range(10**c, 10**c + 5) for c in (1, 2, 3)]
    ours = Mixture(sources, WEIGHTS)
    unshuffled = [grain.MapDataset.source(source).repeat() for source in sources]
    theirs = grain.MapDataset.mix(unshuffled, weights=WEIGHTS)
    mixed = grain.MapDataset.select_from_datasets(unshuffled, ours)
    assert [mixed[i] for i in range(500)] == [theirs[i] for i in range(500)]
    assert [Mixture(sources, (0.5, 0.3, 0.2))[i] for i in range(500)] == [ours[i] for i in range(500)]


@pytest.mark.parametrize("weights", [WEIGHTS, (1,), (1e-3, 1e3), (0.1, 0.2, 0.3, 0.4), (7, 1, 1e-30)])
def test_counts_are_the_numbers_of_draws(weights):
    mixture, found = Mixture([range(3)] * len(weights), weights), [0] * len(weights)
    for n in range(300):
        assert mixture.counts(n) == found
        source, before = mixture[n]
        assert before == found[source]
        found[source] += 1
    expected = np.array(weights) / sum(weights)
    for n in (10**6 + 1, 10**15):
        assert sum(mixture.counts(n)) == n
        errors = [int(count) - n * share for count, share in zip(mixture.counts(n), expected, strict=True)]
        assert max(map(abs, errors)) < len(weights) + n * 1e-15


def test_a_source_that_ends_starts_over_in_a_new_order():
    tokens = drawn(train_loader(corpora(), CONFIG), 1000)
    for c, n in enumerate(SIZES, 1):
        own = tokens[tokens // 100_000 == c]
        epochs = [own[i : i + n] for i in range(0, len(own), n)]
        for epoch in epochs[:-1] if len(epochs[-1]) < n else epochs:
            assert sorted(epoch) == list(range(100_000 * c, 100_000 * c + 8 * n, 8)), "every window once"
        assert len(epochs) == (1, 3, 1)[c - 1]
        assert c != 2 or not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("batches", [1, 5, 200])
def test_resume_is_exact_in_any_number_of_processes(batches):
    loader = train_loader(corpora(), CONFIG)
    drawn(loader, 4 * batches)
    state = json.loads(json.dumps(loader.get_state()))
    rest = [next(loader) for _ in range(5)]
    again = [train_loader(corpora(), CONFIG, process_index=i, process_count=2) for i in range(2)]
    for one in again:
        one.set_state(state)
    for batch in rest:
        halves = [next(one) for one in again]
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))


@pytest.fixture
def texts(tmp_path):
    """Write a folder of 20 documents, a .jsonl file of 40 records, and a token file. Return the folder of all three."""
    (tmp_path / "books").mkdir()
    for n in range(20):
        (tmp_path / "books" / f"{n:02}.txt").write_text(f"This is book number {n}. " * 20)
    (tmp_path / "code.jsonl").write_text("".join(json.dumps({"text": f"x = {n}\n"}) + "\n" for n in range(40)))
    tokenize(str(tmp_path / "code.jsonl"), str(tmp_path / "packed"))
    return tmp_path


def small(texts) -> Config:
    table = [("text", texts / "books", 5), ("tokens", str(texts / "packed"), 3), ("logic", None, np.float32(2))]
    return Config().replace(
        {
            "model.D": 16, "model.L": 1, "model.N": 2, "model.K": 1, "model.H": 8, "model.F": 16, "model.experts.E": 0,
            "model.experts.k": 0,
            "data.mixture": table, "data.examples": 200, "data.T": 32, "data.B": 4, "train.steps": 24,
            "train.log_every": 1, "train.checkpoint_every": 7, "train.eval_every": 12, "train.eval_tokens": 256,
        }
    )  # fmt: skip


def test_a_stopped_run_goes_on_bit_for_bit(texts, tmp_path, capsys):
    config, runs = small(texts), [str(tmp_path / name) for name in ("whole", "stopped")]
    whole = fit(config, runs[0])
    assert "epochs: books 0.18, packed 3.62, logic 0.10" in capsys.readouterr().out.splitlines()[-2]

    def stop(row):
        if row["step"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, runs[1], quiet=True, on_metrics=stop)
    again = fit(config, runs[1], quiet=True)
    assert_same_state(whole.state, again.state)
    found = [[row | {"tokens_per_second": 0} for row in read_metrics(run)] for run in runs]
    assert found[0] == found[1] and len(found[0]) == 24
    row = found[0][-1]
    assert (row["share/books"], row["share/packed"], row["share/logic"]) == (48 / 96, 29 / 96, 19 / 96)
    mixture = [len(corpus.tokens) - 1 for corpus in load_corpora(config.data)[0]]
    assert row["epoch/packed"] == 29 / (mixture[1] // 32) > 2
    assert [row["epoch/books"], row["epoch/logic"]] == [48 / (mixture[0] // 32), 19 / (mixture[2] // 32)]


def test_a_run_knows_its_mixture(texts, tmp_path, monkeypatch):
    """A run folder has the mixture with absolute paths. A resumed run may change the paths, but not the weights."""
    run = str(tmp_path / "run")
    monkeypatch.chdir(texts)
    argv = ["--data.mixture=text:books:5,text:code.jsonl:3,logic:2", "--train.steps=2", "--train.eval_every=0"]
    fit(parse(small(texts), argv), run, quiet=True)
    rows = read_config(run).data.mixture
    assert [row.path for row in rows] == [str(texts / "books"), str(texts / "code.jsonl"), None]
    assert evaluate(load(run).model, read_config(run), lengths=(1,), max_tokens=64)[0]["tokens"] <= 64
    (texts / "books").rename(texts / "moved")
    argv[0] = argv[0].replace("books", "moved")
    longer = [*argv, "--train.steps=4"]
    assert fit(parse(small(texts), longer), run, quiet=True).finished
    longer = [argv[0].replace(":3", ":4"), "--train.steps=6"]
    with pytest.raises(
        ValueError, match=r"the text has changed: the hash of text:moved:5,text:code.jsonl:4,logic:2 is"
    ):
        fit(parse(small(texts), [*argv[2:], *longer]), run, quiet=True)
    assert source_of(read_config(run).data, "text:elsewhere").path == "elsewhere"


def test_what_is_trained_and_held_out(texts):
    config = small(texts).replace({"data.examples": 20})  # one document of logic: it is cut in two
    data = config.data
    trained, heldout = load_corpora(data)
    alone = [load_corpus(part) for part in data.parts]
    for corpus, (train, _) in zip(trained, alone, strict=True):
        np.testing.assert_array_equal(corpus.tokens, train.tokens)
    np.testing.assert_array_equal(heldout.tokens, np.concatenate([held.tokens for _, held in alone]))
    assert heldout.documents == sum(held.documents for _, held in alone)
    assert sum(heldout.tokens == 256) == heldout.documents
    joined, _ = load_corpus(data)
    assert len(joined.tokens) == sum(len(corpus.tokens) for corpus in trained) + 1, (
        "a document that is cut gets an end of text"
    )
    found = training_data(config)
    assert found.summary.count("\n") == 2 and found.summary.endswith(f"({len(heldout.tokens):,} tokens) are held out")
    assert found.hash != training_data(config.replace({"data.mixture": data.mixture[::-1]})).hash


BAD = [
    ("text:books:0", "mixture='text:books:0': weight=0.0 must be above 0"),
    ("text:books:5,logic:-2", "mixture='text:books:5,logic:-2': weight=-2.0 must be above 0"),
    ("logic:nan", "weight=nan must be finite"),
    ("logic:much", "weight='much' of 'logic:much' must be a number; a row is SOURCE:PATH:WEIGHT or SOURCE:WEIGHT"),
    ("logic", "weight='logic' of 'logic' must be a number"),
    (":2", "':2' names no source"),
    ("books:2", "mixture: source='books' is not one of 'stdlib', 'text', 'tokens', 'logic'"),
    ("labelled:a.tsv:2", "mixture: source='labelled' is not one of"),
    ("text:2", "mixture: the row 'text:2' needs a path: SOURCE:PATH:WEIGHT"),
    ("logic:books:2", "mixture: the row 'logic:books:2' has a path, but this source reads no file"),
    ("logic:1,logic:2", "two rows have the source 'logic' and the path None; use one row with the sum of the weights"),
    ("text:nowhere:1,logic:2", "mixture: path='nowhere' does not exist"),
    ("tokens:nowhere:1,logic:2", "mixture: path='nowhere': there is no nowhere.bin"),
    ("text:short:1,logic:2", "T=32 needs at least 33 tokens, but the training part of short has"),
]


@pytest.mark.parametrize("table, message", BAD)
def test_bad_tables_are_one_line(texts, table, message, monkeypatch, capsys):
    monkeypatch.chdir(texts)
    (texts / "short").write_text("a short text")
    (texts / "config.json").write_text(small(texts).to_json())
    assert main(["config.json", "--run", "run", f"--data.mixture={table}"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (texts / "run").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.V": 200}, "V=200 is smaller than the 257 ids of tokenizer='byte'"),
        ({"data.tokenizer": "bpe"}, "mixture: path='{packed}' was made by tokenizer 'byte' with vocab_size=257"),
        (
            {"data.path": "books"},
            "path='books' is not used with a mixture, because the rows of data.mixture have the paths",
        ),
        ({"data.heldout_path": "books"}, "heldout_path='books' is not used with a mixture"),
        (
            {"data.mixture": "logic:2", "data.source": "tokens"},
            "mixture='logic:2' needs source='mixture', not 'tokens'",
        ),
        ({"data.mixture": None}, "source='mixture' needs data.mixture, a list of rows"),
        ({"data.mixture": []}, "mixture=[]: data.mixture must be a list with a row (source, path, weight)"),
        ({"data.mixture": [("logic", 1)]}, "('logic', 1) is not a row (source, path, weight)"),
        ({"data.mixture": [("logic", None, "2")]}, "weight='2' must be a number, above 0"),
        ({"data.mixture": [("text", 3, 2)]}, "path=3 must be text or null"),
    ],
)
def test_what_disagrees_with_a_mixture_is_one_line(texts, bpe, changes, message):
    if changes.get("data.tokenizer") == "bpe":
        changes, message = {"data.tokenizer": str(bpe)}, message.format(packed=texts / "packed")
    with pytest.raises(ValueError) as error:
        fit(small(texts).replace(changes), str(texts / "run"), quiet=True)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (texts / "run").exists()


def test_a_table_survives_json_and_the_command_line(texts):
    config = small(texts)
    assert Config.from_dict(json.loads(config.to_json())) == config
    assert parse(Config(), [f"--data.mixture={config.data.mixture_text}"]).data.mixture == config.data.mixture
    assert config.data.source == "mixture" and len({config.data, small(texts).data}) == 1


def test_a_source_replaces_a_mixture_and_a_mixture_a_source(texts):
    config = small(texts)
    for argv in (["--data.source=stdlib"], ["--data.mixture=none", "--data.source=text", "--data.path=a"]):
        back = parse(config, argv).data
        assert back.mixture is None and back.parts == (back,) and back.sources != ("mixture",)
    again = parse(Config(data=DataConfig(source="tokens", path="a")), ["--data.mixture=logic:2,stdlib:1"]).data
    assert (again.source, again.path, again.mixture_text) == ("mixture", None, "logic:2,stdlib:1")
    with pytest.raises(ValueError, match="mixture='logic:2' needs source='mixture', not 'tokens'"):
        DataConfig(source="tokens", mixture="logic:2")


def test_a_stream_of_a_mixture_is_read_alone():
    stream = corpora()[1]
    found = drawn(train_loader(stream, CONFIG), 100)
    assert sorted(found) == sorted(stream.tokens[:-1:8].tolist())
    assert (found == drawn(train_loader([stream], CONFIG), 100)).all()
