"""Configs can be parsed, stored and read again, and every kind of bad input gives one clear line."""

import json
import math
import operator
import typing
from pathlib import Path

import numpy as np
import pytest

from stickjax import Config, DataConfig, ExpertsConfig, ModelConfig, OptimConfig, SutConfig, TrainConfig
from stickjax.config import field_names, locate
from stickjax.config.command_line import describe, load_config, named_configs, parse
from stickjax.config.fields import LARGEST, field_types
from stickjax.config.synonyms import SYNONYMS
from stickjax.storage.run_config import read_config

ROOT = Path(__file__).parent.parent


def test_a_config_survives_json():
    config = parse(Config(), ["--model.window=64", "--optim.clip=none", "--data.B", "8", "--train.steps=1e3"])
    assert config.train.steps == 1000 and config.optim.clip is None
    assert Config.from_dict(json.loads(config.to_json())) == config
    assert config.diff(Config()) == [
        "model.window: 64 -> None", "data.B: 8 -> 16", "optim.clip: None -> 1.0", "train.steps: 1000 -> 400"
    ]  # fmt: skip


def test_help_names_every_field():
    text = describe(Config())
    for name in field_names(ModelConfig):
        assert f"--{name}=" in text
    assert "--model.attention_experts.network=linear " in text


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_file_loads_and_says_how_to_run_it(path):
    config = load_config(str(path))
    assert isinstance(config, Config)
    text = path.read_text()
    assert f"python -m stickjax.train configs/{path.name}" in text.split('"""')[1]


BAD = [
    (["--optim.peek_lr=1"], "unknown config key 'optim.peek_lr' (did you mean 'optim.peak_lr'?)"),
    (["--steps=1"], "unknown config key 'steps' (did you mean 'train.steps'?)"),
    (["--model.N=6", "--model.K=4"], "N=6 query heads must be a multiple of K=4 key heads"),
    (["--model.experts.E=2", "--model.experts.k=3"], "k=3 experts per token cannot exceed E=2 experts"),
    (["--model.experts.E=4", "--model.experts.k=1"], "k=1 with order='topk_softmax' has a constant gate"),
    (["--model.experts.E=4"], "E=4 experts need k >= 1"),
    (["--model.D=0"], "D=0 must be at least 1"),
    (["--model.attention=softmx"], "did you mean 'softmax'?"),
    (["--model.attention=softmax", "--model.remainder=bias"], "remainder='bias' needs attention='stick_breaking'"),
    (["--model.D=wide"], "D='wide' must be a whole number, at least 1"),
    (["--model.D=1.5"], "D='1.5' must be a whole number, at least 1"),
    (["--model.D=1e30"], "D=1000000000000000019884624838656 must be at most 10^15"),
    (["--model.tied=maybe"], "tied='maybe' must be true or false"),
    (["--data.text_field="], "text_field='' must not be empty"),
    (["--lr=1"], "unknown config key 'lr' (did you mean 'optim.peak_lr'?)"),
    (["--model.vocab_size=1"], "(did you mean 'model.V'?)"),
    (["--seed=1"], "(did you mean 'data.seed' or 'train.seed'?)"),
    (["--data.T"], "--data.T needs a value"),
    (["tiny"], "unexpected argument 'tiny'"),
    (["--data.source=text"], "source='text' needs a path"),
    (["--data.path=x"], "path='x' is not used by source='stdlib'"),
    (["--data.source=logic,scan", "--data.path=x"], "path='x' is not used by source='logic,scan'"),
    (["--data.source=logic,tokens"], "source='logic,tokens' needs a path"),
    (["--data.source=stdlib,logc"], "source='logc' is not one of 'stdlib', 'text', 'tokens', 'logic'"),
    (["--data.source=stdlib,logc"], "(did you mean 'logic'?)"),
    (["--data.source=stdlib,logic,stdlib"], "source='stdlib,logic,stdlib' names 'stdlib' twice"),
    (["--data.source=text,tokens", "--data.path=x"], "the sources 'text' and 'tokens' both read"),
    (["--data.source=text,logic", "--data.path=x", "--data.heldout_path=y"], "heldout_path='y' needs one source"),
    (["--data.examples=0"], "examples=0 must be at least 1"),
    (["--data.B=6", "--train.accumulate=4"], "B=6 sequences must be a multiple of accumulate=4"),
    (["--optim.warmup_tokens=-1"], "warmup_tokens=-1 must be at least 0"),
    (["--optim.decay_tokens=1e12"], "exceed the run of steps * B * T = 1638400 tokens"),
    (["--optim.peak_lr=nan"], "peak_lr=nan must be finite"),
    (["--optim.weight_decay=nan"], "weight_decay=nan must be finite"),
    (["--train.steps=0"], "steps=0 must be at least 1"),
]


@pytest.mark.parametrize("words, message", BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_clear_line(words, message):
    with pytest.raises(ValueError) as error:
        parse(Config(), words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_stored_config_with_an_unknown_field_is_refused():
    tree = Config().to_dict()
    tree["model"]["widht"] = 3
    with pytest.raises(ValueError, match=r"unknown config key 'model.widht'"):
        Config.from_dict(tree)


def test_a_single_expert_needs_no_choice():
    """A config with E=1, k=1 is valid, although k=1 is an error with more experts.

    With one expert the gate is always 1, so the router has nothing to learn.
    """
    assert ModelConfig(experts=ExpertsConfig(E=1, k=1)).experts.k == 1


def test_sections_are_frozen_and_hashable():
    assert len({ModelConfig(), ModelConfig()}) == 1
    for section in (ModelConfig, DataConfig, OptimConfig, TrainConfig):
        with pytest.raises(AttributeError):
            section().unknown = 1


CONFIGS = {"decoder": Config(ModelConfig()), "sut": Config(SutConfig())}
FIELDS = [(kind, key) for kind, config in CONFIGS.items() for key in field_names(type(config.model))]
# Integers and floats, also very large, very small and non-finite ones.
NUMBERS = [16, 16.5, -1, -1e9, 10**30, 1e300, 1e-300, math.nan, math.inf, -math.inf]
OTHERS = [None, True, "", "16", "no", [], [16], {}, {"a": 1}]


def allowed(section, name, value) -> bool:
    """Return whether field `name` of the config class `section` may have `value`, by its annotation and its bounds.

    The tests compare this with what the class accepts.
    """
    kinds, bounds = field_types(section)[name], section.__dataclass_fields__[name].metadata["bounds"]
    if value is None:
        return type(None) in kinds
    if isinstance(value, bool | str):
        return (type(value) in kinds and value != "") or any(value in typing.get_args(kind) for kind in kinds)
    if isinstance(value, list | dict) or not {int, float} & set(kinds):
        return False
    if int in kinds:
        if not isinstance(value, int) or value > LARGEST:
            return False
    elif not math.isfinite(value) or (value and not 1e-37 < abs(value) < 3e38):
        return False
    return (
        value >= bounds.get("at_least", -math.inf)
        and value > bounds.get("above", -math.inf)
        and value <= bounds.get("at_most", math.inf)
        and value < bounds.get("below", math.inf)
    )


@pytest.mark.parametrize("kind, key", FIELDS, ids=lambda x: x)
def test_every_field_is_held_to_its_type_and_bounds(kind, key):
    """A value of a wrong type or out of bounds gives one line of error that names the field.

    This holds in Python and in JSON, for every field of every kind of config.
    """
    part, *group, name = key.split(".")
    section = type(operator.attrgetter(".".join([part, *group]))(CONFIGS[kind]))
    is_float = float in field_types(section)[name]
    for value in [*NUMBERS, *OTHERS]:
        makers = [lambda value=value: section(**{name: value})]
        tree = {"model": {"family": kind}}
        fields = tree.setdefault(part, {})
        for inner in group:
            fields = fields.setdefault(inner, {})
        fields[name] = value
        makers.append(lambda tree=tree: Config.from_dict(json.loads(json.dumps(tree))))
        for make in makers:
            if allowed(section, name, value):
                try:
                    made = make()
                except ValueError as error:  # an error about several fields together, such as N and K
                    assert f"{name}={value} must be a " not in str(error) and "finite" not in str(error), error
                    continue
                made = operator.attrgetter(".".join([part, *group]))(made) if isinstance(made, Config) else made
                assert getattr(made, name) == (float(value) if isinstance(value, int) and is_float else value)
            else:
                with pytest.raises(ValueError) as error:
                    make()
                assert f"{name}=" in str(error.value) and "\n" not in str(error.value)
                assert len(str(error.value)) < 250
                if isinstance(value, float) and not math.isfinite(value) and is_float:
                    assert "must be finite" in str(error.value)


def test_bounds_say_what_trains_nothing():
    refused = dict(
        logits_scaling=0, init_std=0, norm_eps=0, z_weight=-1, beta1=1.5, beta2=1, eps=-1, a=0, end_ratio=2,
        weight_decay=-0.1, seed=-1, clip=0, halting_threshold=0, dropout=1, rope_theta=0, mi_weight=-1,
    )  # fmt: skip
    for section in (ModelConfig, SutConfig, DataConfig, OptimConfig, TrainConfig):
        for name in refused.keys() & section.__dataclass_fields__.keys():
            with pytest.raises(ValueError, match=f"^{name}="):
                section(**{name: refused[name]})


def test_numbers_of_numpy_and_paths_become_plain():
    config = Config(
        ModelConfig(D=np.int64(64), m_emb=np.float32(2)), DataConfig(source="text", path=Path("a")), OptimConfig(clip=1)
    )
    assert Config.from_dict(json.loads(config.to_json())) == config
    assert (type(config.model.D), type(config.optim.clip), config.data.path) == (int, float, "a")
    with pytest.raises(ValueError, match=r"data={'T': 64} must be a DataConfig"):
        Config(data={"T": 64})


TREES = [
    ([], "a config is a JSON object with the sections model, data, optim, train, mesh, not []"),
    (None, "not None"),
    (3, "not 3"),
    ({"foo": {}}, "unknown section 'foo'"),
    ({"modle": {}}, "unknown section 'modle' (did you mean 'model'?)"),
    ({"model": None}, "model=None must be a JSON object of fields"),
    ({"model": [1]}, "model=[1] must be a JSON object of fields"),
    ({"model": {"family": "bert"}}, "family='bert' is not one of 'decoder', 'latent_tree', 'ordered_memory', 'sut'"),
    ({"model": {"family": []}}, "family=[] is not one of"),
    ({"model_type": "llama", "hidden_size": 8}, "this is the config of a Hugging Face model; convert its folder first"),
]


@pytest.mark.parametrize("tree, message", TREES, ids=lambda x: json.dumps(x)[:40])
def test_json_that_is_no_config(tree, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tree))
    for read in (load_config, read_config):
        with pytest.raises(ValueError) as error:
            read(str(tmp_path / "config.json") if read is load_config else tmp_path)
        if read is load_config or "Hugging" not in message:
            assert message in str(error.value) and str(error.value).startswith(str(tmp_path))


FILES = {
    "deep.json": ("[" * 100_000, "deep.json: the JSON is nested too deeply"),
    "none.json": ("", "none.json: the file is not JSON: Expecting value"),
    "cut.json": ('{"model": ', "cut.json: the file is not JSON"),
    "latin.json": (b'{"\xe9": 1}', "latin.json: the file is not JSON: 'utf-8' codec can't decode"),
    "syntax.py": ("def get_config()\n    pass\n", "syntax.py:1: expected ':'"),
    "nul.py": (b"x = 1\n\0", "nul.py"),
    "raises.py": ("\n1 / 0\n", "raises.py:2: ZeroDivisionError: division by zero"),
    "imports.py": ("import nowhere_at_all\n", "imports.py:1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    "exits.py": ("raise SystemExit(0)\n", "exits.py:1: SystemExit: 0"),
    "nothing.py": ("x = 1\n", "nothing.py: the file defines no function get_config()"),
    "number.py": ("get_config = 3\n", "number.py:1: get_config() must take no arguments: 3 is not a callable object"),
    "needs.py": ("\n\ndef get_config(x, y=1): pass\n", "needs.py:3: get_config() must take no arguments: missing a"),
    "returns.py": (
        "def get_config(): return None\n",
        "returns.py: get_config() must return a stickjax.Config, not None",
    ),
    "field.py": (
        "from stickjax import DataConfig\ndef get_config():\n    return DataConfig(T='64')\n",
        "field.py:3: T='64' must be a whole number, at least 1",
    ),
    "config.yaml": ("model: 3\n", "config.yaml is not a config: a config is a name (moduleformer_tiny, "),
    "weights.safetensors": (b"\0\1", "weights.safetensors is not a config: a config is a name"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_config(name, tmp_path):
    text, message = FILES[name]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        load_config(str(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name)) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_and_names_that_are_no_config(tmp_path):
    with pytest.raises(ValueError, match="is a folder; a config is a name"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("\ufeff" + Config().to_json())
    with pytest.raises(ValueError, match=r"is a folder; did you mean .*config.json\? To start from .*: --init-from "):
        load_config(str(tmp_path))
    assert load_config(f"{tmp_path}/config.json") == Config(), "a byte order mark is not part of the text"
    with pytest.raises(ValueError, match=r"^tinny does not exist \(did you mean 'tiny'\?\); a config is a name \("):
        load_config("tinny")
    with pytest.raises(ValueError, match=r"^elsewhere/configs/tiny.py does not exist \(did you mean 'tiny'\?\)"):
        load_config("elsewhere/configs/tiny.py")


def test_configs_by_name():
    assert set(named_configs()) == {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert load_config("tiny_softmax") == load_config(str(ROOT / "configs" / "tiny_softmax.py"))


def test_words_of_other_programs_name_fields():
    known = field_names()
    for name, words in SYNONYMS.items():
        assert name in known or name.startswith(("--", "CONFIG")), name
        for word in set(words.split()) - {"data", "depth"}:  # only models of latent trees have a field `depth`
            assert all(word != key.partition(".")[2] for key in known), f"{word} is a field itself"
    assert locate(Config(SutConfig()), "model.clip") == ("model", "clip")
    with pytest.raises(ValueError, match=r"unknown config key 'model.experts.e' .did you mean 'model.experts.E'"):
        locate(Config(), "model.experts.e")
    with pytest.raises(ValueError, match=r"unknown config key 'model.clip' .did you mean 'optim.clip'"):
        locate(Config(), "model.clip")
