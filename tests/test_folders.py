"""Test reading Hugging Face folders: one error line for each kind of bad folder, and different number types.

PyTorch's .bin files are read without torch.
"""

import json
import os
import pickle
import re
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import stickjax
from stickjax.convert import main

ORACLES = Path(__file__).parent / "oracles"


def same(ours, theirs):
    """Return whether two models have bitwise equal parameters."""
    bits = [
        [(x.dtype, x.shape, x.tobytes()) for x in map(np.asarray, jax.tree.leaves(model))] for model in (ours, theirs)
    ]
    return bits[0] == bits[1]


# Invalid folders


def edit_config(**changes):
    def change(folder):
        tree = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if v != "absent"}))

    return change


def edit_tensors(change):
    def changed(folder):
        arrays = load_file(folder / "model.safetensors")
        change(arrays)
        save_file(arrays, folder / "model.safetensors")

    return changed


def edit_header(change):
    def changed(folder):
        data = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).replace(' ":', '":').encode()  # two names become equal if one ended in a space
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return changed


def edit_bytes(change, file="model.safetensors"):
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def indexed(**weight_map):
    def change(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def moved(name, by):
    def change(header):
        header[name]["data_offsets"] = [x + by for x in header[name]["data_offsets"]]

    return change


Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
BAD = {
    "model-type": (edit_config(model_type="granit"), r"model_type='granit' is not one of .*mean 'granite'"),
    "no-size": (edit_config(hidden_size="absent"), "config.json: the entry hidden_size is missing"),
    "wrong-type": (edit_config(hidden_size="64"), "hidden_size='64' must be of type int"),
    "heads": (edit_config(num_attention_heads=5), "hidden_size=64 must be a multiple of num_attention_heads=5"),
    "bias": (edit_config(attention_bias=True), "attention_bias=True is not supported; attention_bias must be False"),
    "activation": (edit_config(hidden_act="gelu"), "hidden_act='gelu' is not supported; hidden_act must be 'silu'"),
    "scaling": (edit_config(rope_scaling={"type": "linear", "factor": 2}), "rope_scaling and rope_parameters have"),
    "yarn": (edit_config(rope_parameters={"rope_type": "yarn"}), "rope_parameters: rope_type='yarn' is not supported"),
    "quantized": (edit_config(quantization_config={"bits": 4}), "quantization_config={'bits': 4} is not supported"),
    "no-json": (lambda folder: (folder / "config.json").write_text('{"model_type"'), "config.json"),
    "layers": (edit_config(num_hidden_layers=2), "has unknown tensors: model.layers.2.input_layernorm.weight, .*more"),
    "missing": (edit_tensors(lambda a: (a.pop(Q), a.pop(UP))), f"lacks {UP}, {Q}"),
    "extra": (edit_tensors(lambda a: a.update(thing=np.ones(3, "f"))), "has unknown tensors: thing"),
    "many-layers": (edit_config(num_hidden_layers=10**12), "1000000000000 layers, but the files have only 29 tensors"),
    "misnamed": (
        edit_tensors(lambda a: a.update({Q.replace("q_proj", "qproj"): a.pop(Q)})),
        f"lacks {Q} and has unknown tensors: .*qproj.weight is similar to the missing {Q}",
    ),
    "shape": (
        edit_tensors(lambda a: a.update({Q: a[Q][:32].copy()})),
        rf"{Q} has shape \[32, 64\], but the config says \[64, 64\]",
    ),
    "type": (
        edit_tensors(lambda a: a.update({Q: a[Q].astype("i4")})),
        f"{Q} is of type I32, not one of F32, F16, BF16",
    ),
    "untied": (
        edit_tensors(lambda a: a.update({"lm_head.weight": 2 * a["model.embed_tokens.weight"]})),
        "lm_head.weight differs from the embedding",
    ),
    "truncated": (edit_bytes(lambda data: data[:-7]), "model.safetensors cannot be read: .*not fully covered"),
    "empty": (edit_bytes(lambda data: b""), "model.safetensors cannot be read"),
    "header": (edit_bytes(lambda data: data[:20] + b"\xff" + data[21:]), "model.safetensors cannot be read: .*header"),
    "length": (edit_bytes(lambda data: b"\xff" * 8 + data[8:]), "cannot be read: .*header too large"),
    "two-halves": (
        edit_tensors(lambda a: a.update({Q: a[Q].astype("f2"), UP: a[UP].astype(jnp.bfloat16)})),
        rf"mixes the types F16 \({Q}\) and BF16 \({UP}\)",
    ),
    "named-twice": (
        edit_header(lambda header: header.update({UP + " ": header[UP]})),
        f"cannot be read: the name '{UP}' occurs twice",
    ),
    "overlap": (edit_header(moved(Q, -64)), "cannot be read: .*invalid offset"),
    "outside": (edit_header(moved(Q, 10**9)), "cannot be read: .*invalid offset"),
    "no-shard": (indexed(**{Q: "model-2.safetensors"}), "names shards that do not exist: model-2.safetensors"),
    "outer-shard": (indexed(**{Q: "../model.safetensors"}), "is not an index of shards: .*outside"),
    "index": (indexed(**{Q: "model.safetensors"}), "index.json and model.* disagree: model.safetensors also has"),
    "no-index": (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "not an index of shards"),
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
}


@pytest.mark.parametrize("change, said", BAD.values(), ids=BAD.keys())
def test_a_folder_that_is_not_right_gives_one_line_and_writes_nothing(change, said, tmp_path, capsys):
    folder = shutil.copytree(ORACLES / "hf/granite_tied", tmp_path / "bad")
    change(folder)
    assert main([str(folder), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(said, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_tied_model_may_repeat_its_embedding(tmp_path):
    folder = shutil.copytree(ORACLES / "hf/granite_tied", tmp_path / "twice")
    edit_tensors(lambda a: a.update({"lm_head.weight": a["model.embed_tokens.weight"].copy()}))(folder)
    assert same(stickjax.load(folder).model, stickjax.load(ORACLES / "hf/granite_tied").model)


def test_tensors_of_several_types_become_float32(tmp_path):
    folder = shutil.copytree(ORACLES / "hf/granite_tied", tmp_path / "mixed")
    edit_tensors(lambda a: a.update({Q: a[Q].astype(jnp.bfloat16)}))(folder)
    model = stickjax.load(folder).model
    assert {x.dtype.name for x in jax.tree.leaves(model)} == {"float32"}
    half = stickjax.load(folder, changes={"model.param_dtype": "bfloat16"}).model
    assert (half.embed[...] == model.embed[...].astype(jnp.bfloat16)).all()


# PyTorch's .bin files


class Stored:
    """A stand-in for a storage of torch. A pickle only refers to the storage; the bytes are in another file."""

    def __init__(self, kind, entry, count):
        self.pid = ("storage", kind, entry, "cpu", count)


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.pid if isinstance(value, Stored) else None


@pytest.fixture
def torch_save(monkeypatch):
    """Return `save(path, arrays)`, which writes a dict of arrays as torch.save does, but without torch.

    This works because the pickle contains only the names of torch's classes. The fixture defines empty classes with
    these names.

    `save` has three more arguments. `compression` is the compression of the zip archive. `more` are further entries of
    the dict. `changes` replace the offset, the shape or the stride of every tensor.
    """
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "BFloat16Storage", "CharStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def rebuild():
        raise AssertionError

    rebuild.__module__, rebuild.__name__ = "torch._utils", "_rebuild_tensor_v2"
    rebuild.__qualname__, utils._rebuild_tensor_v2 = rebuild.__name__, rebuild
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    kinds = {"float32": torch.FloatStorage, "bfloat16": torch.BFloat16Storage, "int8": torch.CharStorage}

    class Tensor:
        def __init__(self, entry, array, **changes):
            self.entry, self.array, self.changes = entry, array, changes

        def __reduce__(self):
            x = self.array
            tensor = dict(offset=0, shape=x.shape, stride=tuple(s // x.itemsize for s in x.strides)) | self.changes
            storage = Stored(kinds[x.dtype.name], self.entry, x.size)
            return rebuild, (storage, *tensor.values(), False, OrderedDict())

    def save(path, arrays, compression=zipfile.ZIP_STORED, more=(), **changes):
        state = OrderedDict((name, Tensor(str(i), a, **changes)) for i, (name, a) in enumerate(arrays.items()))
        state.update(more)
        state._metadata = OrderedDict(version=1)
        with zipfile.ZipFile(path, "w", compression) as archive:
            with archive.open("archive/data.pkl", "w") as file:
                Pickler(file, protocol=2).dump(state)
            for i, array in enumerate(arrays.values()):
                archive.writestr(f"archive/data/{i}", array.tobytes())

    return save


@pytest.fixture
def mlp_gate(tmp_path):
    """Return the folder of an original ModuleFormer without its weights, and the weights as a dict of arrays.

    Tests write the weights into the folder as .bin files.
    """
    folder = shutil.copytree(ORACLES / "moduleformer/mlp_gate", tmp_path / "bin")
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return folder, arrays


def test_bin_files_and_their_shards_are_read(mlp_gate, torch_save):
    folder, arrays = mlp_gate
    arrays |= {f"transformer.h.0.attn.{name}": np.ones((8, 8), np.int8) for name in ("mask", "cum_weight")}
    expected = stickjax.load(ORACLES / "moduleformer/mlp_gate").model
    torch_save(folder / "pytorch_model.bin", arrays)
    assert same(stickjax.load(folder).model, expected)
    (folder / "pytorch_model.bin").unlink()
    weight_map = {}
    for shard in range(2):
        part = {name: arrays[name] for name in list(arrays)[shard::2]}
        torch_save(folder / f"part-{shard}.bin", part)
        weight_map |= dict.fromkeys(part, f"part-{shard}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(stickjax.load(folder).model, expected)
    torch_save(folder / "part-1.bin", {n: a.astype(jnp.bfloat16) for n, a in part.items()})
    assert stickjax.load(folder).config.model.param_dtype == "float32"


def test_a_pickle_with_code_is_refused_and_not_run(mlp_gate, torch_save, tmp_path):
    folder, arrays = mlp_gate

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harm",)

    class Getter:
        def __reduce__(self):
            return getattr, ("", "format")

    for thing, name in ((Evil(), "posix.system"), (Getter(), "__builtin__.getattr"), (np.float32(1), "numpy")):
        torch_save(folder / "pytorch_model.bin", arrays, more={"x": thing})
        with pytest.raises(ValueError, match=f"asks for {name}.*was not executed"):
            stickjax.load(folder)
    assert not (tmp_path / "harm").exists()


def test_damaged_bin_files_are_refused(mlp_gate, torch_save):
    folder, arrays = mlp_gate
    path = folder / "pytorch_model.bin"

    def refused(said):
        with pytest.raises(ValueError, match=f"pytorch_model.bin cannot be read: .*{said}"):
            stickjax.load(folder)

    torch_save(path, arrays, more={"lr": 0.1})
    refused("'lr' is a float, not a tensor")
    torch_save(path, arrays, compression=zipfile.ZIP_DEFLATED)
    refused("data.pkl is compressed")
    torch_save(path, arrays, offset=1)
    refused("does not fit")
    torch_save(path, arrays, shape=(-1,), stride=(1,))
    refused("has a wrong shape")
    torch_save(path, arrays, shape=(4, 4), stride=(1, 4))
    refused("contiguous")
    torch_save(path, arrays)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused("not a zip file")
    path.write_bytes(b"\x80\x02}q\x00.")
    refused("not a zip file")
    begin = data.index(b"_rebuild_tensor_v2")
    path.write_bytes(data[: begin + 40] + b"\xff\xff" + data[begin + 42 :])
    refused("")
