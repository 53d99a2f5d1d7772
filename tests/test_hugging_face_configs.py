"""Every supported entry of config.json has the effect that it has in the original model.

Each entry has a value other than its default. NumPy versions of the original models give the expected logits.
"""

import json
import math

import numpy as np
import pytest
from conftest import FORWARD, assert_close
from hugging_face_trees import MORE_TREES
from safetensors.numpy import save_file

import stickjax
from stickjax.config import ExpertsConfig
from stickjax.config.decoder import ModelConfig
from stickjax.storage.hugging_face import configs, entries, names
from stickjax.storage.hugging_face.configs import to_config_json, to_model_config

GRANITE = dict(
    model_type="granite", vocab_size=23, hidden_size=12, num_hidden_layers=2, intermediate_size=10,
    num_attention_heads=4, num_key_value_heads=2, head_dim=6, rms_norm_eps=0.05, rope_theta=30.0,
    tie_word_embeddings=False, embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.7,
    logits_scaling=2.5, max_position_embeddings=48,
)  # fmt: skip
GRANITEMOE = GRANITE | dict(
    model_type="granitemoe", num_local_experts=5, num_experts_per_tok=3, tie_word_embeddings=True,
    router_aux_loss_coef=0.01,
)  # fmt: skip
JETMOE = dict(
    model_type="jetmoe", vocab_size=23, hidden_size=12, num_hidden_layers=2, intermediate_size=10,
    num_key_value_heads=2, kv_channels=6, num_local_experts=5, num_experts_per_tok=3, rms_norm_eps=0.05,
    rope_parameters={"rope_type": "default", "rope_theta": 30.0}, tie_word_embeddings=False,
    max_position_embeddings=48, aux_loss_coef=0.05,
)  # fmt: skip
MODULEFORMER = dict(
    model_type="moduleformer", vocab_size=23, n_embd=12, n_layer=2, n_head=2, att_hidden=10, k_att=2, k_mlp=3,
    n_att_experts=4, n_mlp_experts=5, ffd_hidden=14, gate_type="mlp", gating_size=7, layer_norm_epsilon=0.05,
    aux_loss_type="switch", aux_loss_weight=0.25, sample_topk=1, block_size=48,
)  # fmt: skip
TREES = {tree["model_type"]: tree for tree in (GRANITE, GRANITEMOE, JETMOE, MODULEFORMER)}
# The values that transformers uses for missing entries.
DEFAULTS = dict(
    rms_norm_eps=1e-6, rope_theta=1e4, embedding_multiplier=1.0, residual_multiplier=1.0, attention_multiplier=1.0,
    logits_scaling=1.0,
)  # fmt: skip


# The original models in NumPy, for one sequence


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms(x, w, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w


def layer_norm(x, w, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def turn(x, theta):
    """Return x [T, heads, H] rotated by rotary position embeddings with base `theta`."""
    T, _, H = x.shape
    angle = np.arange(T)[:, None, None] * theta ** -(np.arange(H // 2) / (H // 2))
    a, b = x[..., : H // 2], x[..., H // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def attend(q, k, v, scale, stick_breaking=False):
    """Return the output of causal attention, [T, N, H]; q, k and v are [T, N, H], and query head n uses key head n.

    It is softmax attention or, if `stick_breaking`, stick-breaking attention in which each token also attends to
    itself.
    """
    T, out = len(q), np.zeros_like(q)
    for n in range(q.shape[1]):
        z = scale * q[:, n] @ k[:, n].T
        for i in range(T):
            if stick_breaking:
                p = [sigmoid(z[i, j]) * np.prod(1 - sigmoid(z[i, j + 1 : i + 1])) for j in range(i + 1)]
            else:
                p = softmax(z[i, : i + 1])
            out[i, n] = np.array(p) @ v[: i + 1, n]
    return out


def chosen(logits, k, over_all=False):
    """Return for each token a list of k pairs (expert, gate), the largest logit first; `logits` are [T, E].

    The gates are a softmax over the k chosen experts or, if `over_all`, over all experts.
    """
    best = np.argsort(-logits, axis=-1)[:, :k]
    gates = softmax(logits) if over_all else softmax(np.where(logits >= np.sort(logits)[:, -k, None], logits, -np.inf))
    return [[(e, gates[t, e]) for e in row] for t, row in enumerate(best)]


def gated(x, w_in, w_out):
    gate, up = np.split(w_in @ x, 2)
    return w_out @ (gate * sigmoid(gate) * up)


def experts(x, w, name, k):
    routed = chosen(x @ w[f"{name}.router.layer.weight"].T, k)
    w_in, w_out = w[f"{name}.input_linear.weight"], w[f"{name}.output_linear.weight"]
    return np.array([sum(g * gated(x[t], w_in[e], w_out[e]) for e, g in row) for t, row in enumerate(routed)])


def granite(c, w, tokens):
    N, K, H, theta = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["rope_theta"]
    x = c["embedding_multiplier"] * w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        layer, eps = f"model.layers.{i}", c["rms_norm_eps"]
        h = rms(x, w[f"{layer}.input_layernorm.weight"], eps)
        q, k, v = (h @ w[f"{layer}.self_attn.{n}_proj.weight"].T for n in "qkv")
        q, (k, v) = turn(q.reshape(-1, N, H), theta), (m.reshape(-1, K, H) for m in (k, v))
        k, v = (np.repeat(m, N // K, 1) for m in (turn(k, theta), v))
        y = attend(q, k, v, c["attention_multiplier"]).reshape(len(x), -1) @ w[f"{layer}.self_attn.o_proj.weight"].T
        x = x + c["residual_multiplier"] * y
        h = rms(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        if c["model_type"] == "granitemoe":
            y = experts(h, w, f"{layer}.block_sparse_moe", c["num_experts_per_tok"])
        else:
            gate, up, down = (w[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            y = np.array([gated(row, np.concatenate([gate, up]), down) for row in h])
        x = x + c["residual_multiplier"] * y
    head = w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return rms(x, w["model.norm.weight"], c["rms_norm_eps"]) @ head.T / c["logits_scaling"]


def jetmoe(c, w, tokens):
    K, H, k = c["num_key_value_heads"], c["kv_channels"], c["num_experts_per_tok"]
    theta, x = c["rope_parameters"]["rope_theta"], w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        layer, heads = f"model.layers.{i}", f"model.layers.{i}.self_attention.experts"
        h = rms(x, w[f"{layer}.input_layernorm.weight"], 1e-6)
        routed = chosen(h @ w[f"{heads}.router.layer.weight"].T, k)
        w_in, w_out = w[f"{heads}.input_linear.weight"], w[f"{heads}.output_linear.weight"]
        q = np.array([[w_in[e] @ h[t] for e, _ in row] for t, row in enumerate(routed)])
        key, value = np.split(h @ w[f"{layer}.self_attention.kv_proj.weight"].T, 2, axis=-1)
        q, key = turn(q.reshape(-1, k * K, H), theta), turn(key.reshape(-1, K, H), theta)
        value = value.reshape(-1, K, H)
        o = attend(q, np.tile(key, (1, k, 1)), np.tile(value, (1, k, 1)), H**-0.5).reshape(len(x), k, K * H)
        y = [sum(g * w_out[e] @ o[t, s] for s, (e, g) in enumerate(row)) for t, row in enumerate(routed)]
        x = x + np.array(y) + w[f"{heads}.bias"]
        h = rms(x, w[f"{layer}.post_attention_layernorm.weight"], 1e-6)
        x = x + experts(h, w, f"{layer}.mlp", k) + w[f"{layer}.mlp.bias"]
    head = w["model.embed_tokens.weight" if c["tie_word_embeddings"] else "lm_head.weight"]
    return rms(x, w["model.norm.weight"], c["rms_norm_eps"]) @ head.T


def moduleformer(c, w, tokens):
    def gate(h, name, k):
        hidden = h @ w[f"{name}.w_gate.0.weight"].T + w[f"{name}.w_gate.0.bias"]
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / 2**0.5)) / 2
        return chosen(hidden @ w[f"{name}.w_gate.3.weight"].T, k, over_all=True)

    K, A, k = c["n_head"], c["att_hidden"], c["k_att"]
    x = w["transformer.wte.weight"][tokens]
    for i in range(c["n_layer"]):
        layer = f"transformer.h.{i}"
        heads, mlp, h = f"{layer}.attn.q_proj", f"{layer}.mlpf", layer_norm(x, w, f"{layer}.ln_1")
        w_in, w_out = w[f"{heads}.experts.weight"], w[f"{heads}.output_experts.weight"]
        routed = gate(h, f"{heads}.gate", k)
        q = np.array([[h[t] @ w_in[e] for e, _ in row] for t, row in enumerate(routed)]).reshape(-1, k * K, A // K)
        key, value = (h @ w[f"{layer}.attn.{n}_proj.weight"].T + w[f"{layer}.attn.{n}_proj.bias"] for n in "kv")
        key, value = (np.tile(m.reshape(-1, K, A // K), (1, k, 1)) for m in (key, value))
        o = attend(q, key, value, (A // K) ** -0.5, stick_breaking=True).reshape(len(x), k, A)
        x = x + np.array([sum(g * o[t, s] @ w_out[e] for s, (e, g) in enumerate(row)) for t, row in enumerate(routed)])
        w_in, w_out = w[f"{mlp}.experts.weight"], w[f"{mlp}.output_experts.weight"]
        h = layer_norm(x, w, f"{layer}.ln_2")
        routed = gate(h, f"{mlp}.gate", c["k_mlp"])
        gelu = lambda z: z * (1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2  # noqa: E731
        x = x + np.array([sum(g * gelu(h[t] @ w_in[e]) @ w_out[e] for e, g in row) for t, row in enumerate(routed)])
    return layer_norm(x, w, "transformer.ln_f") @ w["lm_head.weight"].T


FORMULAS = dict(granite=granite, granitemoe=granite, jetmoe=jetmoe, moduleformer=moduleformer)
TOKENS = np.random.default_rng(0).integers(0, 23, 9)


def weights(tree):
    """Return random weights {tensor name: array} for the model that `tree`, the content of a config.json, describes.

    The weights are small, because the logits then depend noticeably on every epsilon of the model.
    """
    rng, model = np.random.default_rng(1), to_model_config(tree)[0]
    shapes = names.tensor_shapes(names.table(tree["model_type"], model), model)
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def written(folder, tree):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tree))
    save_file(weights(tree), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", TREES)
def test_logits_are_the_formula_where_no_entry_has_its_default(kind, tmp_path):
    tree = TREES[kind]
    expected = FORMULAS[kind](tree, {n: a.astype(float) for n, a in weights(tree).items()}, TOKENS)
    loaded = stickjax.load(written(tmp_path / "hf", tree), changes={"model.implementation": "reference"})
    assert_close(loaded.model(TOKENS[None].astype(np.int32)).logits[0], expected, FORWARD["float32"])
    assert loaded.config.data.T == 48
    assert to_model_config(to_config_json(loaded.config.model, 48, kind))[0] == to_model_config(tree)[0]


@pytest.mark.parametrize("kind, entry", [(k, e) for k in ("granite", "jetmoe") for e in DEFAULTS if e in TREES[k]])
def test_each_entry_counts_and_has_the_default_of_transformers(kind, entry):
    tree, w = TREES[kind], {n: a.astype(float) for n, a in weights(TREES[kind]).items()}
    usual = FORMULAS[kind](tree | {entry: DEFAULTS[entry]}, w, TOKENS)
    assert np.abs(usual - FORMULAS[kind](tree, w, TOKENS)).max() > 1e-3, "the test above would not see it"
    assert (
        to_model_config({n: x for n, x in tree.items() if n != entry})[0]
        == to_model_config(tree | {entry: DEFAULTS[entry]})[0]
    )


def test_what_only_training_looks_at_is_read():
    model = to_model_config(MODULEFORMER)[0]
    assert (
        model.experts.switch_weight,
        model.experts.z_weight,
        model.experts.sample_topk,
        model.experts.mi_weight,
    ) == (0.25, 0.025, 1, 0)
    assert to_model_config(MODULEFORMER | dict(aux_loss_type="mi"))[0].experts.mi_weight == 0.25


def test_the_originals_have_epsilons_of_their_own():
    jetmoe, moduleformer = (to_model_config(tree)[0] for tree in (JETMOE, MODULEFORMER))
    assert (jetmoe.norm_eps, jetmoe.final_norm_eps, moduleformer.norm_eps) == (1e-6, 0.05, 1e-5)
    assert to_config_json(jetmoe, 8)["rms_norm_eps"] == 0.05
    with pytest.raises(ValueError, match="'jetmoe', the most similar to this model, cannot express norm_eps=1e-05"):
        to_config_json(
            ModelConfig(
                V=8,
                attention="softmax",
                experts=ExpertsConfig(E=4, k=2, bias=True),
                attention_experts=ExpertsConfig(E=4, bias=True),
                N=4,
                K=2,
            ),
            8,
        )


# Published config.json files


def test_published_configs_are_read():
    granite = dict(
        architectures=["GraniteForCausalLM"], attention_bias=False, attention_dropout=0.1, attention_multiplier=1 / 64,
        bos_token_id=0, embedding_multiplier=12.0, eos_token_id=0, hidden_act="silu", hidden_size=2048,
        initializer_range=0.02, intermediate_size=8192, logits_scaling=8.0, max_position_embeddings=131072,
        mlp_bias=False, model_type="granite", num_attention_heads=32, num_hidden_layers=40, num_key_value_heads=8,
        pad_token_id=0, residual_multiplier=0.22, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=1e7,
        tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.49.0", use_cache=True,
        vocab_size=49159,
    )  # fmt: skip
    assert (to_model_config(granite)[0].H, to_model_config(granite)[1]) == (64, 131072)
    power_moe = granite | dict(
        model_type="granitemoe", num_local_experts=40, num_experts_per_tok=8, router_aux_loss_coef=0.01,
        output_router_logits=False, intermediate_size=512,
    )  # fmt: skip
    experts = to_model_config(power_moe)[0].experts
    assert (experts.E, experts.k) == (40, 8)
    jetmoe_8b = dict(
        activation_function="silu", architectures=["JetMoEForCausalLM"], auto_map={"AutoConfig": "a.B"}, bias=True,
        bos_token_id=1, eos_token_id=2, ffn_hidden_size=5632, glu=True, hidden_size=2048, initializer_range=0.01,
        kv_channels=128, max_position_embeddings=4096, model_type="jetmoe", moe_num_experts=8, moe_top_k=2,
        num_attention_heads=32, num_hidden_layers=24, num_key_value_heads=16, num_layers=24, rms_norm_eps=1e-5,
        rope_theta=10000.0, rotary_percent=1.0, tie_word_embeddings=True, torch_dtype="bfloat16", vocab_size=32000,
    )  # fmt: skip
    model = to_model_config(jetmoe_8b)[0]
    assert (model.F, model.experts.E, model.experts.k, model.L, model.norm_eps, model.final_norm_eps) == (
        5632,
        8,
        2,
        24,
        1e-6,
        1e-5,
    )


NOT_SUPPORTED = dict(
    layer_types=["full_attention", "sliding_attention"], position_embedding_type="nope", rotary_percent=0.5,
    partial_rotary_factor=0.5, attn_logit_softcapping=30.0, final_logit_softcapping=30.0, qk_norm=True,
    shared_intermediate_size=64, attention_bias=True, sliding_window=512, hidden_act="gelu",
    rope_scaling={"type": "yarn", "factor": 2.0}, quantization_config={"bits": 4}, is_encoder_decoder=True,
)  # fmt: skip


@pytest.mark.parametrize("tree", [GRANITE, JETMOE], ids=["granite", "jetmoe"])
def test_what_ours_does_not_have_is_refused_by_name(tree):
    for name, value in NOT_SUPPORTED.items():
        with pytest.raises(ValueError, match=f"{name}|rope_scaling: rope_type"):
            to_model_config(tree | {name: value})
    usual = dict(layer_types=["full_attention", "attention"], position_embedding_type="rope", rotary_percent=1.0)
    usual |= dict(qk_norm=False, shared_intermediate_size=0, attn_logit_softcapping=None, unheard_of=None)
    assert to_model_config(tree | usual) == to_model_config(tree)
    with pytest.raises(ValueError, match=r"lambda_attention=0.5: unknown, and may change .* delete it"):
        to_model_config(tree | dict(lambda_attention=0.5))


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(glu=False), "glu=False is not supported"),
        (dict(bias=False), "bias=False is not supported"),
        (dict(moe_top_k=2), "num_experts_per_tok=3 and moe_top_k=2 are two names"),
        (dict(num_attention_heads=4), "num_attention_heads=4 must be"),
        (dict(activation_function="gelu"), "activation_function='gelu'"),
    ],
    ids=str,
)
def test_a_jetmoe_that_is_another_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        to_model_config(JETMOE | changes)


def test_what_is_ignored_changes_no_logits():
    """No entry in the set IGNORED is read from config.json, except the maximum sequence length.

    The maximum sequence length, such as `max_position_embeddings`, becomes T of the data config. It changes no logits.
    An entry that is neither read nor in IGNORED gives an error.
    """
    seen = set()

    class Tree(entries.Entries):
        def __call__(self, name, *rest):
            seen.add(name)
            return super().__call__(name, *rest)

    trees = TREES | MORE_TREES | {configs.OWN: configs.to_config_json(ModelConfig(), 8, configs.OWN)}
    for kind, own in configs._TYPES.items():
        own.read(Tree(trees[kind]))
        seen.discard(own.length)
    assert not seen & entries.IGNORED and not set(NOT_SUPPORTED) & entries.IGNORED
    with pytest.raises(ValueError, match="unknown, and may change"):
        to_model_config(MODULEFORMER | dict(rotary_dim=4))
