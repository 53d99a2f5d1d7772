"""Batches of examples for all kinds of models, the sizes that follow from the data, splits and validation parts."""

import dataclasses
import hashlib

import numpy as np
import pytest

from stickjax.config import Config, DataConfig, SutConfig
from stickjax.config.command_line import load_config
from stickjax.config.family import MODEL_CONFIGS, FamilyConfig
from stickjax.config.fields import Dtype
from stickjax.data.examples import examples_of, task_of
from stickjax.data.readers import training_data
from stickjax.data.tasks import scan
from stickjax.models.vocabulary_size import with_sizes_of, with_vocabulary


@pytest.fixture(scope="module")
def families():
    """Return one model config for each kind of data that a model can read: {kind of data: config}.

    The configs for "sentences" and "translation" are defined only in these tests. No model can be made from them.
    """

    @dataclasses.dataclass(frozen=True)
    class Sentences(FamilyConfig):
        family: str = "test_sentences"
        V: int | None = None
        classes: int | None = None
        dtype: Dtype = "float32"
        param_dtype: Dtype = "float32"
        implementation: str | None = None
        reads = "sentences"

    @dataclasses.dataclass(frozen=True)
    class Translation(FamilyConfig):
        family: str = "test_translation"
        V: int | None = None
        V_target: int | None = None
        dtype: Dtype = "float32"
        param_dtype: Dtype = "float32"
        implementation: str | None = None
        reads = "translation"

    yield {"sentences": Sentences(), "translation": Translation(), "pairs": SutConfig(classes=7), "text": SutConfig()}
    del MODEL_CONFIGS["test_sentences"], MODEL_CONFIGS["test_translation"]


def digest(loader, count: int) -> str:
    found = hashlib.sha256()
    for _ in range(count):
        batch = next(loader)
        for name in sorted(batch):
            found.update(f"{name} {batch[name].shape} {batch[name].dtype}".encode())
            found.update(batch[name].tobytes())
    return found.hexdigest()


@pytest.mark.slow
def test_the_batches_of_the_logic_config_are_those_of_earlier_versions():
    """The hashes are from an earlier version. They must not change, so that runs of that version resume bit for bit."""
    data = training_data(load_config("sut_logic"))
    assert (data.hash, data.source) == ("e9d31994f6ec197e", "pairs of logic")
    assert digest(data.loader(0, 1), 20) == "67cec7b523a391bbae4c63b24805fe21757aad3ddd8f61e92b4a2e6711c7bd77"


KINDS = {  # fmt: skip
    "pairs": (dict(source="logic", examples=3000, T=40), {"V": 12, "classes": 7}, [("left", "right")]),
    "sentences": (dict(source="listops", examples=3000, T=50), {"V": 18, "classes": 10}, [("tokens",)]),
    "translation": (dict(source="scan", T=48), {"V": 17, "V_target": 10}, [("source", "brackets"), ("target",)]),
    "questions": (
        dict(source="questions", examples=500, T=18),
        {"V": 72, "V_target": 72},
        [("source", "brackets"), ("target",)],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_by_length(families, kind):
    options, ids, groups = KINDS[kind]
    config = Config(families.get(kind, families["translation"]), DataConfig(B=6, seed=3, **options))
    data, examples = training_data(config), examples_of(config, "train")
    assert data.ids == ids == task_of(config).ids
    widths, seen, size = set(), 0, config.model.padded_to
    loader = data.loader(0, 1)
    for _ in range(len(examples) // 6):
        batch = next(loader)
        for group in groups:
            longest = max((batch[name] != 0).sum(1).max() for name in group)
            width = {batch[name].shape for name in group}
            assert width == {(6, min(-(-longest // size) * size, len(examples[0][group[0]])))}
            assert all(batch[name].dtype == np.int32 and not batch[name][:, longest:].any() for name in group)
        seen += 6
        widths.add(tuple(batch[name].shape[1] for group in groups for name in group))
    assert len(widths) > 1 and seen > len(examples) - 6
    assert set(batch) - {"bucket"} == {name for group in groups for name in group} | ({"label"} & set(batch))
    # Processes divide a batch, and a curriculum begins with the shortest examples.
    whole, halves = next(data.loader(0, 1)), [next(data.loader(index, 2)) for index in range(2)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), array)
    short = next(training_data(config.replace({"data.curriculum": 50})).loader(0, 1))
    lengths = np.sort(examples.lengths().max(1))
    last = groups[-1][-1]
    assert (short[last] != 0).sum(1).max() <= lengths[len(lengths) // 10]


def test_sizes_follow_from_the_data(families):
    for kind, (options, ids, _) in KINDS.items():
        model = families.get(kind, families["translation"])
        config = with_vocabulary(Config(model, DataConfig(**options)))
        assert {name: getattr(config.model, name) for name in ids} == ids
        assert with_vocabulary(config) == config == with_sizes_of(Config(model, config.data), config)
    options = KINDS["translation"][0]
    config = Config(families["translation"], DataConfig(**options))
    assert with_vocabulary(config.replace({"model.V": 20})).model.V == 20
    with pytest.raises(ValueError, match="V_target=9 is smaller than the 10 ids of translations of scan; set V_target"):
        with_vocabulary(config.replace({"model.V_target": 9}))
    config = Config(families["sentences"], DataConfig(source="listops"))
    with pytest.raises(ValueError, match="classes=7 must be 10, the number of labels of .* listops: '0', .*, '9'$"):
        with_vocabulary(config.replace({"model.classes": 7}))


@pytest.mark.parametrize("kind", ["pairs", "sentences", "translation"])
def test_validation_examples_are_left_out_of_training(families, kind):
    options = KINDS[kind][0]
    whole = Config(families[kind], DataConfig(**options))
    config = whole.replace({"data.valid_every": 10})
    train, valid = (examples_of(config, part).rows for part in ("train", "valid"))
    assert set(train) | set(valid) == set(examples_of(whole, "train").rows)
    assert not set(train) & set(valid) and abs(len(valid) / (len(train) + len(valid)) - 0.1) < 0.01
    assert list(examples_of(config, "valid").rows) == list(valid), "the same in every run"
    assert examples_of(config, "test").rows == examples_of(whole, "test").rows
    assert training_data(config).hash != training_data(whole).hash
    with pytest.raises(ValueError, match="valid_every=0 leaves no examples for validation"):
        examples_of(whole, "valid")


def test_what_occurs_often_stays_in_training(families):
    config = Config(families["translation"], DataConfig(source="scan", split="add_jump", T=48, valid_every=10))
    valid = examples_of(config, "valid").rows
    assert len(valid) == 1467 and not any(row.command == "jump" for row in valid)
    assert len(examples_of(config, "train")) == 14_670 - 1467


def test_tests_may_be_longer_than_training(families):
    config = Config(families["sentences"], DataConfig(source="listops", T=30, examples=3000))
    train, test = (examples_of(config, part) for part in ("train", "test"))
    assert train.lengths().max() == 30 < test.lengths().max() == test[0]["tokens"].shape[0]
    assert examples_of(config, "test", T=20).lengths().max() <= 20
    config = Config(families["translation"], DataConfig(source="scan", split="length", T=22))
    assert examples_of(config, "test").lengths().max(0).tolist() == [9, 48]
    assert len(examples_of(config, "train")) == 16_990
    tokens = examples_of(config, "test")[7]
    assert task_of(config).decode["source"](tokens["source"]) == scan.generate("length").test[7].command


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("sentences", dict(source="logic"), "reads sentences: data.source must be 'listops'.*, not 'logic'"),
        ("translation", dict(source="stdlib"), "reads translation: data.source must be 'scan' or 'questions', not"),
        ("translation", dict(source="scan", T=8), "S=8 is too small: the longest list of actions has 48 words"),
        ("translation", dict(source="scan", T=20), "S=20 is too small: the longest list of actions has 48 words"),
        ("translation", dict(source="questions", valid_every=9), "valid_every=9 is not used by source='questions'"),
        (
            "sentences",
            dict(source="listops", T=2, examples=300),
            "B=16 is more than the number of training examples: 0 sentences of",
        ),
        ("text", dict(split="A", source="logic"), "split='A' is for examples, but this model reads a text"),
        ("text", dict(valid_every=9), "valid_every=9 is for examples, but this model reads a text"),
    ],
)
def test_data_that_do_not_fit_the_model(families, kind, options, message):
    with pytest.raises(ValueError, match="this model of family='sut' reads text, not examples"):
        examples_of(Config(families["text"], DataConfig(source="logic")), "train")
    with pytest.raises(ValueError, match=message) as error:
        training_data(Config(families[kind], DataConfig(**options)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(source="logic", split="D"), "source='logic': split='D' is not one of 'A', 'B', 'C'"),
        (
            dict(source="scan", split="add_jmp"),
            "source='scan': split='add_jmp' is not one of .*did you mean 'add_jump'",
        ),
        (dict(source="listops", split="A"), "split='A' is not used by source='listops'; only logic and scan have"),
        (dict(source="logic,scan", split="A"), "split='A' is not used by source='logic,scan'"),
        (dict(source="scan", valid_every=1), "valid_every=1 leaves no example for training"),
    ],
)
def test_splits_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
