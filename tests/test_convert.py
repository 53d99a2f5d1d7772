"""Test the conversion between run folders and Hugging Face folders.

The conversion is bitwise exact and needs little memory. A bad folder gives a clear error.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import stickjax
from stickjax import evaluate, generate
from stickjax.config import Config, ExpertsConfig, ModelConfig
from stickjax.convert import export, main
from stickjax.data.tokenizer import ByteTokenizer, load_tokenizer
from stickjax.models.transformer import init
from stickjax.parallel.mesh import make_mesh
from stickjax.storage.checkpoints import Checkpoints
from stickjax.storage.hugging_face.configs import to_config_json
from stickjax.storage.run_config import write_config
from stickjax.storage.run_folder import Loaded, load, save
from stickjax.train import fit

ORACLES = Path(__file__).parent / "oracles"
FOLDERS = sorted(path.parent for kind in ("hf", "moduleformer") for path in ORACLES.glob(f"{kind}/*/config.json"))
SIZES = dict(V=257, D=16, L=2, N=2, K=1, H=8, F=24, attention="softmax")


def tensors(folder):
    """Return all tensors of a Hugging Face folder as arrays, by name."""
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}


def same_bits(ours, theirs):
    return [(x.dtype, x.shape, x.tobytes()) for x in map(np.asarray, jax.tree.leaves(ours))] == [
        (x.dtype, x.shape, x.tobytes()) for x in map(np.asarray, jax.tree.leaves(theirs))
    ]


# Both directions


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_there_and_back_is_the_same_to_the_bit(folder, tmp_path, capsys):
    run, back, again = (str(tmp_path / name) for name in ("run", "back", "again"))
    kind = f"--type={json.loads((folder / 'config.json').read_text())['model_type']}"
    assert main([str(folder), run]) == main([run, back, "--shard-bytes=2e5", kind]) == main([back, again]) == 0
    assert capsys.readouterr().err == "" and sorted(os.listdir(tmp_path)) == ["again", "back", "run"]
    original = tensors(folder)
    if "granitemoe" in str(folder):  # converted folders have the published names
        original = {n.replace("experts.gate_up_proj", "input_linear.weight"): a for n, a in original.items()}
        original = {n.replace("experts.down_proj", "output_linear.weight"): a for n, a in original.items()}
        original = {n.replace("router.weight", "router.layer.weight"): a for n, a in original.items()}
    assert len(list(Path(back).glob("*.safetensors"))) > 1
    found = tensors(Path(back))
    assert found.keys() == original.keys()
    assert all(found[n].tobytes() == original[n].tobytes() and found[n].shape == original[n].shape for n in original)
    first = stickjax.load(folder)
    for other in map(stickjax.load, (run, back, again)):
        assert same_bits(first.model, other.model) and other.step == 0 and other.tokenizer is None
        assert first.config.replace({"data.tokenizer": other.config.data.tokenizer}) == other.config


def test_a_run_with_checkpoints_is_exported(tmp_path, capsys):
    config = Config(
        ModelConfig(**SIZES, experts=ExpertsConfig(E=4, k=2), param_dtype="bfloat16", dtype="bfloat16", m_width=3.0)
    )
    for step in (1, 2):
        model = init(config.model, jax.random.key(step))
        write_config(tmp_path / "run", config)
        with Checkpoints(tmp_path / "run") as checkpoints:
            checkpoints.save(step, {"params": model}, {})
    assert main([str(tmp_path / "run"), str(tmp_path / "first"), "--step=1", "--type=granitemoe"]) == 0
    assert main([str(tmp_path / "run"), str(tmp_path / "last"), "--type=granitemoe"]) == 0
    assert same_bits(stickjax.load(tmp_path / "first").model, init(config.model, jax.random.key(1)))
    loaded = stickjax.load(tmp_path / "last")
    assert same_bits(loaded.model, model) and loaded.config.model.dtype == "bfloat16"
    assert loaded.config.model.logits_scaling == config.model.m_width
    assert main([str(tmp_path / "run"), str(tmp_path / "none"), "--step=7"]) == 1
    assert "no checkpoint of step 7" in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            dict(attention="stick_breaking", remainder="bias"),
            "'stickbreaking_attn', the most similar to this model, cannot express remainder='bias'",
        ),
        (
            dict(attention="stick_breaking", experts=ExpertsConfig(4, 2)),
            "'moduleformer', the most similar to this model, cannot express this model: ",
        ),
        ({}, "the model_types granite, granitemoehybrid, llama can all hold this model; choose one with --type"),
        (
            dict(attention="stick_breaking", attention_experts=ExpertsConfig(3), experts=ExpertsConfig(4, 2)),
            "'moduleformer', the most similar to this model, cannot express .*attend_current=False",
        ),
        (dict(window=7), "'granite', .* cannot express window=7"),
        (
            dict(attention="stick_breaking", experts=ExpertsConfig(4, 2, added=1)),
            "^no model_type can hold this model; model_type 'moduleformer', the most similar",
        ),
        (dict(activation="geglu"), "cannot express activation='geglu'"),
        (
            dict(experts=ExpertsConfig(4, 2, "softmax_topk")),
            "'granitemoe', .* cannot express experts.order='softmax_topk'",
        ),
        (dict(experts=ExpertsConfig(4, 2, bias_rate=0.1)), "cannot express experts.bias_rate=0.1"),
        (
            dict(experts=ExpertsConfig(4, 2), attention_experts=ExpertsConfig(3), m_emb=2.0),
            "'jetmoe', .* cannot express .*m_emb=2.0, .*attention_experts.E=3",
        ),
    ],
)
def test_what_a_model_type_cannot_express_is_not_exported(changes, said, tmp_path):
    model = init(ModelConfig(**SIZES | changes), jax.random.key(0))
    with pytest.raises(ValueError, match=said):
        export(model, str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kind, changes, said",
    [
        ("llama", dict(m_emb=2.0), "model_type 'llama' cannot express m_emb=2.0"),
        ("qwen3", {}, "'qwen3' cannot express query_key_norm='none'"),
        ("olmoe", dict(experts=ExpertsConfig(4, 2)), "'olmoe' cannot express query_key_norm='none'"),
        ("mixtral", dict(experts=ExpertsConfig(4, 2, shared=8)), "'mixtral' cannot express experts.shared=8"),
        ("granite", dict(rope_theta=None), "'granite' cannot express rope_theta=None"),
        ("stickbreaking_attn", dict(attention="stick_breaking", H=4), "'stickbreaking_attn' cannot express H=4"),
        ("llamas", {}, "type='llamas' is not one of .* .did you mean 'llama'"),
    ],
)
def test_a_type_that_cannot_hold_the_model_is_refused(kind, changes, said):
    with pytest.raises(ValueError, match=said):
        to_config_json(ModelConfig(**SIZES | changes), 8, kind)


def test_a_type_is_only_for_what_is_written(tmp_path, capsys):
    assert main([str(FOLDERS[0]), str(tmp_path / "out"), "--type=llama"]) == 1
    assert "--type=llama needs a run folder" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_fields_that_change_no_logits_do_not_hinder(tmp_path):
    changes = dict(m_width=2.0, remat="full", implementation="xla")
    model = init(ModelConfig(**SIZES | changes), jax.random.key(0))
    export(model, str(tmp_path / "out"), type="granite")
    assert stickjax.load(tmp_path / "out").config.model.logits_scaling == 2.0


def test_what_exists_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main([str(FOLDERS[0]), str(tmp_path / "out")]) == 1
    assert "choose a new folder" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-5e9"])
def test_a_file_holds_at_least_a_byte(size, tmp_path, capsys):
    assert main([str(FOLDERS[0]), str(tmp_path / "out"), f"--shard-bytes={size}"]) == 1
    assert f"--shard-bytes={float(size)} must be" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stickjax.convert.write_safetensors", full)
    assert main([str(FOLDERS[0]), str(tmp_path / "out")]) == 1
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())


# Programs that read the folders


@pytest.fixture
def words(tmp_path):
    """Return the path of a tokenizer.json with three words."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_the_tokenizer_goes_along(words, tmp_path, capsys):
    config = Config(ModelConfig(**SIZES | dict(V=3))).replace({"data.tokenizer": words, "data.T": 64})
    loaded = Loaded(init(config.model, jax.random.key(0)), config, load_tokenizer(words), 0)
    export(loaded, str(tmp_path / "hf"), type="granite")
    tree, named = (json.loads((tmp_path / f"hf/{name}.json").read_text()) for name in ("config", "tokenizer_config"))
    assert tree["eos_token_id"] == 0 and named["eos_token"] == "<|endoftext|>"
    assert main([str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    for folder in ("hf", "moved"):
        loaded = stickjax.load(tmp_path / folder)
        assert loaded.tokenizer.encode("b a").tolist() == [2, 1] and loaded.config.data.T == 64
        assert generate.main([str(tmp_path / folder), "--prompt=a b", "--max-new-tokens=3"]) == 0
    assert len(set(capsys.readouterr().out.splitlines()[-2:])) == 1


SAID = {
    "generation_config.json": json.dumps({"eos_token_id": [1, 2], "temperature": 0.6}),
    "tokenizer_config.json": json.dumps({"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}),
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
}


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_what_a_folder_says_about_special_tokens_is_kept(has_tokenizer, tmp_path, words, capsys):
    hf = Path(shutil.copytree(ORACLES / "hf/granite_tied", tmp_path / "hf"))
    tree = json.loads((hf / "config.json").read_text()) | dict(eos_token_id=0, bos_token_id=4, pad_token_id=None)
    (hf / "config.json").write_text("\ufeff" + json.dumps(tree))
    said = SAID | ({"generation_config.json": json.dumps({"eos_token_id": [0, 2]})} if has_tokenizer else {})
    for name, text in said.items():
        (hf / name).write_text(text)
    if has_tokenizer:
        shutil.copy(words, hf / "tokenizer.json")
    assert (
        main([str(hf), str(tmp_path / "run")])
        == main([str(tmp_path / "run"), str(tmp_path / "back"), "--type=granite"])
        == 0
    )
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert {name: back[name] for name in tree if name.endswith("_token_id")} == {
        "eos_token_id": 0, "bos_token_id": 4, "pad_token_id": None
    }  # fmt: skip
    assert all((tmp_path / "back" / name).read_text() == text for name, text in said.items())
    assert not (tmp_path / "back/token_ids.json").exists()
    for folder in ("hf", "run", "back") if has_tokenizer else ():
        assert stickjax.load(tmp_path / folder).tokenizer.ends == {0, 2}


def test_an_end_that_the_user_names_is_that_of_the_exported_model(words, tmp_path, capsys):
    text = Path(words).read_text().replace("<|endoftext|>", "<|im_end|>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "top_p": 0.9}))
    config = Config(ModelConfig(**SIZES | dict(V=3)))
    config = config.replace({"data.tokenizer": words, "data.eot": "<|im_end|>"})
    save(tmp_path / "run", init(config.model, jax.random.key(0)), config)
    assert main([str(tmp_path / "run"), str(tmp_path / "hf"), "--type=granite"]) == 0
    said = {name: json.loads((tmp_path / f"hf/{name}.json").read_text()) for name in ("config", "generation_config")}
    assert said == {"config": said["config"], "generation_config": {"eos_token_id": 0, "top_p": 0.9}}
    assert said["config"]["eos_token_id"] == 0 and stickjax.load(tmp_path / "hf").tokenizer.eot == 0


def test_an_end_that_no_file_says_is_named_at_the_conversion(words, tmp_path, capsys):
    config = Config(ModelConfig(**SIZES | dict(V=3)))
    export(init(config.model, jax.random.key(0)), str(tmp_path / "hf"), type="granite")
    text = Path(words).read_text().replace("<|endoftext|>", "<|im_end|>")
    (tmp_path / "hf/tokenizer.json").write_text(text)
    assert main([str(tmp_path / "hf"), str(tmp_path / "run")]) == 1
    assert "set data.eot to one of its added tokens: '<|im_end|>'" in capsys.readouterr().err
    assert main([str(tmp_path / "hf"), str(tmp_path / "run"), "--eot=<|im_end|>"]) == 0
    assert stickjax.load(tmp_path / "run").tokenizer.eot == 0
    assert main([str(tmp_path / "run"), str(tmp_path / "back"), "--type=granite"]) == 0
    assert stickjax.load(tmp_path / "back").tokenizer.eot == 0


def test_a_byte_model_says_its_end(tmp_path):
    config = Config(ModelConfig(**SIZES | dict(V=None)))
    export(
        Loaded(init(config.model, jax.random.key(0)), config, ByteTokenizer(), 0), str(tmp_path / "hf"), type="granite"
    )
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 256


def test_what_cannot_be_used_is_not_converted(tmp_path, capsys):
    config = Config(ModelConfig(**SIZES))
    model = init(config.model, jax.random.key(0))
    export(model, str(tmp_path / "hf"), type="granite")
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    assert main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 1
    assert "is not a tokenizer.json" in capsys.readouterr().err
    (tmp_path / "hf/tokenizer.json").unlink()
    with (tmp_path / "hf/model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32("nan").tobytes())
    assert main([str(tmp_path / "hf"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith("hf: 1 of 384 values of blocks/ffn/w_out, layer 1, are not finite\n")
    model.embed = type(model.embed)(model.embed[...].at[0, 0].set(np.inf))
    with pytest.raises(ValueError, match="the model: 1 of 4112 values of embed are not finite"):
        export(model, str(tmp_path / "inf"), type="granite")
    assert os.listdir(tmp_path) == ["hf"]


def test_a_converted_model_is_evaluated_sampled_and_trained(tmp_path, capsys):
    model = init(ModelConfig(**SIZES, param_dtype="bfloat16"), jax.random.key(0))
    hf, run = str(tmp_path / "hf"), str(tmp_path / "run")
    export(model, hf, type="granite")
    assert main([hf, run]) == 0
    assert generate.main([run, "--prompt=a"]) == 1 and "tokenizer.json" in capsys.readouterr().err
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abcd":
        (texts / f"{name}.txt").write_text(name * 200)
    data = {"data.source": "text", "data.path": str(texts), "data.tokenizer": "byte", "data.heldout_every": 2}
    data |= {"data.T": 8, "data.B": 2}
    assert generate.main([run, "--prompt=a", "--max-new-tokens=2", "--set=data.tokenizer=byte"]) == 0
    theirs = {file: file.stat().st_mtime_ns for file in Path(hf).iterdir()}
    for folder in (hf, run):
        assert evaluate.main([folder, "--max-tokens=64", *(f"--{key}={value}" for key, value in data.items())]) == 0
    assert {file: file.stat().st_mtime_ns for file in Path(hf).iterdir()} == theirs, "a download must stay as it is"
    assert "hf is a Hugging Face folder: nothing is written into it" in capsys.readouterr().err
    assert (tmp_path / "run/evaluation.json").exists() and (tmp_path / "run/length.png").exists()
    config = stickjax.load(run, changes=data).config
    config = config.replace({"model.param_dtype": "float32", "train.steps": 1, "optim.schedule": "constant"})
    fit(config, str(tmp_path / "tuned"), init_from=hf, quiet=True)
    tuned = stickjax.load(tmp_path / "tuned")
    assert isinstance(tuned.tokenizer, ByteTokenizer) and tuned.model.embed.dtype == jnp.float32
    with pytest.raises(ValueError, match="holds one model, .*; train in another --run folder with --init-from"):
        fit(config, run, quiet=True)


def test_parameters_are_laid_out_on_a_mesh():
    folder = ORACLES / "hf/jetmoe"
    one = stickjax.load(folder)
    mesh = make_mesh(one.config.replace({"mesh.fsdp": 2, "mesh.data": 1, "data.B": 2}))
    model = load(folder, mesh=mesh).model
    assert same_bits(one.model, model) and len(model.embed.sharding.device_set) == 2


# Memory

# VmHWM counts this program alone; getrusage would also count the peak of the parent process.
STREAM = """
import sys
from stickjax.convert import main
peak = lambda: 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
assert main(sys.argv[1:]) == 0
print(peak() - before, peak())
"""


def granitemoe(L, D, F, E):
    """Return the config.json of a GraniteMoe model as a dict, and the shapes of its tensors by name.

    The model has L layers, width D, and E experts with F hidden units each.
    """
    H, tree = 64, json.loads((ORACLES / "hf/granitemoe/config.json").read_text())
    tree |= dict(num_hidden_layers=L, hidden_size=D, intermediate_size=F, num_local_experts=E, vocab_size=512)
    tree |= dict(num_attention_heads=D // H, num_key_value_heads=D // H)
    shapes = {"model.embed_tokens.weight": (512, D), "model.norm.weight": (D,)}
    for i in range(L):
        moe, attention = (f"model.layers.{i}.{name}" for name in ("block_sparse_moe", "self_attn"))
        shapes |= {f"model.layers.{i}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        shapes |= {f"{attention}.{x}_proj.weight": (D, D) for x in "qkvo"} | {f"{moe}.router.layer.weight": (E, D)}
        shapes |= {f"{moe}.input_linear.weight": (E, 2 * F, D), f"{moe}.output_linear.weight": (E, D, F)}
    return tree, shapes


def molm_700m_8b():
    """Return the config.json of the published MoLM-700M-8B as a dict, and the shapes of its tensors by name.

    The shapes include the buffers that the published checkpoint contains and that the model does not use.
    """
    V, L, D, F, R, S, heads, experts = 50_295, 48, 1024, 2048, 256, 1024, 16, 32
    shapes = {"transformer.wte.weight": (V, D), "lm_head.weight": (V, D)}
    shapes |= {f"transformer.ln_f.{part}": (D,) for part in ("weight", "bias")}
    for i in range(L):
        layer = f"transformer.h.{i}"
        shapes |= {f"{layer}.{norm}.{part}": (D,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        shapes |= {f"{layer}.attn.mask": (S, S), f"{layer}.attn.cum_weight": (S, S)}
        for place, E, width in (("attn.q_proj", heads, D), ("mlpf", experts, F)):
            shapes[f"{layer}.{place}.experts.weight"] = (E, D, width)
            shapes[f"{layer}.{place}.output_experts.weight"] = (E, width, D)
            gate = f"{layer}.{place}.gate.w_gate"
            shapes |= {f"{gate}.0.weight": (R, D), f"{gate}.0.bias": (R,), f"{gate}.3.weight": (E, R)}
    return to_config_json(ModelConfig.molm_700m_8b(param_dtype="bfloat16"), 512), shapes


def sparse_folder(folder, tree, shapes, shards):
    """Write a Hugging Face folder of a large model that takes almost no disk space.

    The tensors are holes in sparse files, so they are read as zeros. Most are bfloat16.

    Args:
      tree: the content of config.json.
      shapes: the shape of each tensor, by name.
      shards: the number of safetensors files.
    Returns:
      the number of bytes of all tensors together.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tree))
    weight_map, total = {}, 0
    for shard in range(shards):
        header, end = {}, 0
        for name in list(shapes)[shard::shards]:
            dtype, size = ("I8", 1) if name.endswith("attn.mask") else ("BF16", 2)
            begin, end = end, end + size * int(np.prod(shapes[name]))
            header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": [begin, end]}
            weight_map[name] = f"model-{shard}.safetensors"
        text = json.dumps(header).encode()
        with (folder / f"model-{shard}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        total += end
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def converted(source, out, *options):
    """Convert the folder `source` to the folder `out` in a new process, and measure the memory of the process.

    Return two numbers of bytes: the peak memory minus the memory after the imports, and the peak memory.
    """
    command = [sys.executable, "-c", STREAM, str(source), str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    growth, peak = map(int, done.stdout.split()[-2:])
    print(f"{source.name} -> {out.name}: peak {peak / 2**20:.0f} MiB, {growth / 2**20:.0f} above the imports")
    return growth, peak


def test_the_largest_tensor_bounds_the_memory_not_the_model(tmp_path):
    total = sparse_folder(tmp_path / "sparse", *granitemoe(L=22, D=512, F=512, E=32), shards=5)
    largest = 2 * 32 * 1024 * 512
    assert total > 2**30 > 25 * largest
    for source, out, *options in (("sparse", "run"), ("run", "hf", "--type=granitemoe")):
        growth, _ = converted(tmp_path / source, tmp_path / out, *options)
        assert growth < 6 * largest
    for name in ("sparse", "run", "hf"):
        shutil.rmtree(tmp_path / name)


@pytest.mark.slow
@pytest.mark.large
def test_eight_billion_parameters_pass_through_less_than_four_gib(tmp_path):
    if shutil.disk_usage(tmp_path).free < 20e9:
        pytest.skip("needs 20 GB of disk")
    tree, shapes = molm_700m_8b()
    assert len(shapes) == 772 and sparse_folder(tmp_path / "sparse", tree, shapes, shards=4) == 16_515_088_384
    _, peak = converted(tmp_path / "sparse", tmp_path / "run")
    assert peak < 4 * 2**30
    assert sum(path.stat().st_size for path in (tmp_path / "run").rglob("*")) > 2 * 8_182_046_720
    shutil.rmtree(tmp_path / "run")
