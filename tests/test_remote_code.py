"""Exported folders in PyTorch: folders of `convert --remote-code`, and folders that classes of transformers open.

The tests that compare numbers need torch, transformers and flash-linear-attention. They run PyTorch in another Python,
which `torch_python` finds.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import FORWARD, assert_close

import stickjax
from benchmarks.train import torch_python
from stickjax.config import Config, ExpertsConfig, ModelConfig
from stickjax.config.rope import RopeScaling
from stickjax.convert import main
from stickjax.models.transformer import init
from stickjax.storage.hugging_face.configs import to_config_json, to_model_config
from stickjax.storage.run_folder import save

ORACLES = Path(__file__).parent / "oracles"
SIZES = dict(V=61, D=24, L=2, N=4, K=2, H=8, F=20, init_std=0.6, tied=False)
X = ExpertsConfig
# Each field of a decoder that changes the logits has a value other than its default in one of these models.
MODELS = {
    "stick_breaking": dict(
        attend_current=True, window=7, remainder="value", head_norm=True, query_key_norm="head", tied=True,
        query_key_value_bias=True, activation="geglu", m_emb=3.0, m_res=0.4, m_width=2.0,
    ),
    "experts": dict(
        experts=X(6, 3, shared=12, bias=True, bias_rate=0.1), activation="relu2", remainder="bias", norm="layer",
        query_key_norm="all", norm_eps=1e-3, final_norm_eps=1e-2, attention_scale=0.2, logits_scaling=3.0,
    ),
    "softmax": dict(
        attention="softmax", window=9, rope_theta=100.0, rope_scaling=RopeScaling("llama3", 4.0, 1.0, 3.0, 16),
        activation="gelu",
    ),
    "heads": dict(
        experts=X(5, 2, "softmax_topk", network="mlp", hidden=7), key_value="biased", activation="silu",
        attention_experts=X(4, order="softmax_topk", network="gmm", hidden=9, bias=True),
    ),
    "input_heads": dict(N=3, K=1, H=24, key_value="input", attention_experts=X(5, bias_rate=0.2), activation="reglu"),
    "softmax_heads": dict(
        attention="softmax", attention_experts=X(4), rope_scaling=RopeScaling("linear", 2.0), experts=X(4, 2),
    ),
}  # fmt: skip
# {name of a test folder: its model_type}; "mup" is the model of the config MUP.
TYPES = {path.parent.name: json.loads(path.read_text())["model_type"] for path in ORACLES.glob("hf/*/config.json")}
TYPES = dict(sorted(TYPES.items())) | {"mup": "stickbreaking_attn"}
MUP = ModelConfig(**SIZES | dict(H=6, m_emb=3.0, m_res=0.4, m_width=2.0, attention_scale=0.1))
STEPS = 9
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 13))
MASK = np.ones_like(TOKENS)
MASK[0, :5] = 0


def noisy(config: ModelConfig):
    """Return a new model with a random number added to every parameter, so that no bias is 0 and no scale is 1."""
    leaves, tree = jax.tree.flatten(jax.jit(lambda: init(config, jax.random.key(1)))())
    random = np.random.default_rng(2)
    return jax.tree.unflatten(tree, [(x + 0.1 * random.standard_normal(x.shape)).astype(x.dtype) for x in leaves])


def bits(model):
    return [(x.dtype, x.shape, x.tobytes()) for x in map(np.asarray, jax.tree.leaves(model))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return {name: (model, the folder to which it was exported)}."""
    root = tmp_path_factory.mktemp("remote_code")
    found = {name: (noisy(ModelConfig(**SIZES | changes)), root / name) for name, changes in MODELS.items()}
    for model, folder in found.values():
        stickjax.export(model, str(folder), type="stickjax")
    return found


@pytest.fixture(scope="module")
def python() -> str:
    """Return the path of a Python that has torch, transformers and flash-linear-attention."""
    if (found := torch_python()) is None:
        pytest.skip("needs torch, transformers and flash-linear-attention: set TORCH_PYTHON to a Python that has them")
    return found


@pytest.fixture(scope="module")
def answers(models, python, tmp_path_factory):
    """Return {name: (model, the arrays that torch_logits.py writes for it, the folder that transformers saved)}.

    The names are the names in MODELS and in TYPES. The folders of MODELS contain the PyTorch code that opens them. The
    folders of TYPES have none: transformers or flash-linear-attention opens them.
    """
    root, models = tmp_path_factory.mktemp("transformers"), dict(models)
    for name, kind in TYPES.items():
        model = noisy(MUP) if name == "mup" else stickjax.load(ORACLES / "hf" / name).model
        models[name] = (model, root / name)
        stickjax.export(model, str(root / name), type=kind)
    for _, folder in models.values():
        np.savez(folder / "inputs.npz", tokens=TOKENS, mask=MASK, steps=STEPS)
    script, folders = Path(__file__).with_name("torch_logits.py"), [str(folder) for _, folder in models.values()]
    environment = os.environ | {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([python, script, *folders], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {n: (m, np.load(path / "outputs.npz"), Path(f"{path}-saved")) for n, (m, path) in models.items()}


@pytest.mark.parametrize("name", [*MODELS, *TYPES])
def test_pytorch_computes_the_same(answers, name):
    """PyTorch and stickjax compute equal logits for left-padded rows.

    `generate` of PyTorch chooses the token with the largest logit in each step.
    """
    model, found, saved = answers[name]
    greedy, T = found["greedy"], TOKENS.shape[1]
    np.testing.assert_array_equal(greedy[:, :T], TOKENS)
    mask = np.concatenate([MASK, np.ones((len(greedy), STEPS), int)], 1)
    logits = np.asarray(jax.jit(lambda model: model(greedy, mask - 1).logits)(model))
    assert_close(found["logits"][MASK > 0], logits[:, :T][MASK > 0], FORWARD["float32"])
    np.testing.assert_array_equal(logits[:, T - 1 : -1].argmax(-1), greedy[:, T:])
    if not model.config.mixtures():  # a router may choose other experts after rounding
        assert_close(found["bfloat16"][MASK > 0], logits[:, :T][MASK > 0], 3e-2)
    # The folder that transformers saved has the exported parameters. In "mup", they are multiplied by the multipliers.
    exported = stickjax.load(saved.with_name(name)).model if name == "mup" else model
    assert bits(stickjax.load(saved).model) == bits(exported)


BLOCKS = """
import sys
from types import SimpleNamespace
import torch
sys.path.append(sys.argv[1])
from remote_code import modeling_stickjax as code

for T, S in (150, 150), (30, 150), (1, 150):
    for attend_current, window in (False, None), (True, 90):
        options = dict(attend_current=attend_current, window=window)
        c = SimpleNamespace(attention="stick_breaking", attention_scale=0.1, **options)
        q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8)
        # The logits are about -4, so that a part of the stick remains after a block.
        q[..., 0], k[..., 0] = 20, -2
        mask = torch.arange(S) >= torch.tensor([[0], [20]])
        code.TILE = 2**20  # one block
        wanted = code.stick_breaking(c, q, k, v, mask)
        code.TILE = 1  # blocks of 64 keys
        for found, one in zip(code.stick_breaking(c, q, k, v, mask), wanted):
            torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-4)
        assert wanted[1].max() > 0.01
"""


def test_blocks_of_keys_do_not_change_the_result(python):
    """Attention in three blocks of keys equals attention in one block.

    There are 150 keys. The texts of the other tests fit in one block.
    """
    folder = Path(stickjax.storage.hugging_face.__file__).parent
    done = subprocess.run([python, "-c", BLOCKS, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_is_read_back_and_no_code_of_it_runs(models, name, tmp_path):
    model, folder = models[name][0], shutil.copytree(models[name][1], tmp_path / name)
    for code in folder.glob("*.py"):
        code.write_text("raise SystemExit('this code must not run')")
    loaded = stickjax.load(folder)
    assert bits(loaded.model) == bits(model)
    before, after = (to_config_json(c, 8, "stickjax")["model"] for c in (model.config, loaded.config.model))
    assert before == after


def test_the_files_of_a_folder(tmp_path, capsys):
    config = Config(ModelConfig(**SIZES | MODELS["experts"], param_dtype="bfloat16", dtype="bfloat16"))
    save(tmp_path / "run", noisy(config.model), config)
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert main([run, str(out), "--remote-code", "--type=llama"]) == 2
    assert "--type: not allowed with argument --remote-code" in capsys.readouterr().err and not out.exists()
    assert main([run, str(out), "--remote-code"]) == 0
    code = Path(stickjax.storage.hugging_face.__file__).parent / "remote_code"
    written = {"config.json", "model.safetensors", "configuration_stickjax.py", "modeling_stickjax.py"}
    assert {path.name for path in out.iterdir()} == written
    for path in code.glob("*.py"):
        assert (out / path.name).read_text() == path.read_text()
    tree = json.loads((out / "config.json").read_text())
    assert (tree["model_type"], tree["torch_dtype"], tree["model"]["experts"]["E"]) == ("stickjax", "bfloat16", 6)
    assert main([str(out), str(tmp_path / "again"), "--remote-code"]) == 1
    assert "--type=stickjax needs a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(experts=X(4, 2, added=1)), "'stickjax' cannot express this model: experts: added=1 is not supported"),
        (
            dict(experts=X(4, 2, pruned=1, pruning="old_denominator")),
            "'stickjax' cannot express this model: experts: pruned=1 is not supported",
        ),
    ],
)
def test_a_decoder_that_the_code_does_not_compute_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        to_config_json(ModelConfig(**SIZES | changes), 8, "stickjax")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda tree: tree.pop("model"), "the entry model is missing"),
        (lambda tree: tree.update(wnidow=3), "wnidow=3: unknown"),
        (lambda tree: tree["model"].update(wnidow=3), "model.wnidow is not a field .*did you mean 'window'"),
        (lambda tree: tree["model"].pop("V"), "model: the entry V is missing"),
        (lambda tree: tree["model"].update(D="wide"), "D='wide' must be a whole number"),
        (lambda tree: tree["model"].update(attention="mine"), "model.attention='mine' is not one of 'stick_breaking'"),
        (lambda tree: tree["model"].update(experts=4), "model: experts=4 must be of type dict"),
        (lambda tree: tree["model"]["experts"].update(kk=4), "unknown config key 'experts.kk'"),
    ],
)
def test_a_wrong_config_is_refused(change, said):
    tree = to_config_json(ModelConfig(**SIZES), 8, "stickjax")
    change(tree)
    with pytest.raises(ValueError, match=said):
        to_model_config(tree)


def test_it_is_written_only_if_the_user_asks():
    with pytest.raises(ValueError, match="^only the model_type 'stickjax' can hold this model; use --remote-code"):
        to_config_json(ModelConfig(**SIZES | MODELS["heads"]), 8)
    with pytest.raises(ValueError, match=r"the model_types (?!.*stickjax).* can all hold this model"):
        to_config_json(ModelConfig(**SIZES, attention="softmax"), 8)
