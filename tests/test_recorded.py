"""While a step is traced, dispatch records which implementation it chooses for each op of the step.

This works for decoders and Sparse Universal Transformers, on a mesh, and when JAX reuses an earlier trace.
"""

import threading

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import dispatch, expert_mlp, route, stick_breaking_attention
from stickjax.config import Config, ExpertsConfig, SutConfig
from stickjax.parallel.mesh import make_mesh
from stickjax.plan import aot, report
from stickjax.train import fit
from stickjax.training import banner, loop

X = jnp.ones((2, 40, 4, 8))
SMALL = {"data.source": "text", "data.path": __file__, "data.T": 16, "data.B": 4, "train.steps": 1}
DECODER = Config().replace(
    SMALL | {
        "model.V": 257, "model.D": 16, "model.L": 2, "model.N": 4, "model.K": 2, "model.H": 8, "model.F": 16,
        "model.experts.E": 4, "model.experts.k": 2, "optim.warmup_tokens": 0,
    }
)  # fmt: skip
MIXTURE = ExpertsConfig(4, 2)
SUT = Config(
    SutConfig(V=257, D=16, L=2, K=1, H=8, F=16, experts=MIXTURE, attention_experts=MIXTURE, attention="stick_breaking")
).replace(SMALL | {"optim.warmup_tokens": 0})


# With remat, more of the step is traced twice.
EXHAUSTIVE = {"test_the_second_trace_of_a_step_records_the_same": lambda config, remat: remat == "none"}


def attend(x):
    return stick_breaking_attention(x, x, x)[0].sum()


def kernel_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("stick_breaking_attention: ", "expert_"))]


def test_a_choice_is_recorded_with_its_sizes_and_reasons():
    with dispatch.recorded() as choices:
        jax.jit(jax.grad(attend)).trace(X)
        attend(X)
        attend(X[:1])
    (first, second), counts = map(list, (choices, choices.values()))
    assert counts == [2, 1] and dict(first.sizes) == dict(B=2, T=40, N=4, H=8, S=40, K=4, Hv=8)
    assert str(first).startswith(
        "stick_breaking_attention: xla (1 query tile of 40 rows, each against all its keys) for"
    )
    assert " for B=2 T=40 N=4 H=8 S=40 K=4 Hv=8, on cpu; mosaic: needs compute capability 9.0" in str(first)
    assert dict(second.sizes)["B"] == 1


def test_the_hidden_width_is_that_of_one_half():
    routing = route(jnp.zeros((6, 2), int), 3)
    with dispatch.recorded() as choices:
        expert_mlp(jnp.ones((6, 4)), jnp.ones((3, 4, 10)), jnp.ones((3, 5, 4)), routing, jnp.ones((6, 2)))
    (choice,) = choices
    assert dict(choice.sizes) == dict(T=6, D=4, E=3, F=5, k=2)


def test_records_are_nested_and_each_thread_has_its_own():
    with dispatch.recorded() as outer:
        other = threading.Thread(target=attend, args=(X[:1],))
        other.start()
        other.join()
        with dispatch.recorded() as inner:
            attend(X)
    attend(X)
    assert list(outer) == list(inner) and outer.total() == inner.total() == 1


@pytest.mark.parametrize("kind", ["Explicit", "Auto", "alone"])
def test_what_jax_has_traced_before_is_recorded_again(kind):
    """A choice is recorded again when JAX uses a cached trace instead of tracing the op again.

    On a mesh, an op jits a part of itself, and JAX caches the trace of this part.
    """
    x = X + 0
    if kind != "alone":
        mesh = jax.make_mesh((2,), ("a",), axis_types=(getattr(jax.sharding.AxisType, kind),))
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("a")))
    found = []
    for _ in range(2):
        with dispatch.recorded() as choices:
            jax.jit(lambda x: attend(x)).trace(x)
        found.append(choices)
    assert found[0] == found[1] and found[0].total() >= 1
    assert dict(next(iter(found[0])).sizes)["B"] == (1 if kind == "Explicit" else 2)


def recorded_step(config: Config) -> list[str]:
    """Trace a training step without arrays; return the recorded choices as lines of text."""
    mesh = make_mesh(config)
    state, batch = aot.abstract_arguments(config, mesh, jax.devices()[0])
    with dispatch.recorded() as choices:
        loop.jit_step(config, mesh, state).trace(state, batch)
    return banner.kernels(choices).splitlines()


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("config", [DECODER, SUT], ids=["decoder", "sut"])
def test_the_second_trace_of_a_step_records_the_same(config, remat):
    config = config.replace({"model.remat": remat})
    lines = recorded_step(config)
    assert recorded_step(config) == lines == list(dict.fromkeys(lines))
    ops = {line.partition(":")[0] for line in lines}
    assert ops == {"stick_breaking_attention", "expert_mlp"} | (
        {"expert_linear"} if config.model.family == "sut" else set()
    )
    assert any(" for B=4 T=16 N=" in line for line in lines)


@pytest.mark.parametrize(
    "mesh, sizes",
    [
        ({"mesh.data": 2}, "B=2 T=16 N=4 H=8 S=16 K=2"),
        ({"mesh.fsdp": 2, "train.accumulate": 2}, "B=1 T=16 N=4 H=8 S=16 K=2"),
        ({"mesh.tensor": 2, "model.V": 258}, "B=4 T=16 N=2 H=8 S=16 K=1"),
        ({"mesh.context": 2}, "B=8 T=4 N=4 H=8 S=4 K=2"),
    ],
)
def test_on_a_mesh_it_is_the_part_of_one_device(mesh, sizes):
    lines = recorded_step(DECODER.replace(mesh))
    assert f" for {sizes} " in lines[0] and lines[-1].startswith("expert_mlp: ")


def test_a_step_without_kernels_says_so():
    lines = recorded_step(DECODER.replace({"model.attention": "softmax", "model.experts.E": 0, "model.experts.k": 0}))
    assert lines == ["the step has neither an attention kernel nor an expert kernel"]


def test_the_banner_has_what_the_step_traced_also_the_second_time(tmp_path, capsys):
    for name in "ab":
        fit(DECODER, str(tmp_path / name))
        assert kernel_lines(capsys.readouterr().out) == recorded_step(DECODER)


def test_the_step_is_traced_once(tmp_path, monkeypatch):
    traced, jit_step = [], loop.jit_step

    def counted(config, mesh, state):
        wrapped = jit_step(config, mesh, state).__wrapped__

        def step(*args):  # this name, so that the program of the test before is in the cache
            traced.append(1)
            return wrapped(*args)

        return jax.jit(step, donate_argnums=0)

    monkeypatch.setattr(loop, "jit_step", counted)
    fit(DECODER.replace({"train.steps": 3}), str(tmp_path / "run"), quiet=True)
    assert traced == [1]


def test_a_dry_run_says_the_same(capsys):
    dense = {"model.experts.E": 0, "model.experts.k": 0}
    config = DECODER.replace(dense | {"mesh.data": len(jax.devices()), "data.B": 8})
    report.show(config, aot.present_machine())
    found = [line[14:] for line in capsys.readouterr().out.splitlines() if line.startswith("kernel  ")]
    assert found == recorded_step(config)


def test_a_kernel_that_cannot_run_leaves_no_folder(tmp_path):
    with pytest.raises(NotImplementedError, match="implementation mosaic: needs compute capability"):
        fit(DECODER.replace({"model.implementation": "mosaic"}), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()
