"""Test the command `stickjax plan`: its FLOPs and collectives equal counts by hand, and its bytes are exact."""

import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import cost, platform
from stickjax import train
from stickjax.config import Config, DataConfig, ExpertsConfig, MeshConfig, ModelConfig, TrainConfig
from stickjax.config.command_line import load_config
from stickjax.data.batches import make_batch
from stickjax.models import vocabulary
from stickjax.parallel import chips
from stickjax.plan import __main__ as command
from stickjax.plan import aot, estimate, flops, report, search
from stickjax.plan.hlo import _groups, collectives
from stickjax.training.step import init_state, make_step

SMALL = ModelConfig(V=64, D=32, L=3, N=4, K=2, H=8, F=16, experts=ExpertsConfig(E=4, k=2), remat="full")


def work_of(function, *shapes) -> flops.Work:
    return flops.count(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)))


def layers(x, w):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0].sum()


def layers_again(x, w):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None)), x, w)[0].sum()


PRODUCT = 2 * 3 * 8 * 8  # FLOPs of x [3,8] times one matrix of w [5,8,8]


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda x, w: x @ w[0], 1),
        (layers, 5),
        (jax.grad(layers, argnums=(0, 1)), 5 + 10),
        (jax.grad(layers_again, argnums=(0, 1)), 5 + 5 + 10),
        (lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[0]), 2),
        (lambda x, w: jax.vmap(lambda m: x @ m)(w), 5),
        (lambda x, w: cost.kernel("k", 7 * PRODUCT, lambda x: x @ w[0])(x), 7),
        (jax.grad(lambda x, w: jax.checkpoint(cost.kernel("k", 7 * PRODUCT, lambda x: (x @ w[0]) ** 2))(x).sum()), 21),
    ],
)
def test_products_by_hand(function, products):
    assert work_of(function, (3, 8), (5, 8, 8)).flops == products * PRODUCT


def test_loops_without_a_length():
    def halve(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x, x)

    one = 2 * 4**3
    assert work_of(halve, (4, 4)) == flops.Work(one, 3 * 4 * 16, 1)
    assert work_of(cost.loop(2.5, halve), (4, 4)) == flops.Work(2.5 * one, 2.5 * 3 * 4 * 16, 0)


def test_every_device_counts():
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    spec = PartitionSpec(("a", "b"))
    f = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, spec))
    assert flops.count(jax.jit(f).trace(x).jaxpr).flops == 8 * 2 * 2 * 4 * 2


def closed_form(config: Config) -> float:
    """Return the FLOPs of a training step by a formula.

    With full remat, a step is a forward pass, a recomputation of it, and the backward pass.
    """
    m, T = config.model, config.data.T
    projections = 2 * m.D * m.H * (m.N + 2 * m.K) + 2 * m.N * m.H * m.D
    product = 2 * m.N * m.H * T / 2  # one product over the causal half of the scores
    if m.attention == "softmax":
        product *= 9 / 8  # eight query tiles, each with all keys up to the tile's end
    up, down, router = 2 * m.experts.k * m.D * 2 * m.F, 2 * m.experts.k * m.F * m.D, 2 * m.D * m.experts.E
    forward = projections + 2 * product + up + down + router
    again = projections + 2 * product + up + router  # nothing needs the result of `down`, which ends the layer
    # Softmax has five products: dA, dv, dq, dk and the scores again. Stick-breaking has two kernels, and both compute
    # the scores and dA.
    attention = 5 if m.attention == "softmax" else 7
    backward = 2 * (projections + up + down + router) + attention * product
    # A microbatch has so many logits that they are computed in pieces. Then the backward pass computes them again.
    assert config.data.tokens_per_step // config.train.accumulate * m.vocabulary > vocabulary.LARGEST_LOGITS
    unembedding = 8 * m.D * m.vocabulary
    return config.data.tokens_per_step * (m.L * (forward + again + backward) + unembedding)


@pytest.mark.parametrize("attention", ["softmax", "stick_breaking"])
def test_a_step_is_its_closed_form(attention):
    """For PowerMoE-3B on a Hopper GPU, the counted FLOPs of a training step equal `closed_form` within 1%."""
    model = ModelConfig.powermoe_3b(attention=attention)
    config = Config(model, DataConfig(T=4096, B=8), train=TrainConfig(accumulate=2))
    state, batch = aot.abstract_arguments(config, None, jax.devices()[0])
    with platform.absent_gpu():
        traced = jax.jit(make_step(config)).trace(*jax.tree.map(lambda x: x.update(sharding=None), (state, batch)))
    work = flops.count(traced.jaxpr)
    assert work.unknown == 0
    assert work.flops == pytest.approx(closed_form(config), rel=0.01)


def test_visible_scores_by_hand():
    """`visible_scores` returns the number of ones in an explicit attention mask."""
    for T, S, window, own in ((5, 9, None, False), (5, 9, 3, True), (4, 4, 0, True), (1, 7, 2, False)):
        distance = (S - T + np.arange(T))[:, None] - np.arange(S)[None]
        seen = (distance >= (0 if own else 1)) & (distance <= (S if window is None else window))
        assert cost.visible_scores(T, S, attend_current=own, window=window) == seen.sum()


PROGRAM = """HloModule jit_step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[8]) -> f32[1] {
  ROOT %rs = f32[1]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ag = (bf16[4,2]{1,0}, bf16[4,8]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}
  %done = bf16[4,8]{1,0} all-gather-done(%ag)
  %two = ((f32[2]{0}, f32[4]{0}), (f32[2]{0}, f32[4]{0})) all-reduce-start(%y, %z), replica_groups=[4,2]<=[2,4]T(1,0)
}

%condition (s: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n)
}

%taken (t: f32[]) -> f32[] {
  %all = f32[] all-reduce(%t), replica_groups={}, to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[] {
  %loop = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  %start = ((f32[8]{0}), f32[1]{0}) async-start(%p), calls=%wrapped
  %end = f32[1]{0} async-done(%start), calls=%wrapped
  %branch = f32[] conditional(%i, %a, %b), branch_computations={%taken, %add}
  %next = s8[16]{0} collective-permute(%q), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}
"""


def mesh_of(*shape, names=("data", "fsdp")):
    devices = np.array([types.SimpleNamespace(id=i) for i in range(8)]).reshape(shape)
    return types.SimpleNamespace(devices=devices, axis_names=names, size=8)


def test_collectives_by_hand():
    found = {c.kind + str(c.bytes): c[1:] for c in collectives(PROGRAM, mesh_of(2, 4), per_host=4)}
    assert found == {
        "all-gather64": (("fsdp",), 4, 64, 6, True),
        "all-reduce24": (("data",), 2, 24, 6, False),
        "reduce-scatter32": (("data", "fsdp"), 8, 32, 1, False),
        "all-reduce4": (("data", "fsdp"), 8, 4, 1, False),
        "collective-permute16": (("fsdp",), 2, 16, 1, True),
    }
    sent = {c.kind + str(c.bytes): c.sent for c in collectives(PROGRAM, mesh_of(2, 4))}
    assert (sent["all-gather64"], sent["all-reduce24"], sent["collective-permute16"]) == (48, 24, 16)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=1,'b'=4] {'b'}", [[0, 1, 2, 3]]),
        ("mesh['b'=4] {'b':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['b'=4] {'b':(2)2}", [[0, 1], [2, 3]]),
    ],
)
def test_groups_by_hand(text, groups):
    line = f"  %x = f32[] all-reduce(%y), replica_groups={text}, to_apply=%add"
    assert np.asarray(_groups(line, mesh_of(2, 4))).tolist() == groups


@pytest.fixture
def no_wheels(monkeypatch):
    for module in (aot, command):
        monkeypatch.setattr(module, "has_wheels", lambda: False)


def small(**changes) -> Config:
    return Config(SMALL, DataConfig(T=16, B=16), mesh=MeshConfig(data=2, fsdp=4)).replace(changes)


@pytest.fixture(scope="module")
def compiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "has_wheels", lambda: False)
        machine = aot.absent_machine(chips.chip("h200"), 8, 2)
        return machine, aot.compile_step(small(), machine)


def test_bytes_are_those_of_a_device(compiled):
    machine, step = compiled
    state, batch = aot.abstract_arguments(small(), step.mesh, machine.devices[0])
    own = sum(
        np.prod(x.sharding.shard_shape(x.shape), dtype=int) * (8 if x.dtype == state.key.dtype else x.dtype.itemsize)
        for x in jax.tree.leaves((state, batch))
    )
    assert step.arguments == own
    rows, counters = 3 * 4 * 2 * 16 + 2 * 16, 8 + 2 * 4  # a batch of four arrays, one of them bool; key, two counters
    assert sum(step.state.values()) == own - rows - counters
    # The shapes and types equal the shapes and types of a real state and of a batch of the loader.
    real = init_state(small(), jax.random.key(0))
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(real)] == [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    loaded = make_batch(np.zeros((16, 17), int), eot=1)
    assert {n: (x.shape, x.dtype) for n, x in loaded.items()} == {n: (x.shape, x.dtype) for n, x in batch.items()}


def test_collectives_are_those_of_the_strategy(compiled):
    """With fsdp, a step gathers each layer once forward and once backward, and the embedding once.

    The gradients of all parameters are reduce-scattered once.
    """
    _, step = compiled
    gathers = [c for c in step.collectives if c.kind == "all-gather"]
    assert {c.axes for c in gathers} == {("fsdp",)}
    m = SMALL
    layer = m.D * m.H * (2 * m.N + 2 * m.K) + m.D * m.experts.E + 3 * m.experts.E * m.D * m.F
    assert sum(c.bytes * c.count for c in gathers) == 4 * (2 * m.L * layer + m.vocabulary * m.D)
    scatters = [c for c in step.collectives if c.kind == "reduce-scatter"]
    assert sum(c.bytes * c.count for c in scatters) == 4 * (m.L * layer + m.vocabulary * m.D)


def test_estimate_by_hand(compiled):
    _, step = compiled
    chip = chips.chip("h200")
    t = estimate.estimate(step, chip)
    assert t.compute == pytest.approx(step.work.flops / 8 / (0.78 * 989e12))
    assert t.network == pytest.approx(
        sum(c.sent * c.count / (450e9 if c.local else 50e9) for c in step.collectives), rel=1e-9
    )
    assert t.overlapped == max(t) and t.serial == sum(t)
    assert estimate.mfu(step, chip, 2 * t.serial) == pytest.approx(estimate.mfu(step, chip, t.serial) / 2)


def test_what_does_not_fit_is_changed_until_it_does(compiled, capsys):
    machine, _ = compiled
    dense = {"model.experts.E": 0, "model.experts.k": 0, "model.L": 1}
    step = aot.compile_step(small(**dense), machine)
    few = machine._replace(memory=int(step.peak / estimate.MEMORY_SHARE) - 1)
    found = search.nearest_changes(step, few)
    assert {name for change in found for name in change.changes} == {"train.accumulate", "mesh.data", "mesh.fsdp"}
    assert all(estimate.fits(change.compiled, few.memory) for change in found)
    # If the parameters do not fit on a device, they are divided further; smaller microbatches are not tried.
    few = machine._replace(memory=int(step.arguments / estimate.MEMORY_SHARE) - 1)
    found = search.nearest_changes(step, few)
    assert {name for change in found for name in change.changes} <= {"mesh.data", "mesh.fsdp"}
    report.print_step(step, few, [])
    assert "alone take too much" in capsys.readouterr().out


def test_sweep(compiled):
    machine, _ = compiled
    configs = search.meshes(small(), machine)
    shapes = {(c.mesh.data, c.mesh.fsdp) for c in configs}
    assert shapes >= {(8, 1), (1, 8), (2, 4), (4, 2)} and all(np.prod(s) <= 8 for s in shapes)


CONFIG = """
from stickjax import Config, DataConfig, ModelConfig
def get_config():
    return Config(ModelConfig(V=64, D=32, L=2, N=4, K=2, H=8, F=16), DataConfig(T=16, B=8))
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return str(path)


def test_the_command(config_file, no_wheels, capsys):
    assert command.main([config_file, "--devices=2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["mesh"]["fsdp"] == 2 and said["fits"] and said["mfu"]["overlapped"] > 0
    assert command.main([config_file, "--devices=2", "--sweep"]) == 0
    said = capsys.readouterr().out
    assert "fsdp=2" in said and "data=2" in said and "virtual CPU" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu=h20"], "did you mean 'h200'?"),
        (["--devices=6", "--hosts=4"], "devices=6 must be a multiple of hosts=4"),
        (["--devices=4", "--mesh.fsdp=2"], "the mesh has 2 devices, but there are 4"),
        (["--devices=3"], "multiple of"),
        (["--devices=2", "--mesh.fdsp=2"], "did you mean 'mesh.fsdp'?"),
        (["--devices=100"], "100 are needed"),
    ],
)
def test_bad_input_is_one_line(config_file, no_wheels, capsys, words, message):
    assert command.main([config_file, *words]) == 1
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1


def test_a_dry_run_writes_nothing(config_file, tmp_path, capsys):
    run = tmp_path / "run"
    changes = ["--mesh.fsdp=-1", "--model.param_dtype=bfloat16"]
    assert train.main([config_file, "--dry-run", "--run", str(run), *changes]) == 0
    said = capsys.readouterr().out
    assert "8 x cpu" in said and not run.exists()
    assert re.search(r"state +parameters .* KiB, float32 masters .* KiB, moments", said)


@pytest.mark.parametrize("name", chips.CHIPS)
def test_chips(name):
    chip = chips.chip(name)
    assert chips.of_kind(chip.text.split('device_description_str: "')[1]) is chip
    assert chip.memory > 40 * 2**30 and chip.bandwidth > 5e11


def test_a_config_file_of_100b_parameters():
    from stickjax.models.decoder import Decoder

    model = load_config("configs/powermoe_100b.py").model
    total, active = Decoder().parameter_counts(model)
    assert 0.95e11 < total < 1.05e11 and active < total / 5
    assert model.m_width == model.D / 256
