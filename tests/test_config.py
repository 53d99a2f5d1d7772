"""Configs: parsing, storing, and one clear line for every kind of bad input."""

import json
from pathlib import Path

import pytest

from stickjax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from stickjax.options import describe, load_config, parse

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
    for section in ("model", "data", "optim", "train"):
        for name in vars(getattr(Config(), section)):
            assert f"--{section}.{name}=" in text


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
    (["--model.E=2", "--model.k=3"], "k=3 experts per token cannot exceed E=2 experts"),
    (["--model.E=4", "--model.k=1"], "k=1 with router='topk_softmax' has a constant gate"),
    (["--model.E=4"], "E=4 experts need k >= 1"),
    (["--model.D=0"], "D=0 must be at least 1"),
    (["--model.attention=softmx"], "did you mean 'softmax'?"),
    (["--model.attention=softmax", "--model.remainder=bias"], "remainder='bias' needs attention='stick_breaking'"),
    (["--model.D=wide"], "--model.D=wide: expected int"),
    (["--model.D=1.5"], "--model.D=1.5: expected int"),
    (["--model.tied=maybe"], "--model.tied=maybe: expected bool"),
    (["--data.T"], "--data.T needs a value"),
    (["tiny"], "unexpected argument 'tiny'"),
    (["--data.source=text"], "source='text' needs a path"),
    (["--data.path=x"], "path='x' is not used by source='stdlib'"),
    (["--data.source=logic,scan", "--data.path=x"], "path='x' is not used by source='logic,scan'"),
    (["--data.source=logic,tokens"], "source='logic,tokens' needs a path"),
    (["--data.source=stdlib,logc"], "source='logc' is not one of 'stdlib', 'text', 'tokens', 'logic'"),
    (["--data.source=stdlib,logc"], "(did you mean 'logic'?)"),
    (["--data.source=stdlib,logic,stdlib"], "source='stdlib,logic,stdlib' names 'stdlib' twice"),
    (["--data.source=text,tokens", "--data.path=x"], "text and tokens cannot share the one path"),
    (["--data.source=text,logic", "--data.path=x", "--data.heldout_path=y"], "heldout_path='y' needs one source"),
    (["--data.examples=0"], "examples=0 must be at least 1"),
    (["--data.B=6", "--train.accumulate=4"], "B=6 sequences must be a multiple of accumulate=4"),
    (["--optim.warmup_tokens=-1"], "warmup_tokens=-1 must be at least 0"),
    (["--optim.decay_tokens=1e12"], "exceed the run of steps * B * T = 1638400 tokens"),
    (["--optim.peak_lr=nan"], "peak_lr=nan must be positive"),
    (["--optim.weight_decay=nan"], "weight_decay=nan must be at least 0"),
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


def test_sections_are_frozen_and_hashable():
    assert len({ModelConfig(), ModelConfig()}) == 1
    for section in (ModelConfig, DataConfig, OptimConfig, TrainConfig):
        with pytest.raises(AttributeError):
            section().unknown = 1
