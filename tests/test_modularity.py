"""Test the modularity benchmark: its random choice of the modules to prune, and its statistics over seeds."""

import json

import jax
import numpy as np
import pytest

from benchmarks import modularity
from stickjax.config import Config, DataConfig, ExpertsConfig, ModelConfig
from stickjax.models.transformer import init
from stickjax.surgery import use
from stickjax.surgery.usage import batches_of

MODULES = ExpertsConfig(E=4, k=2, order="softmax_topk")
MODEL = ModelConfig(D=8, L=2, N=2, K=1, H=4, F=8, experts=MODULES, attention_experts=MODULES)
CONFIG = Config(MODEL, DataConfig(source="logic,scan", examples=2000, T=16, B=2))


def result(seed, rise, at_random, forgotten):
    steps = [{"step": 0, "attention": 0.1, "ffn": 0.1}, {"step": 9, "attention": 0.1 + rise, "ffn": 0.1 + rise}]
    return {
        "seed": seed, "information": steps, "before": {"listops": 5.0},
        "concentrated": {"whole": 1.0, "by use": 1.5, "at random": at_random},
        "extended": {"forgotten": 0.0, "new": 3.0}, "fine-tuned": {"forgotten": forgotten, "new": 2.0},
    }  # fmt: skip


RESULTS = [result(0, 0.2, 2.5, 1.0), result(1, 0.4, 3.5, 1.0), result(2, 0.6, 4.5, 4.0)]


def test_means_and_standard_errors_over_seeds():
    found = modularity.statistics(RESULTS)
    np.testing.assert_allclose(list(found.values()), [(0.4, 0.2 / 3**0.5), (2.0, 1 / 3**0.5), (2.0, 1.0)], rtol=1e-6)


def test_half_of_the_modules_remain_the_most_used_or_any():
    model = init(MODEL, jax.random.key(0))
    pruned = modularity.pruned(model, CONFIG, "logic", None)
    assert (pruned.config.experts.E, pruned.config.attention_experts.E) == (2, 2)
    data = CONFIG.replace({"data.source": "logic"}).data
    counts = use(model, batches_of(data, heldout=False, max_tokens=modularity.TOKENS))
    kept = pruned.blocks.ffn.router.slot[...] >= 0
    for layer, of_layer in zip(counts["ffn"], np.asarray(kept), strict=True):
        assert layer[of_layer].min() >= layer[~of_layer].max()
    others = [modularity.pruned(model, CONFIG, "logic", np.random.default_rng(seed)) for seed in range(4)]
    assert len({np.asarray(other.blocks.ffn.router.slot[...]).tobytes() for other in others}) > 1


def test_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(modularity, "one", lambda config, seed, folder: RESULTS[seed])
    monkeypatch.setattr(modularity, "RESULTS", tmp_path / "modularity.json")
    assert modularity.main(["--seeds", "2", "--json", "--train.steps=9", "--optim.warmup_tokens=0"]) == 1
    assert "error: warmup_tokens=0 and decay_tokens=" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert modularity.main(["--seeds", "2", "--json"]) == 0
    assert "pruned at random, less by use" in capsys.readouterr().out
    found = json.loads((tmp_path / "modularity.json").read_text())
    assert found["seeds"] == RESULTS[:2] and found["statistics"]["rise in bits about the source"][0] == pytest.approx(
        0.3
    )
    assert (tmp_path / "modularity.png").stat().st_size > 10_000
