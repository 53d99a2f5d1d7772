"""Tasks of lm-evaluation-harness: requests are divided into tokens, scored and continued as in the harness.

Two tests compare the numbers with the harness's own backend for transformers. They need a second Python with torch,
transformers and lm_eval, which `torch_python` finds. The tests of `evaluate --tasks` need lm_eval in the Python that
runs the tests.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import stickjax
from benchmarks.train import torch_python
from stickjax import Config, DataConfig, ModelConfig
from stickjax.data.tokenizer import ByteTokenizer, load_tokenizer
from stickjax.evaluate import main
from stickjax.evaluation import harness, task_requests
from stickjax.evaluation.task_requests import (
    Pair,
    Sampling,
    cut,
    encoded_pair,
    first_token,
    log_likelihoods,
    prompt_room,
    rolling_pairs,
    sampling,
)  # fmt: skip
from stickjax.generate import generate
from stickjax.models.transformer import init
from stickjax.storage.run_folder import save

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")
SIZES = dict(D=24, L=2, N=4, K=2, H=8, F=20, init_std=0.6)
# The exported models: name: (model type, config fields, whether the tokenizer begins every text with a special token).
MODELS = {
    "llama": ("llama", dict(attention="softmax"), True),
    "stick_breaking": ("stickjax", dict(head_norm=True), False),
}
T = 48
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
{more}
"""
WORDS = """the rest of a Stick is left, and (then) it breaks: 3 parts = 2 + 1; who "Knows"? It's 7% of {it}!"""
TASKS = {
    "letters": """
output_type: multiple_choice
num_fewshot: 1
fewshot_split: test
doc_to_text: "{{text}}{{space}}"
target_delimiter: ""
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "documents": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "continued": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e", "o", "t\\n"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def model_of(**changes):
    config = ModelConfig(**SIZES | dict(V=257) | changes)
    return jax.jit(lambda: init(config, jax.random.key(3)))()


def with_begin(bpe: str, folder: Path) -> str:
    """Write a copy of a tokenizer.json that begins every text with the special token <s>, and return its path."""
    from tokenizers import Tokenizer, processors

    fast = Tokenizer.from_file(bpe)
    fast.add_special_tokens(["<s>"])
    begin = [("<s>", fast.token_to_id("<s>"))]
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=begin)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<|endoftext|>"}')
    return str(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def begun(bpe, tmp_path_factory):
    return with_begin(str(bpe), tmp_path_factory.mktemp("begun"))


@pytest.fixture(scope="module")
def folders(bpe, begun, tmp_path_factory):
    """Return {name: Hugging Face folder} of the `MODELS`."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for name, (kind, changes, begins) in MODELS.items():
        tokenizer = begun if begins else str(bpe)
        V = load_tokenizer(tokenizer).vocab_size
        save(root / f"{name}-run", model_of(V=V, **changes), Config(
            ModelConfig(**SIZES | dict(V=V) | changes), DataConfig(tokenizer=tokenizer, T=T)
        ))  # fmt: skip
        found[name] = root / name
        stickjax.export(stickjax.load(root / f"{name}-run"), found[name], type=kind)
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Return a folder with the files of the `TASKS`. Some texts are longer than T, and the words are random."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(3)  # some continuations are greedy
    words = WORDS.split()
    rows = []
    for row, size in enumerate((1, 3, 40, 2, 60, 5, 1, 2)):
        text = " ".join(draw.choices(words, k=size))
        # No lower-case letter is alone: it could be in one token with the last letter of the context.
        choices = [c for c in map(chr, range(33, 127)) if not c.islower()] + [" two words", "\nand more of them"]
        answer, space = draw.randrange(len(choices)), " " * (row % 4 == 3)
        rows.append({"text": text, "space": space, "choices": choices, "answer": answer})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, more in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=f"local_{name}", data=data, more=more))
    return folder


@pytest.fixture(scope="module")
def theirs(folders, tasks, tmp_path_factory):
    """Return what tests/torch_harness.py finds: {name of the model: {"scores": ..., "requests": ...}}."""
    python = torch_python()
    if python is None or subprocess.run([python, "-c", "import lm_eval"], capture_output=True).returncode:
        pytest.skip("needs torch, transformers and lm_eval: set TORCH_PYTHON to a Python that has them")
    root = tmp_path_factory.mktemp("theirs")
    environment = os.environ | {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    script, out = Path(__file__).with_name("torch_harness.py"), root / "out.json"
    words = [python, script, tasks, out, *folders.values()]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    return {name: found[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize("name", MODELS)
def test_requests_are_answered_as_by_transformers(theirs, folders, name):
    requests = theirs[name]["requests"]
    model = harness.HarnessModel(stickjax.load(folders[name]), generate, T)
    assert requests.keys() == {"loglikelihood", "loglikelihood_rolling", "generate_until"}
    for kind, rows in requests.items():
        found = getattr(model, kind)([SimpleNamespace(args=tuple(args)) for args, _ in rows])
        answers = [answer for _, answer in rows]
        if kind == "loglikelihood":
            greedy = [one for _, one in answers]
            assert [one for _, one in found] == greedy and any(greedy) and not all(greedy)
            found, answers = ([value for value, _ in each] for each in (found, answers))
        if kind == "generate_until":
            assert found == answers and any(map(len, answers))
        else:
            np.testing.assert_allclose(found, answers, rtol=1e-5, atol=1e-4)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # of the harness and its packages
def test_scores_are_the_ones_of_transformers(theirs, folders, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    names = ",".join(f"local_{name}" for name in TASKS)
    runs, out = list(map(str, folders.values())), tmp_path / "scores.json"
    assert main([*runs, "--tasks", names, "--tasks-path", str(tasks), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    for name in MODELS:
        assert found[name]["max_length"] == T and found[name]["tasks"].keys() == theirs[name]["scores"].keys()
        for task, scores in found[name]["tasks"].items():
            expected = {k: v for k, v in theirs[name]["scores"][task].items() if "," in k and v != "N/A"}
            assert scores.keys() == expected.keys() and scores
            for score, value in scores.items():
                np.testing.assert_allclose(value, expected[score], rtol=1e-4, err_msg=f"{name} {task} {score}")
    assert "local_letters" in (shown := capsys.readouterr().out) and "bits_per_byte" in shown and "llama" in shown


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_a_file_and_refuses_unknown_tasks(folders, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    run = f"{folders['llama']}-run"
    options = ["--tasks-path", str(tasks), "--limit", "2", "--num-fewshot", "0", "--max-length", "32"]
    assert main([run, "--tasks", str(tasks / "letters.yaml"), *options]) == 0
    record = json.loads(Path(run, "tasks.json").read_text())
    assert record["n-samples"]["local_letters"]["effective"] == 2 and record["max_length"] == 32
    assert record["n-shot"] == {"local_letters": 0}
    from lm_eval.tasks import TaskManager

    init_manager = TaskManager.__init__  # reading the files of all tasks of the harness takes long
    quick = lambda self, include_path=None, include_defaults=False: init_manager(  # noqa: E731
        self, include_path=include_path, include_defaults=False
    )
    monkeypatch.setattr(TaskManager, "__init__", quick)
    assert main([run, "--tasks", "local_leters", *options]) == 1
    assert "unknown task 'local_leters' (did you mean 'local_letters'?)" in capsys.readouterr().err
    assert main([run, "--tasks", "local_letters", "--tasks-path", str(tmp_path / "none")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text((tasks / "letters.yaml").read_text().replace("data.jsonl", "none.jsonl"))
    assert main([run, "--tasks", str(tmp_path / "broken.yaml")]) == 1
    assert "broken.yaml cannot be read: FileNotFoundError" in capsys.readouterr().err
    letters = (tasks / "letters.yaml").read_text()
    for name, text, more, said in (
        ("null.yaml", letters.replace("{{text}}", "{{missing.part}}"), [], "null.yaml cannot be read: UndefinedError"),
        ("many.yaml", letters, ["--num-fewshot", "999"], "many.yaml: ValueError: Sample larger than population"),
        ("room.yaml", (tasks / "continued.yaml").read_text(), ["--max-length", "9"], "up to 9 new tokens"),
        ("letters.yaml", letters, [f"--json={tmp_path / 'none' / 'a.json'}"], "none is not a folder; make it first"),
    ):
        (tmp_path / name).write_text(text)
        assert main([run, "--tasks", str(tmp_path / name), *more]) == 1, name
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and said in error, (name, error)
    (tmp_path / "zero.yaml").write_text(letters.replace("num_fewshot: 1", "num_fewshot: 0"))
    assert main([run, "--tasks", str(tmp_path / "zero.yaml"), "--limit=1", "--num-fewshot=1"]) == 0
    assert "local_letters has 0 solved examples in front of each question" in capsys.readouterr().err


def test_without_the_package(tmp_path, monkeypatch, capsys):
    save(tmp_path / "run", model_of(), Config(ModelConfig(**SIZES)))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main([str(tmp_path / "run"), "--tasks", "hellaswag"]) == 1
    assert "--tasks needs the package lm_eval: pip install 'stickjax[eval]'" in capsys.readouterr().err
    assert main([str(tmp_path / "run"), "--tasks", ","]) == 2
    assert "--tasks needs the name of a task" in capsys.readouterr().err
    assert main([str(tmp_path / "run"), "--tasks", "hellaswag", "--plot", "a.png"]) == 2
    assert "--plot and --filtered cannot be given with --tasks" in capsys.readouterr().err
    assert main([str(tmp_path / "run"), "--num-fewshot", "0"]) == 2
    assert "--num-fewshot is an option for --tasks" in capsys.readouterr().err


def test_a_tokenizer_with_more_ids_than_the_model():
    """If the tokenizer has more ids than the model, no task runs: an id without an embedding would give NaN."""
    pytest.importorskip("lm_eval")
    config = Config(ModelConfig(**SIZES, V=61), DataConfig(tokenizer="byte"))
    loaded = stickjax.storage.run_folder.Loaded(model_of(V=61), config, ByteTokenizer(), 0)
    with pytest.raises(ValueError, match="data.tokenizer='byte' has 257 ids, but the model has only V=61"):
        harness.run_tasks(loaded, ["any"], None, generate)


def test_pairs_of_texts(bpe, begun):
    tokenizer, other = load_tokenizer(str(bpe)), load_tokenizer(begun)
    begin = other.special_id("<s>")
    assert (first_token(ByteTokenizer()), first_token(tokenizer), first_token(other)) == (256, tokenizer.eot, begin)
    assert encoded_pair(ByteTokenizer(), "é  ", "b", 256) == Pair([195, 169], [32, 32, 98])
    assert encoded_pair(ByteTokenizer(), "", "b", 256) == Pair([256], [98])
    assert encoded_pair(ByteTokenizer(), "  ", "b", 256) == Pair([256], [32, 32, 98])
    whole = tokenizer.encode("the other one").tolist()
    pair = encoded_pair(tokenizer, "the ", "other one", tokenizer.eot)
    assert pair.context == tokenizer.encode("the").tolist() and sum(pair, []) == whole
    assert encoded_pair(other, "", "a", begin) == Pair([begin], [other.encode("a")[1]])
    assert encoded_pair(other, "", "<s>a", begin) == encoded_pair(other, "", "a", begin)
    assert encoded_pair(other, "a", "b", begin).context[0] == begin
    with pytest.raises(ValueError, match="the continuation 'k' of the context 'a stic' has no tokens of its own"):
        encoded_pair(tokenizer, "a stic", "k", tokenizer.eot)  # " stick" is one token


@pytest.mark.parametrize("length", range(12))
def test_rolling_pairs_predict_each_token_once(length):
    ids = list(range(65, 65 + length))
    pairs = list(rolling_pairs(ByteTokenizer(), bytes(ids).decode(), 4, 256))
    assert sum((pair.continuation for pair in pairs), []) == ids
    assert all(len(context) + len(continuation) == 5 for context, continuation in pairs[1:])
    assert all(pair.context == [256] for pair in pairs[:1])
    for (*_, before), (context, _) in zip(pairs, pairs[1:], strict=False):
        assert context == before[-len(context) :]


def test_log_likelihoods_are_sums_of_log_probabilities():
    """A pair is a context and its continuation. The pairs have several lengths, and some are too long for the model."""
    model, draw = model_of(), np.random.default_rng(0)
    pairs = [Pair(draw.integers(0, 257, a).tolist(), draw.integers(0, 257, b).tolist()) for a, b in
             ((1, 1), (3, 70), (90, 5), (1, 80), (60, 60), (5, 2))]  # fmt: skip
    logits = jax.jit(lambda tokens: model(tokens).logits)
    best = int(logits(np.array([[7, 8, 9]]))[0, -1].argmax())
    pairs.append(Pair([7, 8, 9], [best]))
    found = log_likelihoods(model, pairs, 80, batch_tokens=160)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        row = np.array(context + continuation)[-81:]
        p = np.asarray(jax.nn.log_softmax(logits(np.pad(row[:-1], (0, 81 - len(row)))[None])[0]))
        at = np.arange(len(row) - 1 - len(continuation), len(row) - 1)
        assert value == pytest.approx(p[at, continuation].sum(), rel=1e-5)
        assert greedy == (p[at].argmax(-1) == continuation).all()
    assert [greedy for _, greedy in found] == [False] * 6 + [True]
    with pytest.raises(ValueError, match="a continuation has 80 tokens, but the model reads at most 79 at once"):
        log_likelihoods(model, pairs, 79)


def test_prompts_are_continued_up_to_a_stop_string():
    """The answers are in the order of the requests, even if the requests are computed in another order.

    Requests with the same options are computed together, the longest prompts first.
    """
    loaded = stickjax.storage.run_folder.Loaded(model_of(), Config(ModelConfig(**SIZES)), ByteTokenizer(), 0)
    said = []
    model = harness.HarnessModel(loaded, generate, 30, said.append)
    prompts, options = ["a", "bcd" * 9, "c"], [dict(max_gen_toks=6), dict(max_gen_toks=6), dict(max_new_tokens=3)]
    ids = [np.frombuffer(text.encode(), np.uint8)[-24:] for text in prompts]  # 6 of 30 tokens are new
    rows = [generate(loaded.model, [own], n)[0] for own, n in zip(ids, (6, 6, 3), strict=True)]
    whole = [ByteTokenizer().decode(row) for row in rows]
    request = lambda text, options: SimpleNamespace(args=(text, options))  # noqa: E731
    assert model.generate_until([*map(request, prompts, options)]) == whole
    stop = whole[1][2]
    assert model.generate_until([request(prompts[1], options[1] | {"until": stop})]) == [whole[1].split(stop)[0]]
    assert said[0] == "continuing 3 prompts" and said[1].startswith("contexts that are too long: 1;")


def test_each_batch_draws_other_texts(monkeypatch):
    """If a task asks for several random texts for one prompt, the texts differ, even if they are in several batches."""
    monkeypatch.setattr(task_requests, "BATCH_TOKENS", 150)  # two prompts of 64 tokens, rounded up, with 8 new tokens
    loaded = stickjax.storage.run_folder.Loaded(model_of(), Config(ModelConfig(**SIZES)), ByteTokenizer(), 0)
    model = harness.HarnessModel(loaded, generate, 32)
    request = SimpleNamespace(args=("a", dict(do_sample=True, temperature=1.0, max_gen_toks=8)))
    assert len(set(model.generate_until([request] * 6))) == 6


def test_options_of_tasks():
    assert sampling({}) == Sampling(256, (), 0.0, None, None)
    assert sampling({"until": "\n", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "num_beams": 1}) == Sampling(
        5, ("\n",), 0.5, None, 0.9
    )
    with pytest.raises(ValueError, match="generation_kwargs has num_beams=4, which generate does not support"):
        sampling({"num_beams": 4})
    assert sampling({"temperature": 0.0, "top_p": 0.0, "top_k": -1}) == Sampling()
    assert sampling({"temperature": 1.0, "top_k": -1}).top_k is None
    with pytest.raises(ValueError, match="until=.7., but 7 is not a string"):
        sampling({"until": [7]})
    assert cut("abcabc", ["ca", "b"]) == "a" and cut("abc", []) == "abc"
    assert cut("foo Q:\nbar", ["\n", "Q:\n"]) == "foo Q:"  # as in the harness, the first string cuts first
    with pytest.raises(ValueError, match="up to 6 new tokens, but the model reads at most 6 tokens"):
        prompt_room(6, 6)
