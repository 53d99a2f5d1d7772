"""The model_type `stickbreaking` of the released 3B stick-breaking model.

The tests cover the names of its tensors, and the two orders of the rows of mlp.c_fc: all up rows before all gate rows,
or up and gate rows in turns.
"""

import json

import jax
import numpy as np
import pytest
from conftest import assert_close
from safetensors.numpy import load_file
from test_folding import LOGITS, MUP, random_model

import stickjax
from stickjax.convert import export, main

TYPES = ("stickbreaking", "stickbreaking_interleaved", "stickbreaking_attn")


@pytest.mark.parametrize("heads", [dict(K=2, query_key_value_bias=True), dict(K=4, tied=False)], ids=str)
def test_the_tensors_of_stickbreaking_attn_are_written_in_another_layout(heads, tmp_path):
    model, N, H = random_model(**heads), 4, 4
    for kind in TYPES:
        export(model, str(tmp_path / kind), type=kind)
    halves, interleaved, plain = (load_file(tmp_path / kind / "model.safetensors") for kind in TYPES)
    for i in range(2):
        ours, theirs, group = f"transformer.h.{i}", f"model.layers.{i}", N // heads["K"]
        for part in ["weight"] + ["bias"] * heads.get("query_key_value_bias", False):
            q, k, v = (plain[f"{theirs}.attn.{x}_proj.{part}"] for x in "qkv")
            rows = []
            for kv in range(heads["K"]):
                one = slice(kv * H, (kv + 1) * H)
                rows += [q[kv * group * H : (kv + 1) * group * H], k[one], v[one]]
            for found in (halves, interleaved):
                assert (found[f"{ours}.attn.c_attn.{part}"] == np.concatenate(rows)).all()
        gate, up = (plain[f"{theirs}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        assert (halves[f"{ours}.mlp.c_fc.weight"] == np.concatenate([up, gate])).all()
        assert (interleaved[f"{ours}.mlp.c_fc.weight"][::2] == gate).all()
        assert (interleaved[f"{ours}.mlp.c_fc.weight"][1::2] == up).all()
        for a, b in (("attn.c_proj", "attn.o_proj"), ("mlp.c_proj", "mlp.down_proj"), ("ln_1", "attn_norm")):
            assert (halves[f"{ours}.{a}.weight"] == plain[f"{theirs}.{b}.weight"]).all()
        assert (halves[f"{ours}.ln_2.weight"] == plain[f"{theirs}.mlp_norm.weight"]).all()
    names = [("wte", "embeddings"), ("ln_f", "norm")]
    assert all((halves[f"transformer.{a}.weight"] == plain[f"model.{b}.weight"]).all() for a, b in names)
    assert ("lm_head.weight" in halves) == (not heads.get("tied", True))


def test_every_type_gives_the_logits_of_the_model(tmp_path):
    model = random_model(**MUP | dict(query_key_value_bias=True))
    for kind in TYPES:
        export(model, str(tmp_path / kind), type=kind)
        loaded = stickjax.load(tmp_path / kind, changes={"model.implementation": "reference"})
        assert_close(LOGITS(loaded.model), LOGITS(model), 1e-5)
        same = [(a == b).all() for a, b in zip(*map(jax.tree.leaves, (loaded.model, model)), strict=True)]
        assert all(same) == (kind != "stickbreaking_attn")  # this type has no multipliers: they are folded


def test_a_folder_that_does_not_tell_its_layout_is_refused_until_the_user_says_it(tmp_path, capsys):
    model = random_model(remainder="value")
    export(model, str(tmp_path / "hf"), type="stickbreaking_interleaved")
    path = tmp_path / "hf/config.json"
    tree = json.loads(path.read_text())
    assert tree["model_type"] == "stickbreaking" and "architectures" not in tree and tree["sb_remainder"] is True
    assert tree.pop("use_interleaved_weights") is True
    path.write_text(json.dumps(tree))
    assert main([str(tmp_path / "hf"), str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "config.json: model_type='stickbreaking' has two possible orders of the rows of mlp.c_fc" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()
    path.write_text(json.dumps(tree | {"use_interleaved_weights": True}))
    loaded = stickjax.load(tmp_path / "hf")
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (loaded.model, model)), strict=True))
    path.write_text(json.dumps(tree | {"use_interleaved_weights": False}))
    assert (stickjax.load(tmp_path / "hf").model.blocks.ffn.w_in[...] != model.blocks.ffn.w_in[...]).any()


def test_a_copy_of_the_embedding_must_be_equal_to_it(tmp_path):
    from safetensors.numpy import save_file

    export(random_model(), str(tmp_path / "hf"), type="stickbreaking")
    path = tmp_path / "hf/model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, path)
    assert stickjax.load(tmp_path / "hf").config.model.tied
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, path)
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        stickjax.load(tmp_path / "hf")
