"""Write a config.json: one function per model_type returns {entry: value} for the config `c` of a model.

A function may be called for a config that its model_type cannot express. `configs` then finds the fields that are lost.
"""

import dataclasses

from stickjax.config.decoder import ModelConfig
from stickjax.storage.hugging_face.entries import ROPE_ENTRIES


def moduleformer(c: ModelConfig) -> dict:
    x = c.experts
    loss = "switch" if x.switch_weight else "mi"
    return dict(
        vocab_size=c.vocabulary, n_embd=c.D, n_layer=c.L, n_head=c.K, att_hidden=c.K * c.H, k_att=c.N // c.K, k_mlp=x.k,
        n_att_experts=c.attention_experts.E, n_mlp_experts=x.E, ffd_hidden=c.F, activation_function="gelu_new",
        gate_type=x.network, gating_size=x.hidden, aux_loss_type=loss,
        aux_loss_weight=x.switch_weight or x.mi_weight, sample_topk=x.sample_topk,
        layer_norm_epsilon=c.norm_eps, tie_word_embeddings=False,
    )  # fmt: skip


def like_llama(c: ModelConfig) -> dict:
    rope = {"rope_type": "default"}
    if (kind := c.rope_scaling.kind) != "none":
        rope = {"rope_type": kind} | {n: getattr(c.rope_scaling, ours) for n, (ours, _) in ROPE_ENTRIES[kind].items()}
    scaling = {} if kind == "none" else {"rope_scaling": rope}
    theta = 10_000.0 if c.rope_theta is None else c.rope_theta
    return dict(
        vocab_size=c.vocabulary, hidden_size=c.D, num_hidden_layers=c.L, intermediate_size=c.F, head_dim=c.H,
        rms_norm_eps=final_norm_eps(c),
        num_attention_heads=c.N, num_key_value_heads=c.K, tie_word_embeddings=c.tied,
        # transformers 5 reads `rope_parameters`, and transformers 4 reads `rope_theta` and `rope_scaling`.
        rope_theta=theta, rope_parameters=rope | {"rope_theta": theta}, **scaling,
    )  # fmt: skip


def llama(c: ModelConfig) -> dict:
    return like_llama(c) | dict(hidden_act="silu", attention_bias=False, mlp_bias=False)


def qwen3(c: ModelConfig) -> dict:
    return like_llama(c) | dict(hidden_act="silu", attention_bias=False, use_sliding_window=False)


def router_loss(c: ModelConfig) -> float:
    """Return the coefficient of the router loss in transformers: weight * L / k, and 0 without feed-forward experts.

    weight is the sum of the `switch_weight` of all mixtures of the config. See `readers.switch_weight` for the formula.
    """
    weight, k = sum(mixture.switch_weight for mixture in c.mixtures().values()), c.experts.k
    return float(f"{weight * c.L / k:.12g}") if k else 0.0  # without the rounding errors of the weight


def local_experts(c: ModelConfig) -> dict:
    return dict(
        num_local_experts=c.experts.E, num_experts_per_tok=c.experts.k, router_aux_loss_coef=router_loss(c)
    )  # fmt: skip


def mixtral(c: ModelConfig) -> dict:
    return like_llama(c) | local_experts(c) | dict(hidden_act="silu", sliding_window=None)


def routed(c: ModelConfig) -> dict:
    return dict(
        hidden_act="silu", attention_bias=False, num_experts=c.experts.E, num_experts_per_tok=c.experts.k,
        norm_topk_prob=c.experts.order == "topk_softmax", router_aux_loss_coef=router_loss(c),
    )  # fmt: skip


def qwen3_moe(c: ModelConfig) -> dict:
    return (
        like_llama(c)
        | routed(c)
        | dict(moe_intermediate_size=c.F, decoder_sparse_step=1, mlp_only_layers=[], use_sliding_window=False)
    )


def olmoe(c: ModelConfig) -> dict:
    return like_llama(c) | routed(c)


def granite(c: ModelConfig) -> dict:
    return like_llama(c) | dict(
        hidden_act="silu", attention_bias=False, mlp_bias=False, embedding_multiplier=c.m_emb,
        residual_multiplier=c.m_res, attention_multiplier=c.scale, logits_scaling=logits_scaling_of(c),
    )  # fmt: skip


def granitemoe(c: ModelConfig) -> dict:
    return granite(c) | local_experts(c)


def granitemoeshared(c: ModelConfig) -> dict:
    return granitemoe(c) | dict(shared_intermediate_size=c.experts.shared if c.experts.E else c.F)


def granitemoehybrid(c: ModelConfig) -> dict:
    # transformers requires mamba_n_heads * mamba_d_head = 2 * hidden_size, also if no layer is a mamba layer.
    return granitemoeshared(c) | dict(
        layer_types=["attention"] * c.L, position_embedding_type="nope" if c.rope_theta is None else "rope",
        mamba_n_heads=1, mamba_d_head=2 * c.D, mamba_expand=2,
    )  # fmt: skip


def stickbreaking_attn(c: ModelConfig) -> dict:
    return dict(
        vocab_size=c.vocabulary, hidden_size=c.D, num_hidden_layers=c.L, num_heads=c.N, num_kv_heads=c.K,
        intermediate_size=c.F, hidden_act="swish", attend_current=c.attend_current, norm_eps=c.norm_eps,
        qk_norm=c.query_key_norm == "head", qkv_bias=c.query_key_value_bias, tie_word_embeddings=c.tied,
    )  # fmt: skip


def stickbreaking(c: ModelConfig) -> dict:
    heads = "mha" if c.K == c.N else "mqa" if c.K == 1 else "gqa"
    return dict(
        model_type="stickbreaking", use_interleaved_weights=False,
        vocab_size=c.vocabulary, n_embd=c.D, n_layer=c.L, n_head=c.N, num_key_value_heads=c.K, n_inner=c.F,
        attention_head_type=heads, add_bias=False, add_qkv_bias=c.query_key_value_bias,
        activation_function="swiglu", normalization_function="rmsnorm", layer_norm_epsilon=c.norm_eps,
        position_embedding_type="nope", sb_remainder=c.remainder == "value", scale_attn_weights=True,
        attention_multiplier=c.scale, m_emb=c.m_emb, m_residual=c.m_res, m_width=logits_scaling_of(c),
        tie_word_embeddings=c.tied,
    )  # fmt: skip


def stickbreaking_interleaved(c: ModelConfig) -> dict:
    return stickbreaking(c) | dict(use_interleaved_weights=True)


def jetmoe(c: ModelConfig) -> dict:
    return like_llama(c) | dict(
        activation_function="silu", kv_channels=c.H, num_local_experts=c.experts.E,
        num_experts_per_tok=c.experts.k, aux_loss_coef=router_loss(c),
    )  # fmt: skip


def stickjax(c: ModelConfig) -> dict:
    """Return the entries for the type `stickjax`. The entry `model` has the fields of `c` that `remote_code` uses."""
    fields = dataclasses.asdict(explicit(c))
    elsewhere = ("family", "dtype", "param_dtype", "remat", "implementation")  # the tensors and PyTorch decide these
    return dict(
        auto_map={
            "AutoConfig": "configuration_stickjax.StickjaxConfig",
            "AutoModelForCausalLM": "modeling_stickjax.StickjaxForCausalLM",
        },
        model={name: value for name, value in fields.items() if name not in elsewhere},
        tie_word_embeddings=False,  # the code itself uses the embedding as the output matrix
    )


def explicit(c: ModelConfig) -> ModelConfig:
    """Return a copy of `c` with default values in place of None, such as 1 / sqrt(H) for `attention_scale`.

    Only the fields V, attention_scale, logits_scaling and final_norm_eps are changed.
    """
    return dataclasses.replace(
        c, V=c.vocabulary, attention_scale=c.scale, logits_scaling=logits_scaling_of(c),
        final_norm_eps=final_norm_eps(c),
    )  # fmt: skip


def final_norm_eps(c: ModelConfig) -> float:
    return c.norm_eps if c.final_norm_eps is None else c.final_norm_eps


def logits_scaling_of(c: ModelConfig) -> float:
    return c.m_width if c.logits_scaling is None else c.logits_scaling
