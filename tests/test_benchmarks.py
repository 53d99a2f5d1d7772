"""The benchmarks run and print the expected rows. No test checks a measured time."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FORWARD, GRADIENT, assert_close

from benchmarks import __main__ as cli
from benchmarks import (
    cost,
    gpu,
    gpu_attention,
    gpu_cases,
    gpu_check,
    gpu_decode,
    gpu_record,
    gpu_run,
    long,
    report,
    stick_breaking,
)
from benchmarks import trained_heads as recipe
from benchmarks import trained_logits as trained
from benchmarks.timing import Times, interleave, rotating
from benchmarks.train import peer_sizes
from pallas_kernels import stick_breaking_attention
from stickjax.config import ModelConfig
from stickjax.config.command_line import load_config
from stickjax.models.transformer import empty_cache, init
from stickjax.train import main as train_main

TINY = str(Path(__file__).parent.parent / "configs" / "tiny.py")


def test_matmul_cost():
    assert cost.matmul(2, 3, 5) == (2 * 2 * 3 * 5, 4 * (10 + 15 + 6))


def test_stick_breaking_cost_is_that_of_the_specification():
    """The computed cost of attention equals the cost in the specification and, at a tiny size, a count by hand.

    The specification says, for B=4, N=12, H=128, T=4096 in bfloat16: the forward pass needs 0.206 TFLOP and 203 MB;
    forward and backward pass together need 3.5 times the operations.
    """
    shape = dict(B=4, T=4096, N=12, H=128, itemsize=2)
    forward, both = cost.stick_breaking(**shape), cost.stick_breaking(**shape, backward=True)
    assert forward.flops == pytest.approx(0.206e12, rel=2e-3) and both.flops == 3.5 * forward.flops
    assert forward.bytes == pytest.approx(203e6, rel=5e-3)
    # By hand for B=1, T=2, N=2, K=1, H=4: q and out have 16 numbers each, k and v 8 each; there are 4 sticks.
    small = dict(B=1, T=2, N=2, H=4, K=1)
    assert cost.stick_breaking(**small) == (4 * 2 * 2 * 4, 4 * (16 + 16 + 8 + 8 + 4))
    backward = cost.stick_breaking(**small, backward=True).bytes - cost.stick_breaking(**small).bytes
    assert backward == 4 * (3 * 16 + 4 * 8 + 4)  # q, dout, dq; k, v, dk, dv; drem


def test_experts_cost_is_that_of_the_specification():
    """The computed cost of the experts equals the cost in the specification and, at a tiny size, a count by hand.

    The specification says, for PowerMoE-3B with T=8192 on a GPU of 790 TFLOP/s: 0.391 ms for the forward pass, and
    1.174 ms for the forward and backward pass together.
    """
    shape = dict(T=8192, k=8, D=1536, F=512, E=40, itemsize=2)
    ceilings = cost.Ceilings(790e12, 4.3e12)
    assert cost.experts(**shape).limits(ceilings)["limit: compute"] == pytest.approx(0.391, abs=1e-3)
    assert cost.experts(**shape, backward=True).limits(ceilings)["limit: compute"] == pytest.approx(1.174, abs=1e-3)
    # By hand for T=2, k=1, D=3, F=5, E=2 in fp32: x and out have 6 numbers each, the weights 2 * 3 * 15, the gates and
    # the indices 2 each.
    assert cost.experts(2, 1, 3, 5, 2) == (6 * 2 * 3 * 5, 4 * (6 + 6 + 90 + 2 + 2))
    assert cost.experts(2, 1, 3, 5, 2, backward=True).bytes == 4 * (106 + 3 * 6 + 2 * 90 + 3 * 2)


def test_ratios_pair_the_rounds():
    """`Times.over` compares two contestants round by round, so a load that changes between rounds has no effect.

    In this test, both contestants take twice as long in the last two rounds.
    """
    slow, fast = Times(np.array([2.0, 4.0, 4.0])), Times(np.array([1.0, 2.0, 2.0]))
    assert slow.over(fast) == 2 and (slow.median, slow.best) == (4, 2)


def test_interleave_takes_turns():
    order = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, least=2)
    assert "".join(order) == "abab" + "abba" and all(len(t.rounds) == 2 for t in times.values())
    calls = []
    assert len(rotating(calls.append, [(1,), (2,)], seconds=0, least=3).rounds) == 3
    assert calls == [1, 2] * (len(calls) // 2) and len(calls) >= 2 * 5


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


def test_quick_long(monkeypatch):
    """The benchmark of long texts measures both passes, decode steps, and the largest dropped weight."""
    monkeypatch.setattr(long, "torch_python", lambda: None)
    rows = cli.cpu_rows("long", quick=True)
    cases = {row.case for row in rows if row.contestant == long.OURS}
    assert {"T=64 N=2 H=32 forward", "T=64 N=2 H=32 forward+backward", "decoding S=64 N=2 H=32"} <= cases
    assert {row.contestant for row in rows if row.best} == {long.OURS, long.JAX}
    (dropped,) = (row for row in rows if row.contestant == "largest dropped weight")
    assert dropped.holds


def test_quick_experts():
    rows = cli.cpu_rows("experts", quick=True)
    raced = [row for row in rows if row.contestant == "xla"]
    assert len(raced) == 2 and all(row.against == "dense" and row.ratio > 0 for row in raced)
    assert raced[1].at_most == pytest.approx(1.3 * raced[0].at_most)


def test_gpu_without_a_gpu(capsys):
    assert cli.main(["--gpu"]) == 1
    assert capsys.readouterr().err == "error: --gpu needs a GPU, but JAX finds no GPU on this machine\n"


def test_gpu_check_sees_a_wrong_answer():
    """`gpu_check`, which runs before the timing, accepts rounding errors and reports wrong results.

    It reports a wrong gradient, rows that were never written, and results that differ between two runs.
    """
    x, cotangent = jax.random.normal(jax.random.key(0), (2, 8, 4), jnp.bfloat16)
    expected = gpu_check.exact(lambda x: 2 * x, cotangent, (x,))

    def check(function):
        found = gpu_check.errors(function, expected, cotangent, (x,))
        forward, gradient = FORWARD["bfloat16"], GRADIENT["bfloat16"]
        assert found.passes("bfloat16") == (found.forward <= forward and found.gradient <= gradient and found.repeats)
        return found.forward <= forward, found.gradient <= gradient

    assert check(lambda x: x + x) == (True, True)
    assert check(lambda x: jax.lax.stop_gradient(x) + x) == (True, False)
    assert check(lambda x: (2 * x).at[3].set(jnp.nan)) == (False, False)
    assert not gpu_check.Errors(0.0, 0.0, repeats=False).passes("bfloat16")


def test_gpu_check_of_the_last_queries():
    """`check_last` accepts a correct attention and reports a missing key.

    `check_last` compares only the last queries of a long call, so that the reference has few scores to compute.
    """
    cotangent, *arrays = gpu_attention._inputs(0, dict(B=1, T=48, N=2, H=32))
    reference = stick_breaking.attention(implementation="reference")

    def check(f):
        return gpu_attention.check_last(f, reference, cotangent, arrays, 16).passes("bfloat16")

    assert check(reference)
    assert not check(lambda q, k, v: reference(q, k.at[:, 40].set(0), v))


def test_trained_logits_keep_what_a_trained_model_keeps():
    """With early exit, the benchmark inputs need as large a share of the attention tiles as a trained model.

    The trained model computes 34% of the 64 x 64 tiles at T=1024, and 21% at T=2048. At T=2048, the head with the
    smallest share computes 12% of its tiles, and the head with the largest share 65%.
    """
    settings = dict(skip_below=-24.0, tiles=(64, 64), return_stats=True, implementation="xla")
    kept = {}
    for T in (1024, 2048):
        arrays = trained.inputs(jax.random.key(0), B=1, T=T, N=12, H=32)
        kept[T] = jax.jit(lambda *arrays: stick_breaking_attention(*arrays, **settings)[2].kept[0])(*arrays)
    assert abs(kept[1024].mean() - 0.34) < 0.04 and abs(kept[2048].mean() - 0.21) < 0.04
    assert abs(kept[2048].min() - 0.12) < 0.02 and abs(kept[2048].max() - 0.65) < 0.1


MODEL = dict(V=257, D=32, L=2, N=4, K=2, H=8, F=16, attention_scale=0.5)


def test_heads_of_a_model_are_those_it_attends_with():
    model = init(ModelConfig(**MODEL), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (50,), 0, 257)
    heads = recipe.of_model(model, tokens)
    assert heads.query.shape == heads.key.shape == (8, 50, 8)
    full = jax.jit(lambda model: model(tokens[None], cache=empty_cache(model.config, 1, 50)))
    cached = full(model).cache.key  # [L,1,T,K,H]
    every = jnp.repeat(cached[:, 0], 2, axis=2).swapaxes(1, 2).reshape(8, 50, 8)
    assert_close(heads.key, every, FORWARD["float32"], "keys")
    block = jax.tree.map(lambda p: p[0], model.blocks)
    x = block.attention_norm(model.config.m_emb * model.embed[...][tokens][None])
    query = jnp.einsum("BTD,DNH->NTH", x, block.attention.query[...]) * 0.5
    assert_close(heads.query[:4], query, FORWARD["float32"], "queries")
    with pytest.raises(ValueError, match="stick-breaking attention, but the model has attention='softmax'"):
        recipe.of_model(init(ModelConfig(**MODEL, attention="softmax"), jax.random.key(0)), tokens)


def test_inputs_keep_the_logits_of_the_heads():
    """Benchmark inputs that are made from given attention heads have the logits of these heads.

    This also holds if the inputs have a larger H, more heads, a longer text, or several query heads for each key head.
    """
    rng = np.random.default_rng(0)
    heads = trained.Heads(*rng.normal(size=(2, 3, 20, 8)).astype(np.float32))
    every = np.einsum("Mih,Mjh->Mij", *heads)
    for N, K in ((5, 5), (4, 2)):
        q, k, v = trained.inputs(jax.random.key(3), B=2, T=7, N=N, H=16, K=K, S=33, heads=heads)
        assert q.shape == (2, 7, N, 16) and k.shape == v.shape == (2, 33, K, 16)
        logits = np.einsum("BTNH,BSNH->BNTS", q, np.repeat(k, N // K, axis=2)) * 16**-0.5
        for entry in logits.reshape(-1, 7, 33):
            found = [
                (m, i, j)
                for m, i, j in np.ndindex(3, 20, 20)
                if np.allclose(entry, every[m][(i + np.arange(7)) % 20][:, (j + np.arange(33)) % 20], atol=1e-4)
            ]
            assert len(found) == 1, found
            # The last query is at the position of the last key or up to N // K - 1 tokens before it. This distance is
            # different for the query heads of a group.
            assert (found[0][2] + 32 - found[0][1] - 6) % 20 < N // K
    with pytest.raises(ValueError, match="H=4 is below 8, the width of the trained heads"):
        trained.inputs(jax.random.key(0), B=1, T=4, N=1, H=4, heads=heads)


def test_the_recipe_of_trained_heads(tmp_path, monkeypatch, capsys):
    """`benchmarks.trained_heads` saves the attention heads of a trained model as inputs of the benchmarks.

    A folder without a run gives one line with an error, and no file is written.
    """
    run, out = tmp_path / "run", tmp_path / "heads.npz"
    changes = [f"--model.{name}={value}" for name, value in MODEL.items()]
    fast = [
        "--model.experts.E=0",
        "--model.experts.k=0",
        "--data.T=32",
        "--data.B=2",
        "--train.steps=1",
        "--optim.warmup_tokens=0",
        "--optim.decay_tokens=0",
    ]
    assert train_main([TINY, f"--run={run}", *changes, *fast]) == 0
    assert recipe.main([str(run), "--tokens=300", f"--out={out}"]) == 0
    assert "8 heads on 300 tokens" in capsys.readouterr().out
    monkeypatch.setattr(trained, "SAVED", out)
    trained.saved.cache_clear()
    try:
        assert "a trained model, 8 heads" in trained.source()
        assert gpu_attention._inputs(0, dict(B=1, T=48, N=2, H=32))[1].shape == (1, 48, 2, 32)
    finally:
        monkeypatch.undo()
        trained.saved.cache_clear()
    assert recipe.main([str(tmp_path), f"--out={tmp_path / 'none.npz'}"]) == 1
    assert "error: " in capsys.readouterr().err and not list(tmp_path.glob("none*"))


def test_gpu_limit_on_time():
    said = []
    with gpu_run.give_up_after(0.01, lambda: said.append("rows"), said.append):
        while len(said) < 2:
            pass
    assert said == ["rows", 1]


def test_gpu_ratios():
    rows = [
        report.Row("p", "c", name, ms) for name, ms in (("ours", 2.0), ("a", 4.0), ("b", 1.0), ("limit: bytes", 1.0))
    ]
    rows.insert(1, report.Row("p", "other", "ours", 1.0))
    ours, a, b, limit, other = gpu_run.with_ratios(rows, ("a", "b"))
    assert (ours.ratio, ours.against, ours.extra) == (0.5, "a", {"over b": 2.0})
    assert (a.ratio, a.against, b.ratio, b.against) == (4.0, "b", 0.25, "a")
    assert limit.ratio is None and other.ratio is None


def test_gpu_rows_on_this_backend(monkeypatch, tmp_path):
    """The GPU benchmark runs completely on this backend, with tiny shapes.

    A contestant that cannot run here gets a row with the reason; all other contestants are timed.
    """
    assert list(gpu_cases.implementations("stick_breaking_attention", *[jnp.ones((1, 4, 1, 8))] * 3)) == ["xla"]
    monkeypatch.setattr(gpu_decode, "STEPS", 2)
    monkeypatch.setattr(gpu_attention, "QUICK", [dict(B=1, T=32, N=2, H=32)])
    assert gpu.attention_kernels() == ("xla",)
    info = dict.fromkeys(gpu_record.MUST_MATCH)
    record = gpu_record.Record(tmp_path / "gpu.json", info, gpu.finished)
    gpu.rows(gpu_run.Run(record, quick=True))
    rows = record.finished()
    assert rows[-1].extra == {"passed": 15, "did not pass": "none", "left out": 0}
    parts = list(dict.fromkeys(row.part for row in rows))
    assert parts[:4] == ["lower", "correct", "exit", "stick_breaking checks at size"] and parts[-1] == "summary"
    timed = {(row.part, row.case.split(" bf16 ")[1], row.contestant) for row in rows if row.milliseconds}
    for passes in gpu_run.PASSES:
        for contestant in ("xla", "jax.lax.ragged_dot", "limit: compute", "limit: bytes"):
            assert ("experts", passes, contestant) in timed
        for contestant in ("xla", "xla skip_below=-24", "limit: compute"):
            assert ("stick_breaking", passes, contestant) in timed
    assert {("stick_breaking decode", f"S{S}", "xla skip_below=-24") for S in gpu_decode.QUICK_LENGTHS} <= timed
    notes = {row.contestant: row.extra["failed"] for row in rows if "failed" in row.extra}
    assert set(notes) == {"cudnn softmax"}
    assert all(row.extra["GB/s"] > 0 for row in rows if row.part == "stick_breaking decode" and row.milliseconds)
    # The next run has nothing to do and returns the same rows.
    calls = []
    monkeypatch.setattr(gpu_run.Run, "require_time", lambda self: calls.append(self))
    again = gpu_record.Record(tmp_path / "gpu.json", info, gpu.finished)
    gpu.rows(gpu_run.Run(again, quick=True))
    assert not calls and [row.to_dict() for row in again.finished()] == [row.to_dict() for row in rows]


def test_the_torch_model_gets_the_sizes_of_the_config():
    """The sizes go to another process as JSON, so all of them must be numbers."""
    sizes = dict(V=257, D=128, L=4, N=4, K=4, H=32, F=192, E=8, k=2, B=16, T=256)
    assert peer_sizes(load_config("tiny")) == sizes
