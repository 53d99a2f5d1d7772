"""Models from Hugging Face folders give the original code's logits, greedy tokens, losses and gradients."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FORWARD, assert_close

import stickjax
from stickjax.config import ModelConfig
from stickjax.convert import in_memory
from stickjax.generate import generate
from stickjax.models import transformer
from stickjax.models.families import family_of
from stickjax.models.router import router_stats
from stickjax.storage.hugging_face import names

ORACLES = Path(__file__).parent / "oracles"
FOLDERS = sorted(path.parent for kind in ("hf", "moduleformer") for path in ORACLES.glob(f"{kind}/*/config.json"))
# Folders that differ in kind. Every layer and router loss of the originals is in one of them; jetmoe has a linear gate.
GRADIENTS = (
    "multihead", "gmm_gate", "switch_loss", "jetmoe", "granitemoeshared", "qwen3_moe",
    "stickbreaking_attn_norm_bias_current_tied", "llama3_rope_tied",
)  # fmt: skip
GREEDY = "jetmoe", "granitemoeshared", "qwen3_moe", "stickbreaking_attn_norm_bias_current_tied", "granite_tied"
EXHAUSTIVE = {
    "test_losses_and_gradients_are_the_originals": lambda folder: folder.name not in GRADIENTS,
    "test_greedy_tokens_are_the_originals": lambda folder: folder.name not in GREEDY,
}
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def loaded():
    """Return a function from a test folder to its loaded model; every folder is loaded once.

    The ops use the reference implementation, which compiles fastest. Other tests compare the other implementations with
    it.
    """
    models, changes = {}, {"model.implementation": "reference"}
    return lambda folder: models.setdefault(folder, stickjax.load(folder, changes=changes))


@jax.jit
def logits(model, tokens, segment_ids):
    return model(tokens, segment_ids).logits


@each_folder
def test_logits_are_the_originals(loaded, folder):
    expected, model = np.load(folder / "expected.npz"), loaded(folder).model
    tokens, mask = expected["input_ids"], expected.get("attention_mask")
    assert_close(logits(model, tokens, np.zeros_like(tokens)), expected["logits"], FORWARD["float32"])
    if mask is None:  # the original has no padding: a padded row must have the logits of the row alone
        mask = np.ones_like(tokens)
        mask[0, :5] = 0
        alone = logits(model, tokens[:1, 5:], np.zeros_like(tokens[:1, 5:]))
        assert_close(logits(model, tokens, mask - 1)[:1, 5:], alone, FORWARD["float32"])
        return
    assert not mask.all() and mask[:, -1].all()  # padded on the left
    padded = logits(model, tokens, mask - 1)
    assert_close(padded[mask > 0], expected["logits_left_padded"][mask > 0], FORWARD["float32"])


@pytest.mark.parametrize("name", ["moduleformer/multihead", "hf/jetmoe"])
def test_so_are_those_of_the_ops_that_a_cpu_runs(name):
    expected, model = np.load(ORACLES / name / "expected.npz"), stickjax.load(ORACLES / name).model
    tokens = expected["input_ids"]
    assert model.config.implementation is None
    assert_close(logits(model, tokens, np.zeros_like(tokens)), expected["logits"], FORWARD["float32"])


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.parent.name == "hf"], ids=lambda path: path.name)
def test_greedy_tokens_are_the_originals(loaded, folder):
    expected = np.load(folder / "expected.npz")
    tokens = expected["input_ids"]
    T = tokens.shape[1]
    assert generate(loaded(folder).model, tokens, 12) == expected["greedy"][:, T:].tolist()


def of_all_routers(*repeats):
    """Return a replacement of `router_stats` that computes the load-balancing loss as transformers does.

    transformers averages the routed rows and the probabilities over all routers, and then computes one loss.

    `repeats` says how often transformers counts each kind of router. transformers counts the routers of JetMoE's
    attention twice, because both the attention and the router record the logits.
    """
    seen = []

    def stats(sums):
        seen.append(sums)
        if len(seen) < len(repeats):
            return router_stats(sums)._replace(switch=jnp.zeros(len(sums.tokens)))
        counted = [kind for kind, n in zip(seen, repeats, strict=True) for _ in range(n)]
        every = jax.tree.map(lambda *kinds: jnp.concatenate(kinds), *counted)
        (L, E), tokens = sums.rows.shape, sums.tokens[0]
        switch = E * (every.rows.mean(0) / tokens * every.probability.mean(0) / tokens).sum()
        seen.clear()
        return router_stats(sums)._replace(switch=jnp.full(L, switch / L))

    return stats


def each_expert(model_type, arrays):
    """Return `arrays`, {name in transformers 5: array}, in the published layout of `model_type`.

    transformers 5 has one array for all experts. mixtral, qwen3_moe and olmoe are published with one array per expert.
    """
    if model_type not in ("mixtral", "qwen3_moe", "olmoe"):
        return arrays
    found, parts = {}, ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, x in arrays.items():
        name = name.replace("mlp", "block_sparse_moe") if model_type == "mixtral" else name
        if name.endswith("gate_up_proj"):
            pairs = zip(parts, np.split(x, 2, axis=1), strict=False)
        elif name.endswith("experts.down_proj"):
            pairs = [(parts[2], x)]
        else:
            pairs, found[name] = [], x
        found |= {f"{name.rpartition('.')[0]}.{e}.{part}.weight": y[e] for part, y in pairs for e in range(len(x))}
    return found


@each_folder
def test_losses_and_gradients_are_the_originals(loaded, folder, monkeypatch):
    model, config, *_ = loaded(folder)
    expected = np.load(folder / "expected.npz")
    tree, tokens = json.loads((folder / "config.json").read_text()), expected["input_ids"]
    if folder.parent.name == "hf":
        # The weight of the router loss in transformers. The stored gradients of some folders do not have this loss.
        weight = sum(x.switch_weight for x in config.model.mixtures().values()) * config.model.L
        weight = 0.0 if "cross_entropy" in expected or not weight else weight / config.model.experts.k
        config = config.replace({f"model.{name}.switch_weight": weight for name in config.model.mixtures()})
        weighted = jax.eval_shape(lambda: family_of(config.model).init(config.model, jax.random.key(0)))
        model = jax.tree.unflatten(jax.tree.structure(weighted), jax.tree.leaves(model))
        repeats = (1, 2) if config.model.attention_experts.E else (1,)
        monkeypatch.setattr(transformer, "router_stats", of_all_routers(*repeats))
    m = config.model
    # All tokens go through the routers. All tokens but the first are targets.
    mask = np.ones_like(tokens)
    mask[:, -1] = 0
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_mask": mask}
    run = jax.jit(jax.value_and_grad(lambda model: family_of(config.model).loss(model, batch, None), has_aux=True))
    (loss, metrics), gradient = run(model)
    assert_close(loss, expected["cross_entropy" if "cross_entropy" in expected else "loss"], FORWARD["float32"])
    if "aux_loss" in expected:
        x = m.experts
        kinds = {"switch": x.switch_weight, "z": x.z_weight, "mutual_information": x.mi_weight}
        parts = [metrics[f"{p}{n}"] * w for p in ("", "attention_") for n, w in kinds.items() if f"{p}{n}" in metrics]
        assert_close(m.L * sum(parts) / max(kinds.values()), expected["aux_loss"], 1e-5)
    theirs = names.tensors_from_leaves(names.table(tree["model_type"], m), m, in_memory(gradient))
    wanted = {n.removeprefix("grad/"): expected[n] for n in expected if n.startswith("grad/")}
    wanted = {names.published(n): x for n, x in each_expert(tree["model_type"], wanted).items()}
    assert len(wanted) > 8
    for name, value in wanted.items():
        assert_close(theirs[name].read(None), value, 1e-4, name)


def test_a_row_whose_axes_do_not_fit_is_refused(monkeypatch):
    """A row of the tensor-name table gives an error if its axes differ from the axes of the parameter it names.

    With wrong axes, a part of the parameter would not be filled.
    """
    c = ModelConfig(V=16, D=8, L=1, N=2, K=1, H=4, F=16, attention="softmax")
    rows = names.TABLES["granite"](c)
    query = next(i for i, row in enumerate(rows) if row.ours.endswith("query"))
    for change, message in (
        (
            dict(axes="K D"),
            "the table row for .* has the axes 'K D', but the parameter blocks/attention/query has the axes 'D N H'",
        ),
        (dict(ours="blocks/attention/qery"), "has an unknown parameter .* .did you mean 'blocks/attention/query'"),
    ):
        wrong = [*rows[:query], rows[query]._replace(**change), *rows[query + 1 :]]
        monkeypatch.setitem(names.TABLES, "granite", lambda _, wrong=wrong: wrong)
        with pytest.raises(ValueError, match=message):
            names.table("granite", c)
    with pytest.raises(ValueError, match="model_type='granit' is not one of .* .did you mean 'granite'"):
        names.table("granit", c)
