"""The vocabulary size V comes from the tokenizer unless the config gives it.

The size from the tokenizer is rounded up so that the mesh can partition it.
"""

import json

import jax
import pytest

from stickjax.config import Config, DataConfig, ModelConfig, SutConfig, TrainConfig
from stickjax.models.transformer import init
from stickjax.models.vocabulary_size import with_vocabulary
from stickjax.storage.run_config import read_config
from stickjax.train import fit

TOKENIZER = {
    "version": "1.0", "added_tokens": [{"id": 4, "content": "</s>", "single_word": False, "lstrip": False,
    "rstrip": False, "normalized": False, "special": True}],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2, "?": 3, "</s>": 4}, "unk_token": "?"},
}  # fmt: skip


@pytest.fixture
def text(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "text").mkdir()
    for name in range(20):
        (tmp_path / "text" / f"{name}.txt").write_text("a b c " * 20)
    return DataConfig(source="text", path=str(tmp_path / "text"), tokenizer=str(tmp_path / "tokenizer.json"), T=8, B=2)


def test_v_is_that_of_the_tokenizer_unless_given(text):
    config = Config(ModelConfig(), text)
    assert config.model.V is None and Config.from_dict(json.loads(config.to_json())) == config
    assert with_vocabulary(config).model.V == 5
    assert with_vocabulary(config.replace({"model.V": 64})).model.V == 64
    assert with_vocabulary(config.replace({"mesh.tensor": 4})).model.V == 8
    assert with_vocabulary(config.replace({"mesh.tensor": -1}), devices=jax.devices()[:3]).model.V == 6
    assert with_vocabulary(Config(SutConfig(classes=7), DataConfig(source="logic"))).model.V == 12
    with pytest.raises(ValueError, match="V=4 is smaller than the 5 ids of tokenizer="):
        with_vocabulary(config.replace({"model.V": 4}), {"V": 5})
    with pytest.raises(ValueError, match="nowhere.json"):
        with_vocabulary(config.replace({"data.tokenizer": "nowhere.json"}))


def test_a_model_by_itself_has_bytes():
    model = jax.eval_shape(lambda: init(ModelConfig(D=8, L=1, N=1, K=1, H=8, F=8), jax.random.key(0)))
    assert model.embed.shape == (257, 8) and model.config.vocabulary == 257


def test_a_run_keeps_its_v(text, tmp_path, capsys):
    """A resumed run keeps the V of its first start, which was rounded up for the first mesh.

    This holds also on a mesh that would give another V.
    """
    model = ModelConfig(D=8, L=1, N=2, K=2, H=4, F=8)
    config = Config(model, text, train=TrainConfig(steps=1, log_every=1), optim=Config().optim).replace(
        {"optim.schedule": "constant", "mesh.tensor": 2}
    )
    run = tmp_path / "run"
    fit(config, str(run))
    assert read_config(run).model.V == 6
    assert "V=6, more than the 5 ids of the text" in capsys.readouterr().out
    again = fit(config.replace({"mesh.tensor": 1, "train.steps": 2}), str(run), quiet=True)
    assert again.finished and again.state.params.embed.shape == (6, 8)
