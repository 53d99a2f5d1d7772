"""Test text generation: decoding with the cache equals the full forward pass, and samples follow the distribution.

Streamed text is complete: no character is cut, and no stop string is shown.
"""

import dataclasses
import doctest
import io
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stickjax.generate
from stickjax import Config, ModelConfig
from stickjax.config import ExpertsConfig
from stickjax.config.decoder import MODULE_ROUTER, MODULES
from stickjax.data.tokenizer import ByteTokenizer, load_tokenizer
from stickjax.evaluation.length_buckets import padded_length
from stickjax.generate import _advance, generate, generate_text, main
from stickjax.models.transformer import init
from stickjax.storage.checkpoints import Checkpoints
from stickjax.storage.run_config import write_config
from stickjax.storage.run_folder import Loaded

SMALL = dict(V=61, D=32, L=2, N=4, K=4, H=8, F=48)
TINY = dict(V=24, D=16, L=1, N=2, K=2, H=4, F=16)


def random_model(std=0.5, **changes):
    """Return a tiny model whose parameters are all random, also the ones that training starts from 0 or 1.

    NumPy draws them from a normal distribution with standard deviation `std`. `changes` are fields of ModelConfig.
    """
    abstract = jax.eval_shape(lambda: init(ModelConfig(**SMALL | changes), jax.random.key(0)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(std * rng.standard_normal(x.shape), x.dtype), abstract)


def random_prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 20, n) for n in lengths]


@jax.jit
def logits_of(model, tokens):
    return model(tokens).logits


@pytest.fixture(scope="module")
def model():
    return random_model(**TINY)


@pytest.mark.parametrize(
    "changes, lengths",
    [
        (dict(), (1, 17, 70)),  # padded to 128 tokens: by 127 to 58 tokens
        (dict(experts=ExpertsConfig(4, 2), remainder="value", attend_current=True, tied=False, remat="full"), (3, 9)),
        pytest.param(dict(attention="softmax", K=2), (1, 17, 5), marks=pytest.mark.exhaustive),
        (dict(attention="softmax", experts=ExpertsConfig(4, 2), window=6), (3, 9)),
        (dict(skip_below=-20.0, K=2), (300, 290)),  # longer than a key tile, so that a tile is skipped
        (dict(remainder="bias", head_norm=True, K=2, window=6), (1, 17, 5)),
        # A ModuleFormer whose keys are its values.
        (
            MODULES
            | dict(
                N=2,
                K=1,
                H=32,
                key_value="input",
                experts=ExpertsConfig(4, 2, hidden=8, **MODULE_ROUTER),
                attention_experts=ExpertsConfig(3, hidden=8, **MODULE_ROUTER),
            ),
            (1, 17, 5),
        ),
    ],
    ids=str,
)
def test_greedy_decoding_is_the_argmax_of_the_full_forward_pass(changes, lengths):
    model, prompts = random_model(**changes), random_prompts(*lengths)
    news = generate(model, prompts, 12)
    rows = [np.concatenate([p, new]).astype(np.int32) for p, new in zip(prompts, news, strict=True)]
    # Padding on the right has no effect in a causal model.
    tokens = np.stack([np.pad(row, (0, max(map(len, rows)) - len(row))) for row in rows])
    logits = np.asarray(logits_of(model, tokens))
    for row, prompt, new in zip(logits, prompts, news, strict=True):
        steps = row[len(prompt) - 1 :][:12]
        best = np.sort(steps, axis=1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-3, "a tie would prove nothing"
        assert steps.argmax(1).tolist() == new
    assert len({tuple(new) for new in news}) == len(news)


def test_few_candidates_or_little_heat_are_greedy(model):
    prompts = random_prompts(*range(1, 21))
    greedy = generate(model, prompts, 1)
    for options in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-40)):
        assert generate(model, prompts, 1, **dict(temperature=2.0) | options) == greedy, options
    compiled = _advance._cache_size()
    assert generate(model, prompts, 1, top_k=3, top_p=0.5) == greedy  # at temperature 0, top_k and top_p have no effect
    assert _advance._cache_size() == compiled


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.7),
        dict(temperature=2.0, vocab_size=20),
        dict(temperature=2.0, top_k=1000, top_p=0.6),
        dict(temperature=2.0, top_k=12, top_p=0.8),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(model, options):
    rows, prompt = 2048, random_prompts(5)[0]
    drawn = np.array(generate(model, [prompt] * rows, 1, seed=3, **options))[:, 0]
    logits = np.asarray(logits_of(model, prompt[None].astype(np.int32)), np.float64)[0, -1]
    p = np.exp(logits / options["temperature"])
    p[options.get("vocab_size", 24) :] = 0
    order = np.argsort(-p)
    p[order[options.get("top_k", 24) :]] = 0
    p /= p.sum()
    mass = np.cumsum(p[order])
    p[order[np.searchsorted(mass, options.get("top_p", 1.0)) + 1 :]] = 0
    p /= p.sum()
    counts, support = np.bincount(drawn, minlength=24), p > 0
    assert counts[~support].sum() == 0
    common = p * rows >= 5
    expected = np.append(p[common], p[~common].sum()) * rows
    found = np.append(counts[common], counts[~common].sum())
    freedom = len(expected) - 1
    assert freedom >= 3
    chi2 = ((found - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom), (chi2, freedom)


def test_a_row_depends_on_no_other_row_and_equal_seeds_are_equal(model):
    a, b, c, x, y = random_prompts(4, 11, 2, 30, 1)
    options = dict(temperature=1.0, seed=5)
    batch = generate(model, [a, b, c], 10, **options)
    assert generate(model, [a], 10, **options) == batch[:1]
    assert generate(model, [x, b, y], 10, **options)[1] == batch[1]
    assert generate(model, [a, b, c], 10, **options) == batch
    assert generate(model, [a, b, c], 10, **options | {"seed": 6}) != batch
    first, second = generate(model, [a, a], 10, **options)
    assert first != second


def test_lengths_of_one_bucket_are_compiled_once(model):
    generate(model, random_prompts(3), 20)
    compiled = _advance._cache_size()
    for length, more in ((1, 5), (40, 30), (64, 64)):
        generate(model, random_prompts(length), more)
    generate(model, random_prompts(3), 20, temperature=0.5)
    at_heat = _advance._cache_size()
    generate(model, random_prompts(3), 20, temperature=0.7, seed=4)
    assert _advance._cache_size() == at_heat <= compiled + 2
    sizes = [padded_length(n) for n in range(1, 5000)]
    assert all(n <= size < 1.25 * n + 64 for n, size in enumerate(sizes, 1)) and len(set(sizes)) < 24


def test_rows_end_at_eot_or_when_asked_and_the_run_ends_with_the_last_row(model, monkeypatch):
    calls = []
    monkeypatch.setattr(stickjax.generate, "_advance", lambda *a, **k: calls.append(a) or _advance(*a, **k))
    prompts, options = random_prompts(4, 11), dict(temperature=1.0, seed=1)
    free = generate(model, prompts, 30, **options)
    assert len(calls) == 30 and [len(row) for row in free] == [30, 30]

    calls.clear()
    eot = next(t for t in free[0] if t in free[1] and free[0].index(t) != free[1].index(t))
    seen = []
    ended = generate(model, prompts, 30, eot=eot, on_token=lambda *a: seen.append(a), **options)
    assert ended == [row[: row.index(eot) + 1] for row in free]
    assert [[t for r, t in seen if r == row] for row in (0, 1)] == ended
    assert len(calls) <= max(map(len, ended)) + 1 < 30

    ended = generate(model, prompts, 30, on_token=lambda row, token: token == eot, **options)
    assert ended == [row[: row.index(eot) + 1] for row in free]


def test_empty_prompts(model):
    assert generate(model, [], 5) == []
    assert generate(model, [[], [7]], 5, eot=7)[0] == generate(model, [[7]], 5, eot=7)[0]
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        generate(model, [[1], []], 5)


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([24], {}, r"prompts\[0\] has ids from 24 to 24, but ids must be at least 0 and below 24"),
        ([0, -1], {}, "ids must be at least 0"),
        ([0, 20], dict(vocab_size=20), "and below 20"),
        ([0.5], {}, r"not float64\[1\]"),
        ([[1, 2]], {}, r"not int64\[1, 2\]"),
        (3, {}, r"not int64\[\]"),
        ([1], dict(max_new_tokens=0), "max_new_tokens=0"),
        ([1], dict(temperature=-1.0), "temperature=-1.0"),
        ([1], dict(temperature=float("nan")), "temperature=nan"),
        ([1], dict(temperature=float("inf")), "temperature=inf"),
        ([1], dict(top_k=0), "top_k=0"),
        ([1], dict(top_p=0.0), "top_p=0.0"),
        ([1], dict(top_p=1.5), "top_p=1.5"),
        ([1], dict(seed=-1), "seed=-1 must be at least 0"),
        ([1], dict(seed=2**64), "seed=18446744073709551616 must be .* at most"),
    ],
    ids=str,
)
def test_bad_input_is_a_value_error(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [prompt], **dict(max_new_tokens=2) | options)


# A model that recites a text: its embedding is the identity, and its output matrix maps each byte to the next one.


def reciting(text: str, V: int = 257) -> Loaded:
    config = Config(ModelConfig(V=V, D=257, L=1, N=1, K=1, H=4, F=4, m_res=1e-6, tied=False))
    model, ids = random_model(**dataclasses.asdict(config.model)), [*text.encode(), 256]
    assert len(set(ids)) == len(ids), "every byte may occur once, because it has only one successor"
    table = np.zeros((257, V), np.float32)
    table[ids[:-1], ids[1:]] = 1
    model.norm.scale = type(model.norm.scale)(jnp.ones(257))
    model.embed = type(model.embed)(jnp.eye(V, 257))
    model.unembed = type(model.unembed)(jnp.asarray(table))
    return Loaded(model, config, ByteTokenizer(), 1)


RECITED = "aébc→d.e😀f"


@pytest.fixture(scope="module")
def reciter():
    return reciting(RECITED)


@pytest.mark.parametrize(
    "stop, shown",
    [
        ([], "ébc→d.e😀f"),
        (["d.e"], "ébc→"),
        (["→d.x", "."], "ébc→d"),  # text that only begins like a stop string is shown
        (["e😀f!"], "ébc→d.e😀f"),
        (["d.", "c→d."], "éb"),  # both stop strings are complete at the same byte
        (["c→d.e", "→d"], "ébc"),  # the stop string that is complete first counts
        (["é"], ""),
        (["f"], "ébc→d.e😀"),
    ],
    ids=str,
)
def test_text_streams_in_whole_characters_without_stop_strings(reciter, stop, shown):
    pieces = []
    texts = generate_text(reciter, ["a", "xa"], 40, stop=stop, on_text=lambda *piece: pieces.append(piece))
    assert texts == [shown, shown]
    for row in (0, 1):
        own = [piece for r, piece in pieces if r == row]
        assert "".join(own) == shown and "" not in own and not any("\ufffd" in piece for piece in own)


def test_a_character_cut_by_the_limit_is_dropped(reciter):
    whole = "ébc→d.e😀f".encode()
    for limit in range(1, len(whole)):
        assert generate_text(reciter, ["a"], limit) == [whole[:limit].decode(errors="ignore")]
    assert generate_text(reciter, ["a"], 1, stop=["éb"]) == [""]
    assert generate_text(reciter, ["a"], 2, stop=["éb"]) == ["é"]  # an incomplete stop string is part of the text


def test_ids_the_tokenizer_lacks_are_never_chosen():
    loaded = reciting("ab", V=300)
    drawn = generate(loaded.model, [[97]] * 512, 1, temperature=50.0, vocab_size=257)
    assert max(max(drawn)) <= 256 < max(max(generate(loaded.model, [[97]] * 512, 1, temperature=50.0)))
    table = np.asarray(loaded.model.unembed[...]).copy()
    table[97, 299] = 9
    loaded.model.unembed = type(loaded.model.unembed)(jnp.asarray(table))
    assert generate(loaded.model, [[97]], 1) == [[299]]
    assert generate_text(loaded, ["a"], 1) == ["b"]


def test_an_empty_text_begins_with_the_end_of_text(reciter):
    ids = generate(reciter.model, [[256]], 3, vocab_size=257)[0]
    assert generate_text(reciter, [""], 3) == [bytes(ids).decode(errors="replace").rstrip("\ufffd")]
    for wrong, message in (
        (dict(prompts="ab"), "lists of strings"),
        (dict(prompts=["a"], stop="x"), "lists of strings"),
        (dict(prompts=["a"], stop=[""]), "no stop string may be empty"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_text(reciter, **wrong)


# Tokenizers other than `byte`.


def of_letters(tmp_path, end="</s>", **files):
    """Write a tokenizer.json with a token for each of the letters a to f, and return the loaded tokenizer.

    Encoded texts begin with <s> and a space. Decoding removes both.

    Args:
      end: the end-of-text token.
      files: the content of further JSON files in the folder, by name without `.json`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = ["<unk>", "<s>", end, "<|user|>", "\u2581", *"abcdef"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    replaced = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence([replaced, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:4]])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name, tree in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    return load_tokenizer(str(tmp_path / "tokenizer.json"))


def reciting_ids(tokenizer, *chains) -> Loaded:
    """Return a model that continues each token with a fixed next token.

    `chains` are lists of token ids, in which each id is followed by the id that the model predicts after it.
    """
    model, table = reciting("ab").model, np.zeros((257, 257), np.float32)
    for chain in chains:
        table[chain[:-1], chain[1:]] = 1
    model.unembed = type(model.unembed)(jnp.asarray(table))
    return Loaded(model, reciting("ab").config, tokenizer, 1)


def test_a_prompt_begins_as_its_tokenizer_says_and_its_text_goes_on(tmp_path, monkeypatch):
    tokenizer = of_letters(tmp_path)
    loaded = reciting_ids(tokenizer, [1, 9], [5, 4, 6, 7, 3, 8, 2])  # "a" -> " bc<|user|>d", then </s>
    prompts = []
    monkeypatch.setattr(stickjax.generate, "generate", lambda model, ids, *a, **k: prompts.extend(ids) or [])
    generate_text(loaded, ["a", "", "<|user|>a"])
    generate_text(loaded, ["<|user|>a"], special_tokens=True)
    assert [ids.tolist() for ids in prompts] == [[1, 4, 5], [1], [1, 4, *[0] * 4, 9, *[0] * 3, 5], [1, 3, 4, 5]]
    monkeypatch.undo()
    assert generate_text(loaded, ["a"]) == [" bcd"], "the space after the prompt is kept"
    assert generate_text(loaded, ["a"], stop=["<|user|>"]) == [" bc"]
    assert generate_text(loaded, [""], 1) == ["e"], "an empty prompt begins like a document"


def test_each_of_several_ends_ends_a_text(tmp_path):
    tokenizer = of_letters(tmp_path, end="<|im_end|>", generation_config={"eos_token_id": [2, 7]})
    loaded = reciting_ids(tokenizer, [5, 4, 6, 7, 8], [9, 10, 2, 8])
    assert tokenizer.eot == 2 and generate_text(loaded, ["a", "e"], 9) == [" b", "f"]


def test_a_cache_beyond_all_memory_is_one_line(model, reciter):
    for n in (10**12, 10**30):
        with pytest.raises(ValueError, match=r"takes [\d,.]+ .iB, but [\d.]+ .iB are .*; use a smaller max_"):
            generate(model, [[1]], n)


# The command line.


@pytest.fixture(scope="module")
def run(tmp_path_factory, reciter):
    folder = tmp_path_factory.mktemp("runs") / "recite"
    write_config(folder, reciter.config)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, {"params": reciter.model, "step": jnp.int32(7)}, {})
    return str(folder)


def test_command_line(run, capsys, monkeypatch, tmp_path):
    greedy = ["--temperature", "0"]
    assert main([run, "--prompt", "a", *greedy]) == 0
    assert capsys.readouterr() == ("ébc→d.e😀f\n", "")
    assert main([run, "--prompt", "a", "--prompt", "b", *greedy, "--max-new-tokens", "2", "--step", "7"]) == 0
    assert capsys.readouterr().out == "--- prompt 0\né\n--- prompt 1\nc\n"
    (tmp_path / "prompt").write_text("xé")
    assert main([run, "--prompt-file", str(tmp_path / "prompt"), *greedy, "--stop", "e", "--stop", "→d"]) == 0
    assert capsys.readouterr().out == "bc\n"
    (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbfa")
    assert main([run, "--prompt-file", str(tmp_path / "prompt"), *greedy]) == 0
    assert capsys.readouterr().out == "ébc→d.e😀f\n"
    (tmp_path / "prompt").write_bytes(b"a\xff")
    assert main([run, "--prompt-file", str(tmp_path / "prompt"), *greedy]) == 1
    assert capsys.readouterr().err.endswith("/prompt is not UTF-8 text: invalid start byte at byte 1\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("b"))
    changes = ["--set", "model.window=3", "--set", "model.skip_below=-20"]
    assert main([run, *changes, "--top-k", "1", "--top-p", "0.9"]) == 0
    assert capsys.readouterr().out == "c→d.e😀f\n"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--temperature -1", "temperature=-1.0"),
        ("--temperature hot", "invalid float value: 'hot'"),
        ("--top-p 0", "top_p=0.0 must be above 0"),
        ("--top-p 1.1", "top_p=1.1"),
        ("--top-k 0", "top_k=0"),
        ("--max-new-tokens 0", "max_new_tokens=0"),
        ("--stop=", "no stop string may be empty"),
        ("--step 8", "no checkpoint of step 8"),
        ("--set model.windw=3", "did you mean 'model.window'"),
        ("--set model.window", "needs a value"),
        ("--set model.D=64", "was .* saved with another config"),
        ("--prompt-file nowhere", "No such file"),
        ("--prompt-file /dev/null/x", "Not a directory"),
        ("--max-tokens 9", r"unknown option --max-tokens \(did you mean '--max-new-tokens'\?\)"),
    ],
)
def test_bad_command_lines_are_one_line(run, capsys, words, message):
    source = [] if "--prompt-file" in words else ["--prompt", "a"]
    assert main([run, *source, *words.split(" ")]) == (2 if "nvalid" in message or "unknown" in message else 1)
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)


def test_folders_that_are_no_runs(tmp_path, capsys):
    assert main([str(tmp_path), "--prompt", "a"]) == 1
    assert "is neither a run folder" in capsys.readouterr().err
    write_config(tmp_path, Config())
    assert main([str(tmp_path), "--prompt", "a"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} has no checkpoint yet\n"


def test_a_terminal_shows_the_characters_that_it_has(run, monkeypatch):
    for encoding, shown in (("ascii", "?bc?d.e?f"), ("latin-1", "ébc?d.e?f")):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr("sys.stdout", terminal)
        assert main([run, "--prompt", "a", "--temperature", "0"]) == 0
        assert terminal.buffer.getvalue().decode(encoding) == shown + "\n"


def test_the_module_runs_as_a_program(run):
    command = [sys.executable, "-m", "stickjax.generate", run, "--prompt", "a", "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, timeout=100)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "ébc→d.e😀f\n", b"")


def test_docstrings():
    assert doctest.testmod(stickjax.generate).failed == 0
