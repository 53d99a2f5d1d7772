"""The benchmarks run and say what they mean; nothing here asserts a time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as cli
from benchmarks import cost, gpu, report, stick_breaking
from benchmarks.timing import Times, interleave, rotating


def test_matmul_cost():
    assert cost.matmul(2, 3, 5) == (2 * 2 * 3 * 5, 4 * (10 + 15 + 6))


def test_stick_breaking_cost_is_that_of_the_specification():
    """B4 N12 H128 bf16, T=4096: 0.206 TFLOP forward, 3.5 times that with the backward pass, 203 MB forward."""
    shape = dict(B=4, T=4096, N=12, H=128, itemsize=2)
    forward, both = cost.stick_breaking(**shape), cost.stick_breaking(**shape, backward=True)
    assert forward.flops == pytest.approx(0.206e12, rel=2e-3) and both.flops == 3.5 * forward.flops
    assert forward.bytes == pytest.approx(203e6, rel=5e-3)
    # By hand: B=1, T=2, N=2, K=1, H=4: q and out 16 numbers each, k and v 8 each, 4 sticks.
    small = dict(B=1, T=2, N=2, H=4, K=1)
    assert cost.stick_breaking(**small) == (4 * 2 * 2 * 4, 4 * (16 + 16 + 8 + 8 + 4))
    backward = cost.stick_breaking(**small, backward=True).bytes - cost.stick_breaking(**small).bytes
    assert backward == 4 * (3 * 16 + 4 * 8 + 4)  # q, dout, dq; k, v, dk, dv; drem


def test_experts_cost_is_that_of_the_specification():
    """PowerMoE-3B at T=8192: 0.391 ms forward and 1.174 with the backward pass, at 790 TFLOP/s."""
    shape = dict(T=8192, k=8, D=1536, F=512, E=40, itemsize=2)
    ceilings = cost.Ceilings(790e12, 4.3e12)
    assert cost.experts(**shape).limits(ceilings)["limit: compute"] == pytest.approx(0.391, abs=1e-3)
    assert cost.experts(**shape, backward=True).limits(ceilings)["limit: compute"] == pytest.approx(1.174, abs=1e-3)
    # By hand: T=2, k=1, D=3, F=5, E=2 in fp32: x and out 6 numbers, weights 2 * 3 * 15, gates and indices 2 each.
    assert cost.experts(2, 1, 3, 5, 2) == (6 * 2 * 3 * 5, 4 * (6 + 6 + 90 + 2 + 2))
    assert cost.experts(2, 1, 3, 5, 2, backward=True).bytes == 4 * (106 + 3 * 6 + 2 * 90 + 3 * 2)


def test_ratios_pair_the_rounds():
    """The load doubled in the last two rounds: medians of the times would mix the two."""
    slow, fast = Times(np.array([2.0, 4.0, 4.0])), Times(np.array([1.0, 2.0, 2.0]))
    assert slow.over(fast) == 2 and (slow.median, slow.best) == (4, 2)


def test_interleave_takes_turns():
    order = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, least=2)
    assert "".join(order) == "abab" + "abba" and all(len(t.rounds) == 2 for t in times.values())
    calls = []
    assert len(rotating(calls.append, [(1,), (2,)], seconds=0, least=3).rounds) == 3 and calls == [1, 2] * 5


def test_bounds():
    def row(**fields):
        return report.Row("p", "c", "x", **fields).holds

    assert row(ratio=1.0, at_most=1.1) and not row(ratio=1.2, at_most=1.1)
    assert row(ratio=1.0, at_least=0.8) and not row(ratio=0.7, at_least=0.8)
    assert row(ratio=1.0) is None and row(at_most=1.0) is None


def test_inputs_have_the_logits_they_promise():
    _, q, k, _ = stick_breaking.inputs(jax.random.key(0), B=1, T=256, N=2, H=64, mean=-4.0)
    z = jnp.einsum("BTNH,BSNH->BNTS", q, k) / 8
    assert abs(z.mean() + 4) < 0.05 and abs(z.std() - 1) < 0.05


def test_quick_run(tmp_path, capsys):
    path = tmp_path / "deep" / "cpu.json"
    assert cli.main(["--quick", "--only", "stick_breaking", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "quick T=32 forward+backward" in printed and "limit: bytes" in printed
    result = json.loads(path.read_text())
    assert {"machine", "device", "cpu_count", "load", "jax", "date", "rows"} == set(result)
    rows = [row for row in result["rows"] if row["part"] == "stick_breaking"]
    cases = {row["case"] for row in rows}
    assert len(cases) == 5
    for row in rows:
        assert row.get("milliseconds", 1) > 0 and row.get("best", 0) <= row.get("milliseconds", 1)
        assert ("holds" in row) == ("at_most" in row)
    assert {row["contestant"] for row in rows} >= {"reference", "xla", "xla skip_below=-24", "limit: compute"}
    memory = {row["contestant"]: row["extra"]["MB"] for row in rows if "memory" in row["case"]}
    assert 0 < memory["xla"] < memory["reference"]


def test_quick_experts():
    rows = cli.cpu_rows("experts", quick=True)
    raced = [row for row in rows if row.contestant == "xla"]
    assert len(raced) == 2 and all(row.against == "dense" and row.ratio > 0 for row in raced)
    assert raced[1].at_most == pytest.approx(1.3 * raced[0].at_most)


def test_gpu_without_a_gpu(capsys):
    assert cli.main(["--gpu"]) == 1
    assert capsys.readouterr().err == "error: --gpu needs a GPU that JAX can see; this machine has none\n"


def test_gpu_check_sees_a_wrong_answer():
    """The gate before any timing: rounding passes; a wrong gradient or an unwritten row does not."""
    x, cotangent = jax.random.normal(jax.random.key(0), (2, 8, 4), jnp.bfloat16)
    expected = gpu.exact(lambda x: 2 * x, cotangent, (x,))

    def check(function):
        forward, gradient = gpu.errors(function, expected, cotangent, (x,))
        return forward <= gpu.FORWARD, gradient <= gpu.GRADIENT

    assert check(lambda x: x + x) == (True, True)
    assert check(lambda x: jax.lax.stop_gradient(x) + x) == (True, False)
    assert check(lambda x: (2 * x).at[3].set(jnp.nan)) == (False, False)


def test_gpu_rows_on_this_backend(monkeypatch):
    """The whole script at tiny shapes: what cannot run here says so in its row, the rest is checked and timed."""
    assert list(gpu.implementations("stick_breaking_attention", *[jnp.ones((1, 4, 1, 8))] * 3)) == ["xla", "reference"]
    monkeypatch.setattr(gpu, "implementations", lambda *arguments: ["xla"])
    _, rows = gpu.rows("experts", quick=True)
    timed = {(row.case.split(" bf16 ")[1], row.contestant) for row in rows if row.milliseconds}
    for contestant in ("xla", "jax.lax.ragged_dot", "limit: compute", "limit: bytes"):
        assert {("forward", contestant), ("forward+backward", contestant)} <= timed
    assert all(row.extra["error"] < gpu.FORWARD for row in rows if row.contestant in ("xla", "jax.lax.ragged_dot"))
