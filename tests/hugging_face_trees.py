"""A small config.json, as a dict, for each model_type that is like Llama and for the stick-breaking types.

If stickjax supports several values of an entry, and they give different models, the value here is not the default. So a
test fails if stickjax ignores the entry.
"""

LLAMA = dict(
    model_type="llama", vocab_size=23, hidden_size=12, num_hidden_layers=2, intermediate_size=10,
    num_attention_heads=4, num_key_value_heads=2, head_dim=6, rms_norm_eps=0.05, rope_theta=30.0,
    rope_scaling={
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
    },
    hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=True, max_position_embeddings=48,
)  # fmt: skip
_PLAIN = {name: value for name, value in LLAMA.items() if name != "rope_scaling"}
_GRANITE = _PLAIN | dict(
    embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.7, logits_scaling=2.5,
    num_local_experts=5, num_experts_per_tok=3, shared_intermediate_size=14, router_aux_loss_coef=0.06,
)  # fmt: skip
_STICKBREAKING = dict(
    model_type="stickbreaking", vocab_size=23, n_embd=12, n_layer=2, n_head=4, num_key_value_heads=2, n_inner=10,
    activation_function="swiglu", add_bias=False, add_qkv_bias=True, attention_head_type="gqa",
    attention_multiplier=0.7, init_method="mup", layer_norm_epsilon=0.05, m_emb=3, m_residual=0.4, m_width=2.5,
    normalization_function="rmsnorm", n_positions=48, position_embedding_type="nope", sb_remainder=False,
    scale_attn_weights=True, tie_word_embeddings=True,
)  # fmt: skip
_EXPERTS = dict(num_experts=5, num_experts_per_tok=3, router_aux_loss_coef=0.06)
MORE_TREES = {
    "llama": LLAMA,
    "qwen3": _PLAIN | dict(model_type="qwen3", max_window_layers=28, use_sliding_window=False),
    "mixtral": _PLAIN
    | dict(model_type="mixtral", num_local_experts=5, num_experts_per_tok=3, router_aux_loss_coef=0.06),
    "qwen3_moe": _PLAIN
    | _EXPERTS
    | dict(
        model_type="qwen3_moe", moe_intermediate_size=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]
    ),
    "olmoe": _PLAIN | _EXPERTS | dict(model_type="olmoe", norm_topk_prob=True),
    "granitemoeshared": _GRANITE | dict(model_type="granitemoeshared"),
    "granitemoehybrid": _GRANITE
    | dict(
        model_type="granitemoehybrid", layer_types=["attention"] * 2, position_embedding_type="rope", mamba_d_conv=4
    ),
    "stickbreaking_attn": dict(
        model_type="stickbreaking_attn", vocab_size=23, hidden_size=12, num_hidden_layers=2, intermediate_size=10,
        num_heads=4, num_kv_heads=2, norm_eps=0.05, attend_current=True, qk_norm=True, qkv_bias=True,
        tie_word_embeddings=True, hidden_act="swish", hidden_ratio=4, fuse_norm=True, max_position_embeddings=48,
    ),
    "stickbreaking": _STICKBREAKING | dict(use_interleaved_weights=False),
    "stickbreaking_interleaved": _STICKBREAKING | dict(use_interleaved_weights=True),
}  # fmt: skip
