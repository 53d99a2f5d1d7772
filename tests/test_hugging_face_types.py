"""Each entry of a config.json of a type like Llama sets a field of ModelConfig, or gives an error that names it."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from hugging_face_trees import LLAMA, MORE_TREES
from safetensors.numpy import save_file

from stickjax.config import ExpertsConfig, ModelConfig
from stickjax.config.rope import RopeScaling
from stickjax.models.decoder import Decoder
from stickjax.models.layers import rotary
from stickjax.storage import hugging_face
from stickjax.storage.hugging_face.configs import to_config_json, to_model_config

SCALING = RopeScaling("llama3", 4.0, 2.0, 3.0, 16)
COMMON = dict(V=23, D=12, L=2, N=4, K=2, F=10, norm_eps=0.05, tied=True, logits_scaling=1.0)
PLAIN = COMMON | dict(H=6, attention="softmax", rope_theta=30.0)
GRANITE = PLAIN | dict(m_emb=3.0, m_res=0.4, attention_scale=0.7, logits_scaling=2.5)
EXPERTS = functools.partial(ExpertsConfig, E=5, k=3, switch_weight=0.06 * 3 / 2)
STICKBREAKING = COMMON | dict(
    H=3, attention="stick_breaking", query_key_value_bias=True, m_emb=3.0, m_res=0.4, m_width=2.5, logits_scaling=None,
    attention_scale=0.7,
)  # fmt: skip
EXPECTED = {
    "llama": PLAIN | dict(rope_scaling=SCALING),
    "qwen3": PLAIN | dict(query_key_norm="head"),
    "mixtral": PLAIN | dict(experts=EXPERTS()),
    "qwen3_moe": PLAIN | dict(F=8, experts=EXPERTS(), query_key_norm="head"),
    "olmoe": PLAIN | dict(experts=EXPERTS(), query_key_norm="all"),
    "granitemoeshared": GRANITE | dict(experts=EXPERTS(shared=14)),
    "granitemoehybrid": GRANITE | dict(experts=EXPERTS(shared=14)),
    "stickbreaking_attn": COMMON
    | dict(H=3, attention="stick_breaking", attend_current=True, query_key_norm="head", query_key_value_bias=True),
    "stickbreaking": STICKBREAKING,
    "stickbreaking_interleaved": STICKBREAKING,
}


@pytest.mark.parametrize("kind", MORE_TREES)
def test_each_entry_becomes_its_field_and_is_written_again(kind):
    model, T = to_model_config(MORE_TREES[kind])
    assert (model, T) == (ModelConfig(**EXPECTED[kind]), 48)
    assert to_model_config(to_config_json(model, 48, kind)) == (model, 48)


@pytest.mark.parametrize(
    "kind, changes, fields",
    [
        ("llama", dict(rms_norm_eps=None), dict(norm_eps=1e-6)),
        ("llama", dict(rope_theta=None), dict(rope_theta=1e4)),
        ("llama", dict(head_dim=None, num_attention_heads=2), dict(N=2)),
        ("llama", dict(num_key_value_heads=None), dict(K=4)),
        ("llama", dict(tie_word_embeddings=None), dict(tied=False)),
        ("llama", dict(rope_scaling={"type": "linear", "factor": 2.0}), dict(rope_scaling=RopeScaling("linear", 2.0))),
        ("llama", dict(rope_scaling=None, rope_parameters={"rope_theta": 30.0}), dict(rope_scaling=RopeScaling())),
        ("mixtral", dict(router_aux_loss_coef=None), dict(experts=EXPERTS(switch_weight=0.0))),
        ("mixtral", dict(rms_norm_eps=None, rope_theta=None), dict(norm_eps=1e-5, rope_theta=1e6)),
        ("olmoe", dict(rms_norm_eps=None), dict(norm_eps=1e-5)),
        ("olmoe", dict(norm_topk_prob=None), dict(experts=EXPERTS(order="softmax_topk"))),
        ("qwen3_moe", dict(num_experts=None, num_local_experts=5), {}),
        ("qwen3_moe", dict(norm_topk_prob=False), dict(experts=EXPERTS(order="softmax_topk"))),
        ("qwen3", dict(sliding_window=4096), {}),
        ("qwen3_moe", dict(sliding_window=4096, use_sliding_window=False, use_qk_norm=True), {}),
        ("granitemoehybrid", dict(position_embedding_type=None), dict(rope_theta=None)),
        ("granitemoehybrid", dict(position_embedding_type="nope"), dict(rope_theta=None)),
        ("granitemoehybrid", dict(num_local_experts=0, num_experts_per_tok=0), dict(F=14, experts=ExpertsConfig())),
        ("granitemoeshared", dict(shared_intermediate_size=0), dict(experts=EXPERTS())),
        ("stickbreaking_attn", dict(norm_eps=None, qk_norm=None), dict(norm_eps=1e-6, query_key_norm="none")),
        ("stickbreaking_attn", dict(num_kv_heads=None, qkv_bias=None), dict(K=4, query_key_value_bias=False)),
        ("stickbreaking", dict(sb_remainder=None), dict(remainder="value")),
        ("stickbreaking", dict(attention_multiplier=None, m_width=None), dict(attention_scale=None, m_width=1.0)),
        ("stickbreaking", dict(tie_word_embeddings=None), dict(tied=False)),
    ],
)
def test_missing_and_other_entries(kind, changes, fields):
    assert to_model_config(MORE_TREES[kind] | changes)[0] == ModelConfig(**EXPECTED[kind] | fields)


@pytest.mark.parametrize(
    "kind, changes, said",
    [
        ("llama", dict(attention_bias=True), "attention_bias=True is not supported"),
        (
            "llama",
            dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
            "rope_scaling: rope_type='yarn' is not",
        ),
        ("llama", dict(rope_scaling={"rope_type": "llama3", "factor": 2.0}), "the entry low_freq_factor is missing"),
        ("llama", dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "have different values"),
        ("llama", dict(rope_parameters=LLAMA["rope_scaling"] | {"rope_theta": 31.0}), "have different values"),
        ("llama", dict(rope_scaling=LLAMA["rope_scaling"] | {"beta": 1}), "rope_scaling: beta=1: unknown"),
        ("llama", dict(shared_intermediate_size=8), "shared_intermediate_size=8 is not supported"),
        ("llama", dict(rope_interleaved=True), "rope_interleaved=True is not supported"),
        ("qwen3", dict(use_sliding_window=True, sliding_window=8), "use_sliding_window=True is not supported"),
        ("qwen3_moe", dict(shared_expert_intermediate_size=8), "shared_expert_intermediate_size=8 is not supported"),
        ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "'sliding_attention', which is not"),
        ("qwen3", dict(head_dim=None), "the entry head_dim is missing"),
        ("mixtral", dict(sliding_window=4096), "sliding_window=4096 is not supported"),
        ("mixtral", dict(num_key_value_heads=None), "the entry num_key_value_heads is missing"),
        ("qwen3_moe", dict(mlp_only_layers=[0]), r"mlp_only_layers=\[0\] is not supported"),
        ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2 is not supported"),
        ("qwen3_moe", dict(num_local_experts=6), "num_experts=5 and num_local_experts=6 are two names"),
        ("mixtral", dict(num_local_experts=0), "num_local_experts=0 must be at least 1"),
        ("mixtral", dict(num_hidden_layers=0), "L=0 must be at least 1"),
        ("mixtral", dict(router_z_loss_coef=0.1), "router_z_loss_coef=0.1: unknown"),
        ("olmoe", dict(router_aux_loss_coef=-1.0), "switch_weight=-1.5 must be at least 0"),
        ("olmoe", dict(clip_qkv=8.0), "clip_qkv=8.0 is not supported"),
        (
            "granitemoehybrid",
            dict(layer_types=["attention", "mamba"]),
            "layer_types has 'mamba', which is not",
        ),
        ("granitemoehybrid", dict(layer_types=None), "the entry layer_types is missing"),
        ("granitemoehybrid", dict(position_embedding_type="alibi"), "position_embedding_type='alibi' is not supported"),
        ("granitemoeshared", dict(mamba_d_conv=4), "mamba_d_conv=4: unknown"),
        ("stickbreaking_attn", dict(window_size=16), "window_size=16 is not supported"),
        ("stickbreaking_attn", dict(intermediate_size=None), "the entry intermediate_size is missing"),
        ("stickbreaking_attn", dict(rope_theta=1e4), "rope_theta=10000.0: unknown"),
        ("stickbreaking", dict(use_interleaved_weights=None), "has two possible orders of the rows of mlp.c_fc, and"),
        ("stickbreaking", dict(use_interleaved_weights="yes"), "has two possible orders of the rows of mlp.c_fc"),
        ("stickbreaking", dict(position_embedding_type="rope"), "position_embedding_type='rope' is not supported"),
        ("stickbreaking", dict(head_norm=True), "head_norm=True: unknown"),
        ("stickbreaking", dict(n_head=5), "n_embd=12 must be a multiple of n_head=5"),
    ],
)
def test_what_ours_does_not_have_is_refused_by_name(kind, changes, said):
    with pytest.raises(ValueError, match=said):
        to_model_config(MORE_TREES[kind] | changes)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_frequencies_are_those_of_transformers(kind):
    """`rotary` scales the frequencies of rotary position embeddings as transformers does.

    `linear` divides every frequency by the factor. `llama3` keeps a frequency, divides it, or takes a value between
    these two.
    """
    theta, H, scaling = 500.0, 16, RopeScaling(kind, 8.0, 1.0, 4.0, 64)
    frequency = theta ** -(np.arange(H // 2) / (H // 2))
    scaled = frequency / 8
    if kind == "llama3":
        length = 2 * np.pi / frequency
        s = (64 / length - 1.0) / (4.0 - 1.0)
        middle = (1 - s) * frequency / 8 + s * frequency
        scaled = np.where(length < 64 / 4, frequency, np.where(length > 64 / 1, frequency / 8, middle))
        assert len({*np.sign((length < 16) * 1 - (length > 64) * 1)}) == 3, "all three cases must occur"
    x = jnp.concatenate([jnp.ones((1, 1, 1, H // 2)), jnp.zeros((1, 1, 1, H // 2))], -1)
    turned = rotary(x, jnp.full((1, 1), 3), theta, scaling)[0, 0, 0]
    assert_close(turned, np.concatenate([np.cos(3 * scaled), np.sin(3 * scaled)]), 1e-6)


def test_wrong_fields_are_refused():
    for changes, said in (
        (
            dict(attention_experts=ExpertsConfig(4), query_key_norm="head"),
            "query_key_norm='head' needs attention",
        ),
        (
            dict(attention_experts=ExpertsConfig(4), query_key_value_bias=True),
            "query_key_value_bias=True needs",
        ),
        (dict(attention_experts=ExpertsConfig(4, shared=8)), "attention_experts.shared=8 must be 0"),
        (dict(experts=ExpertsConfig(shared=8)), "experts: shared=8 needs E >= 1 experts"),
        (dict(query_key_norm="heads"), "query_key_norm='heads' is not one of 'none', 'head', 'all'"),
    ):
        with pytest.raises(ValueError, match=said):
            ModelConfig(N=4, K=2, **changes)
    with pytest.raises(ValueError, match="high_freq_factor=1.0 must be above low_freq_factor=1.0"):
        RopeScaling("llama3", 8.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="factor=0.5 must be at least 1"):
        RopeScaling("linear", 0.5)


def test_the_shared_expert_counts_as_active():
    few, many = (
        Decoder().parameter_counts(ModelConfig(V=8, D=16, L=2, F=4, experts=ExpertsConfig(4, 2, shared=shared)))
        for shared in (0, 8)
    )
    assert [b - a for a, b in zip(few, many, strict=True)] == [2 * 3 * 16 * 8] * 2


def test_more_experts_than_tensors_is_an_error_at_once(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MORE_TREES["mixtral"] | dict(num_local_experts=10**9)))
    save_file({f"{i}": np.zeros(1, np.float32) for i in range(4)}, tmp_path / "model.safetensors")
    model = ModelConfig(**PLAIN | dict(experts=ExpertsConfig(10**9, 3)))
    with pytest.raises(ValueError, match="config.json says 1000000000 experts, but the files have only 4 tensors"):
        hugging_face.read(tmp_path, model)
