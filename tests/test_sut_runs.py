"""Test Sparse Universal Transformers in the commands: train, resume, evaluate by number of operators, generate."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import halting
from stickjax import Config, DataConfig, ExpertsConfig, SutConfig, load
from stickjax.convert import export
from stickjax.data.pairs import pair_examples
from stickjax.data.readers import training_data
from stickjax.evaluate import depths as depths_of_text
from stickjax.evaluate import evaluate as bits_per_byte
from stickjax.evaluate import main as evaluate
from stickjax.evaluation.pairs import THRESHOLDS, accuracy, batches_of, depths
from stickjax.generate import generate, generate_text
from stickjax.models.families import family_of
from stickjax.parallel.mesh import make_mesh
from stickjax.train import fit, main
from stickjax.training.metrics import read_metrics

SIZES = dict(D=8, L=3, K=1, H=4, F=8, experts=ExpertsConfig(3, 2), attention_experts=ExpertsConfig(3, 2))
PAIRS = Config(SutConfig(V=12, **SIZES, classes=7), DataConfig(source="logic", examples=3000, T=40, B=4)).replace(
    {"train.steps": 4, "train.checkpoint_every": 2, "train.log_every": 1}
)
# A run whose curriculum begins with short pairs, so all batches have one width: each further width is compiled.
RUN = PAIRS.replace({"data.curriculum": 50})
TEXT = Config(SutConfig(**SIZES, attention="stick_breaking"), DataConfig(T=8, B=2)).replace({"train.steps": 2})


EXHAUSTIVE = {
    "test_a_language_model_trains_is_scored_and_continues_text": lambda attention: attention != "stick_breaking"
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    run = str(tmp_path_factory.mktemp("runs") / "pairs")
    fit(RUN.replace({"train.steps": 2}), run, quiet=True)
    fit(RUN, run, quiet=True)  # resumes
    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return the run folder of a language model, after two steps."""
    run = str(tmp_path_factory.mktemp("runs") / "text")
    fit(TEXT, run, quiet=True)
    return run


def test_a_run_is_resumed_and_read_back(pairs):
    assert [row["step"] for row in read_metrics(pairs)] == [1, 2, 3, 4]
    assert {"accuracy", "depth", "act", "load_max", "mutual_information"} <= read_metrics(pairs)[0].keys()
    loaded = load(pairs)
    assert loaded.config == RUN and loaded.config.model.family == "sut" and loaded.step == 4
    assert Config.from_dict(json.loads(RUN.to_json())) == RUN
    assert PAIRS.diff(Config()) == ["model.family: 'sut' -> 'decoder'"]


def test_batches_are_of_about_one_length_and_leave_out_less_than_one():
    data, examples = training_data(PAIRS), pair_examples(PAIRS, "train")
    loader, seen, widths = data.loader(0, 1), set(), set()
    for _ in range(len(examples) // 4):
        batch = next(loader)
        longest = (batch["left"] != 0).sum(1).max(), (batch["right"] != 0).sum(1).max()
        widths.add(batch["left"].shape[1])
        assert batch["left"].shape == batch["right"].shape and -(-max(longest) // 8) * 8 == batch["left"].shape[1]
        for left, right in zip(batch["left"], batch["right"], strict=True):
            seen.add((left[left != 0].tobytes(), right[right != 0].tobytes()))
    assert len(widths) > 2 and len(seen) > len(examples) - 4
    halves = [next(data.loader(index, 2)) for index in range(2)]
    whole = next(data.loader(0, 1))
    np.testing.assert_array_equal(np.concatenate([half["left"] for half in halves]), whole["left"])


def test_a_curriculum_begins_with_the_shortest():
    """With data.curriculum, training begins with the shortest pairs; later batches may contain longer ones.

    After the curriculum, the batches are the batches of a training without a curriculum. Resuming in the middle changes
    nothing.
    """
    config, steps = PAIRS.replace({"data.curriculum": 30}), 30
    rows = pair_examples(config, "train").rows
    lengths = np.sort([max(side.count(" ") + 1 for side in row[:2]) for row in rows])
    loader, again = (training_data(config).loader(0, 1) for _ in range(2))
    longest = []
    for step in range(steps):
        if step == 20:
            again.set_state(loader.get_state())
        batch = next(loader)
        longest.append(max((batch[side] != 0).sum(1).max() for side in ("left", "right")))
        assert longest[-1] <= lengths[int(len(lengths) * max(0.1, (step + 1) / steps)) - 1]
        if step >= 20:
            np.testing.assert_array_equal(next(again)["label"], batch["label"])
    assert max(longest[:3]) < 10 < 20 < max(longest)
    plain = training_data(PAIRS).loader(0, 1)
    for _ in range(3):
        batch = next(plain)
        for found in (next(loader), next(again)):
            np.testing.assert_array_equal(found["left"], batch["left"])


def test_accuracy_is_that_of_a_direct_count(pairs):
    loaded = load(pairs)
    records = accuracy(loaded.model, loaded.config, buckets=[3], thresholds=[0.999, 0.3], max_pairs=5, B=4)
    read = jax.jit(lambda batch: loaded.model(batch, None, threshold=0.999, stop_early=True))
    labels, right, depth, tokens, rows = [], 0, 0.0, 0, 0
    for batch, real in batches_of(loaded.config, 3, 5, 4):
        output = read(batch)
        chosen = np.asarray(output.logits).argmax(-1)
        for i in np.flatnonzero(real):
            labels.append(batch["label"][i])
            right += int(chosen[i] == batch["label"][i])
        sides = np.stack([batch["left"], batch["right"]]) != 0
        depth, tokens = depth + np.asarray(output.depth)[sides].sum(), tokens + sides.sum()
        rows += sum(int(r.sum()) for r in output.rows.values())
    first, second = records
    assert first["pairs"] == 5 and first["accuracy"] == right / 5
    assert first["majority"] == np.bincount(labels).max() / 5
    np.testing.assert_allclose([first["depth"], first["rows"]], [depth / tokens, rows / tokens], rtol=1e-6)
    # Pairs that only fill a batch are not counted: batches of one pair, which need none, give the same numbers.
    (ones,) = accuracy(loaded.model, loaded.config, buckets=[3], thresholds=[0.999], max_pairs=5, B=1)
    np.testing.assert_allclose([ones["depth"], ones["rows"]], [first["depth"], first["rows"]], rtol=1e-5)
    assert second["depth"] < first["depth"] and second["rows"] < first["rows"]


def test_a_batch_is_as_wide_as_its_bucket_needs():
    """The width of an evaluation batch depends on its bucket of pairs, and not on the pairs that are drawn.

    The width is a multiple of 40. The pair that is drawn here has at most 40 tokens per sentence. The longest sentence
    of its bucket has 43 tokens, so the width is 80.
    """
    ((batch, _),) = batches_of(PAIRS.replace({"data.examples": 20_000}), 8, 1, 1)
    assert batch["left"].shape == (1, 80) and (batch["left"] != 0).sum() <= 40


def test_a_bucket_of_which_no_pair_was_drawn():
    with pytest.raises(ValueError, match="data.examples=20 gives no held-out pair with 12 operators"):
        batches_of(PAIRS.replace({"data.examples": 20}), 12, 1, 1)


def test_evaluate_writes_accuracy_and_pictures(pairs, capsys, tmp_path):
    assert evaluate([pairs, "--max-pairs", "2", "--plot", str(tmp_path / "accuracy.png")]) == 0
    out = capsys.readouterr().out
    assert "commonest label" in out and "12+" in out and "expert rows per token" in out and "100%" in out
    records = json.loads((tmp_path / pairs / "accuracy.json").read_text())
    assert {r["bucket"] for r in records} == set(range(13)) and {r["threshold"] for r in records} == set(THRESHOLDS)
    for picture in (f"{pairs}/halting.png", f"{pairs}/depth.png", tmp_path / "accuracy.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    loaded = load(pairs)
    for tokens, depth in depths(loaded.model, loaded.config, 4):
        assert len(tokens) == len(depth) and (depth >= 1).all() and (depth <= 3).all()


def test_what_halting_saves_of_a_language_model(pairs, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(halting, "RESULTS", tmp_path / "halting.json")
    assert halting.main([text, "--seconds=0.01", "--json"]) == 0
    rows = [line.split("│")[1:6] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    thresholds, bits, depth, ran = (
        tuple(map(float, column)) for column in zip(*[row[:4] for row in rows], strict=True)
    )
    assert thresholds == THRESHOLDS and all(4 < x < 12 for x in bits)
    # Two layers with two experts each, three times. Below a threshold of 1/2, a token halts at once.
    kept = json.loads((tmp_path / "halting.json").read_text())["rows"]
    np.testing.assert_allclose([row["extra"]["bits per token"] for row in kept], bits, atol=1e-3)
    assert ran[0] == 12 and depth[-1] == 1 and ran[-1] == 4 and list(ran) == sorted(ran, reverse=True)
    assert halting.main([pairs]) == 1 and "no language model that halts" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["stick_breaking", "softmax"])
def test_a_language_model_trains_is_scored_and_continues_text(text, tmp_path, attention):
    run = text if attention == TEXT.model.attention else str(tmp_path / "run")
    if run != text:
        fit(TEXT.replace({"model.attention": attention}), run, quiet=True)
    loaded = load(run)
    (record,) = bits_per_byte(loaded.model, loaded.config, lengths=(1,), max_tokens=64)
    assert record["tokens"] == 64 and 4 < record["bits_per_byte"] < 12 and 1 < record["depth"] < 3
    (line, depth), *_ = depths_of_text(loaded.model, loaded.config)
    assert len(line) == len(depth) == 8 and all(line) and ((1 <= depth) & (depth <= 3)).all()
    (continued, _) = generate_text(loaded, ["def ", "a"], 3)
    assert isinstance(continued, str)
    check_greedy_tokens(loaded.model)


def check_greedy_tokens(model):
    """Greedy tokens equal the tokens of one forward pass over the whole text, with any padding on the left of a row."""
    read = jax.jit(lambda model, ids, segments: model({"tokens": ids, "segment_ids": segments}).logits)
    prompts = [np.array([5, 6, 7, 8]), np.array([9])]
    for prompt, new in zip(prompts, generate(model, prompts, 3), strict=True):
        ids = np.zeros((1, 8), np.int32)
        ids[0, : len(prompt) + 3] = [*prompt, *new]
        logits = read(model, ids, np.where(np.arange(8) < len(prompt) + 3, 0, -1)[None])[0]
        assert new == logits[len(prompt) - 1 :].argmax(-1)[:3].tolist()


def test_greedy_tokens_with_relative_positions():
    config, rng = dataclasses.replace(TEXT.model, attention="softmax"), np.random.default_rng(0)
    model = jax.eval_shape(partial(family_of(config).init, config), jax.random.key(0))
    check_greedy_tokens(jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), model))


def test_what_a_step_takes_is_counted():
    total, active = family_of(PAIRS.model).parameter_counts(PAIRS.model)
    model = jax.eval_shape(partial(family_of(PAIRS.model).init, PAIRS.model), jax.random.key(0))
    assert total == sum(x.size for x in jax.tree.leaves(model))
    outside = sum(p.size for p in (model.embed, model.w_in, model.in_bias, model.w_out, model.out_bias))
    idle = 8 * 8 * 2 + 8 + 8 + 8 * 4 * 2  # one of three experts: network with biases, query and output of a head
    assert active == total - outside - idle
    assert family_of(PAIRS.model).flops_per_token(PAIRS.model, 10) == 3 * (6 * active + 6 * 2 * 2 * 4 * 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.source": "stdlib"},
            "this model of family='sut' reads pairs: data.source must be 'logic' or 'labelled', not 'stdlib'",
        ),
        ({"model.classes": 3}, "classes=3 must be 7, the number of labels of pairs of logic"),
        (
            {"model.classes": 0, "data.curriculum": 9},
            "this model reads a text; set data.curriculum=0",
        ),
        ({"data.T": 20}, "T=20 must be at least 37, the number of tokens of the longest sentence"),
        ({"model.V": 5}, "V=5 is smaller than the 12 ids of pairs of logic"),
    ],
)
def test_data_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(PAIRS.replace(changes), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_only_decoders_have(pairs, tmp_path):
    with pytest.raises(ValueError, match="accumulate=2: a model of family='sut' needs all B sequences"):
        PAIRS.replace({"train.accumulate": 2})
    with pytest.raises(
        ValueError, match="fsdp=2 and tensor=2 must be 1: a model of family='sut' supports data parallelism only"
    ):
        make_mesh(PAIRS.replace({"mesh.fsdp": 2, "mesh.tensor": 2}))
    with pytest.raises(ValueError, match="no Hugging Face model_type fits a model of family='sut'"):
        export(load(pairs).model, str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"a classifier \(classes=7\) cannot generate text"):
        generate(load(pairs).model, [[1]], 1)


def test_the_configs_are_what_they_say(capsys):
    assert main(["configs/sut_logic.py", "--help"]) == 0
    assert "--model.halting_threshold=0.999" in capsys.readouterr().out
    assert main(["configs/sut_lm_tiny.py", "--model.halting_threshold=2"]) == 1
    assert "halting_threshold=2.0 must be above 0 and at most 1" in capsys.readouterr().err
