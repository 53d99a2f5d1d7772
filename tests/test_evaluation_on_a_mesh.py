"""Evaluation and generation on a mesh: results as on one device, and each device has only a part of the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import stickjax
from stickjax import Config, ModelConfig, evaluate, generate
from stickjax.config import ExpertsConfig, OrderedMemoryConfig
from stickjax.evaluation.held_out import row_scores, target_sums
from stickjax.models.families import family_of
from stickjax.models.transformer import init
from stickjax.parallel.mesh import make_mesh, mesh_for_evaluation, mesh_of
from stickjax.parallel.processes import free_port
from stickjax.storage.checkpoints import named_leaves
from stickjax.storage.run_folder import load, save, with_shardings
from stickjax.system.memory import local_bytes

MESHES = [{"mesh.data": 2, "mesh.expert": 4}, {"mesh.fsdp": 2, "mesh.context": 2, "mesh.tensor": 2}]
# Similar to PowerMoE-3B: V = 32 D, F = D / 3, and a token uses a quarter of the experts (there a fifth).
SMALL = Config(
    ModelConfig(V=768, D=24, L=2, N=4, K=2, H=6, F=8, experts=ExpertsConfig(E=8, k=2), init_std=0.5)
).replace({"data.source": "recall", "data.examples": 200, "data.T": 32, "mesh.fsdp": 16})  # more devices than there are
PROMPTS = ["a", "once more", "b"]
TEXT = ["--lengths=2", "--max-tokens=300"]
EXHAUSTIVE = {  # the commands are tested on the second mesh, with the same table and texts
    "test_the_results_are_those_of_one_device": lambda sizes: sizes == MESHES[1],
    "test_the_scores_of_rows_are_those_of_one_device": lambda sizes: sizes == MESHES[0],
}
pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run folder with a random model. Its config has a mesh of 16 devices."""
    path = tmp_path_factory.mktemp("mesh") / "run"
    save(path, init(SMALL.model, jax.random.key(0)), SMALL)
    return str(path)


@pytest.fixture(scope="module")
def alone(run):
    """Return (evaluation table, list of generated texts) of the model on one device."""
    model = stickjax.load(run)
    assert mesh_of(model.model) is None
    text = model.generate(PROMPTS, 6, temperature=1.0)
    return model.evaluate(lengths=(2,), max_tokens=300), text


def lengths(run) -> list[dict]:
    return json.loads(Path(run, "evaluation.json").read_text())["lengths"]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_results_are_those_of_one_device(run, alone, sizes):
    model = stickjax.load(run, mesh="run", changes={"mesh.fsdp": 1} | sizes)
    assert mesh_of(model.model).size == 8
    found = model.evaluate(lengths=(2,), max_tokens=300)
    assert list(found["tokens"]) == list(alone[0]["tokens"])
    np.testing.assert_allclose(found["bits_per_byte"], alone[0]["bits_per_byte"], rtol=1e-6)
    assert model.generate(PROMPTS, 6, temperature=1.0) == alone[1]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_scores_of_rows_are_those_of_one_device(run, sizes):
    """The scores of rows on a mesh equal the scores on one device.

    A row is greedy if each target that counts is the most likely token after the previous tokens. In rows 0, 2, 4, ...,
    only the last target counts, and the test sets it to this token. The other targets are random, so no other row is
    greedy.
    """
    one, model = load(run).model, load(run, mesh="run", changes={"mesh.fsdp": 1} | sizes).model
    windows = np.random.default_rng(0).integers(0, 768, (11, 23)).astype(np.int32)
    windows[::2, -1] = jax.jit(lambda tokens: one(tokens).logits)(windows[:, :-1])[::2, -1].argmax(-1)
    target_mask = np.zeros((11, 22), bool)
    target_mask[:, -1] = target_mask[1, 5:] = True
    (nll, greedy), (expected, chosen) = (row_scores(m, windows, target_mask, 4) for m in (model, one))
    np.testing.assert_allclose(nll, expected, rtol=1e-5)
    assert greedy.tolist() == chosen.tolist() == [row % 2 == 0 for row in range(11)]


def test_every_device_reads_only_its_share(run, monkeypatch):
    sizes, sent = {"mesh.fsdp": 4, "mesh.tensor": 2}, []
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *to: sent.append(x.nbytes) or put(x, *to))
    model = load(run, mesh="run", changes=sizes).model
    total = sum(x.nbytes for x in jax.tree.leaves(model))
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(model):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    # Most parameters are divided by 8, and the router matrices by 4. The routers and the norms are small.
    assert max(held.values()) == local_bytes(model) < 1.2 * total / 8
    assert sum(sent) == sum(held.values())  # only these parts were sent to devices
    alone = named_leaves(load(run).model)
    assert all((np.asarray(x) == np.asarray(alone[name])).all() for name, x in named_leaves(model).items())


def test_a_3b_model_is_evaluated_in_eight_parts():
    """Compiled for 8 devices, PowerMoE-3B has an eighth of its parameters on each device.

    With its temporary arrays, evaluation needs less than a third of the model's memory on each device.
    """
    config = Config(ModelConfig.powermoe_3b(V=49152, implementation="xla")).replace(
        {"mesh.fsdp": 4, "mesh.tensor": 2, "data.T": 256}
    )
    mesh = make_mesh(config, training=False)
    shapes = jax.eval_shape(lambda: family_of(config.model).init(config.model, jax.random.key(0)))
    model = with_shardings(mesh, shapes)
    total, share = local_bytes(shapes), local_bytes(model)
    assert total > 3.3e9 * 2 and share < 1.01 * total / 8
    places = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp", "expert"), "context"))
    batch = {
        name: jax.ShapeDtypeStruct((4, 256), dtype, sharding=places)
        for name, dtype in (("tokens", np.int32), ("targets", np.int32), ("mask", np.bool_))
    }
    memory = target_sums.lower(model, batch, mesh).compile().memory_analysis()
    assert memory.argument_size_in_bytes < 1.01 * share + 2**20
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < total / 3  # gathers one layer at a time


def test_the_commands_take_a_mesh(run, alone, capsys):
    mesh = [f"--{name}={size}" for name, size in MESHES[1].items()]
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    for options, uses_one in (([], True), (mesh, False)):
        assert evaluate.main([run, *TEXT, *options]) == 0
        said = "one device is used, because the mesh of the run cannot be made here: the mesh fsdp=16 needs 16 devices"
        assert (said in capsys.readouterr().err) == uses_one
        assert [r["bits_per_byte"] for r in lengths(run)] == pytest.approx(list(alone[0]["bits_per_byte"]), rel=1e-6)
        assert generate.main([run, *prompts, "--max-new-tokens=6", "--temperature=1", *options]) == 0
        shown, said = capsys.readouterr()
        assert shown == "".join(f"--- prompt {row}\n{text}\n" for row, text in enumerate(alone[1]))
        assert ("one device" in said) == uses_one
    assert evaluate.main([run, "--mesh.data=3"]) == 1
    assert "error: the mesh data=3 x fsdp=16 needs 48 devices, but there are" in capsys.readouterr().err


def test_a_model_of_examples_is_evaluated_on_one_device():
    config = Config(OrderedMemoryConfig(V=18, D=6, H=5, N=3, sentences=1, classes=10)).replace({"mesh.data": 2})
    assert mesh_for_evaluation(config) is None
    with pytest.raises(ValueError, match="such as a classifier, is evaluated on one device"):
        mesh_for_evaluation(config, ["mesh.data"])


def test_several_processes_do_not_read_a_prompt_from_standard_input(run, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert generate.main([run]) != 0
    assert "error: several processes cannot all read standard input" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_evaluate_together(run, alone):
    join = ["--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process"]
    command = [sys.executable, "-m", "stickjax.evaluate", run, *TEXT, "--mesh.fsdp=2", *join]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    processes = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    said = [process.communicate(timeout=150) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "picture of the curves" in said[0][0]
    assert not any("picture of the curves" in text or "compiling" in text for text in said[1])  # only process 0 prints
    found = lengths(run)
    assert [r["bits_per_byte"] for r in found] == pytest.approx(list(alone[0]["bits_per_byte"]), rel=1e-6)
