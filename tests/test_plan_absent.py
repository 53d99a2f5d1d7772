"""Test plans for absent GPUs: the step of PowerMoE-3B on 64 H200s with Mosaic, and small steps with Triton.

The tests check the collectives, the memory and the FLOPs.
"""

import importlib.util
import json

import pytest

from stickjax.config.command_line import load_config
from stickjax.parallel import chips
from stickjax.plan import __main__ as command
from stickjax.plan import aot, flops
from stickjax.system.memory import local_bytes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the CUDA wheels and no GPU: make test-absent",
)
CHANGES = {"mesh.fsdp": 64, "train.accumulate": 4}


@pytest.fixture(scope="module")
def planned():
    """Return the config, a machine of 64 absent H200s, and the training step compiled for it."""
    config = load_config("configs/powermoe_3b.py").replace(CHANGES)
    machine = aot.absent_machine(chips.chip("h200"), 64, 8)
    return config, machine, aot.compile_step(config, machine)


def test_nothing_is_gathered_beyond_the_strategy(planned):
    """In every microbatch, fsdp gathers each layer at most once forward and once backward, and the embedding once."""
    config, _, step = planned
    gathers = [c for c in step.collectives if c.kind == "all-gather"]
    assert {(c.axes, c.devices) for c in gathers} == {(("fsdp",), 64)}
    m, accumulate = config.model, config.train.accumulate
    # There is at most one all-gather for each of the seven matrices of a layer; XLA merges some of them.
    assert sum(c.count for c in gathers) <= accumulate * (2 * m.L * 7 + 1)
    layer = m.D * m.H * (2 * m.N + 2 * m.K) + m.D * m.experts.E + 3 * m.experts.E * m.D * m.F
    # The parameters are gathered in bf16, the routers in float32.
    values = accumulate * (2 * m.L * (layer + m.D * m.experts.E) + m.vocabulary * m.D)
    assert sum(c.bytes * c.count for c in gathers) <= 2 * values
    assert {c.kind for c in step.collectives} == {"all-gather", "reduce-scatter", "all-reduce"}
    # Only small arrays are summed over all devices: norms, losses, and the scales of norms.
    assert sum(c.bytes * c.count for c in step.collectives if c.kind == "all-reduce") < 2**20


def test_bytes_are_exact(planned):
    config, machine, step = planned
    arguments = aot.abstract_arguments(config, step.mesh, machine.devices[0])
    assert step.arguments == local_bytes(arguments)
    assert step.arguments < step.peak < machine.memory


def test_work_is_the_kernels_and_the_rest(planned):
    """A step has the same total number of FLOPs on 64 devices and on one device.

    In both cases, the batch is the same, and a device computes 4 rows of each microbatch. So the step on one device
    has 64 times as many microbatches.
    """
    config, _, step = planned
    alone = config.replace({"mesh.fsdp": 1, "train.accumulate": config.data.B // 4})
    machine = aot.absent_machine(chips.chip("h200"), 1, 1)
    state, batch = aot.abstract_arguments(alone, None, machine.devices[0])
    with chips.tracing_for(machine.devices[0]):
        traced = aot.jit_step(alone, None, state).trace(state, batch)
    assert step.work.flops == flops.count(traced.jaxpr).flops


@pytest.mark.parametrize("gpu, hosts", [("a100-80", 1), ("b200", 2)])
def test_a_step_of_triton_kernels(gpu, hosts, tmp_path, capsys):
    """`stickjax plan` compiles a step with Triton kernels for eight absent GPUs.

    The config names triton, so no other implementation can be used. On eight GPUs the kernels need shard_map.
    """
    path = tmp_path / "small.py"
    path.write_text(
        "from stickjax import Config, DataConfig, ExpertsConfig, ModelConfig\n"
        "def get_config():\n"
        "    experts = ExpertsConfig(4, 2)\n"
        "    model = ModelConfig(V=64, D=64, L=2, N=2, K=1, H=64, F=64, experts=experts, dtype='bfloat16')\n"
        "    return Config(model, DataConfig(T=1024, B=8))\n"
    )
    machine = [f"--gpu={gpu}", "--devices=8", f"--hosts={hosts}"]
    assert command.main([str(path), *machine, "--model.implementation=triton", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["mesh"]["fsdp"] == 8 and "not present" in said["machine"] and said["unknown_loops"] == 0
    assert all(row["local"] == (hosts == 1) for row in said["collectives"])
