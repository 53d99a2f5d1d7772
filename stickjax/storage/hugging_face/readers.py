"""Read a config.json: one function per model_type returns {field of ModelConfig: value}.

The argument `get` of these functions is an `Entries` object, which reads the entries of config.json. The entries that a
function does not read are errors, unless they are in the set `entries.IGNORED`.
"""

import dataclasses

from stickjax.config.decoder import MODULE_ROUTER, MODULES, ModelConfig
from stickjax.config.experts import ExpertsConfig
from stickjax.config.fields import nearest, one_of
from stickjax.config.rope import RopeScaling
from stickjax.storage.hugging_face.entries import Entries

# {entry of config.json: the only value that stickjax supports}. An entry that is absent or null means this value.
# `_ONLY` is for the published model types with stick-breaking attention. `_ONLY_LLAMA` is for the types like Llama.
_ONLY = {
    "quantization_config": None, "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {},
    "cross_attention_hidden_size": None, "per_layer_config": None,
}  # fmt: skip
_ONLY_LLAMA = _ONLY | {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None,
    "use_sliding_window": False, "position_embedding_type": "rope", "rotary_percent": 1, "partial_rotary_factor": 1,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "qk_norm": False, "use_qk_norm": False,
    "clip_qkv": None, "shared_intermediate_size": 0, "normalization_function": "rmsnorm", "rope_interleaved": False,
}  # fmt: skip


def like_llama(get: Entries, tied: bool = False, eps: float = 1e-6, theta: float = 1e4, own: tuple = ()) -> dict:
    """Return {field of ModelConfig: value} for the entries that all model types like Llama have.

    `tied`, `eps` and `theta` are the values if config.json has no tie_word_embeddings, rms_norm_eps or rope_theta.

    `_ONLY_LLAMA` is {name of an entry: the only value that stickjax supports}. In config.json, such an entry must have
    this value, be null, or be absent; otherwise the function raises ValueError. `own` has the names of entries that the
    caller treats itself: they are not compared with `_ONLY_LLAMA`.
    """
    get.only({name: value for name, value in _ONLY_LLAMA.items() if name not in own})
    get.layer_types()
    return dict(
        V=get("vocab_size", int), D=get("hidden_size", int), L=get.either("num_hidden_layers", "num_layers", int),
        attention="softmax", activation="swiglu", **get.rope(theta),
        norm_eps=get("rms_norm_eps", float, eps), tied=get("tie_word_embeddings", bool, tied),
    )  # fmt: skip


def heads(get: Entries) -> dict:
    N = get("num_attention_heads", int)
    H = get("head_dim", int, None) or get.quotient("hidden_size", "num_attention_heads")
    return dict(N=N, K=get("num_key_value_heads", int, N), H=H)


def plain(get: Entries, **options) -> dict:
    """Return {field of ModelConfig: value} for a type like Llama whose config.json has no multipliers.

    The fields of the feed-forward network are left out. `options` are arguments of `like_llama`. For the type granite,
    which has multipliers, see `granite`.
    """
    return like_llama(get, **options) | heads(get) | dict(logits_scaling=1.0)


def llama(get: Entries) -> dict:
    return plain(get) | dict(F=get("intermediate_size", int))


def like_qwen3(get: Entries) -> dict:
    """Return {field of ModelConfig: value} for the entries that qwen3 and qwen3_moe share."""
    get("num_key_value_heads", int)  # required: the default of these types is a fixed number
    get.only({"qkv_bias": False, "use_qk_norm": True})
    get.unused("max_window_layers sliding_window")  # without use_sliding_window, they have no effect
    return plain(get, own=("sliding_window", "use_qk_norm")) | dict(query_key_norm="head")


def qwen3(get: Entries) -> dict:
    get("head_dim", int)  # required: the default of this type is a fixed number
    return like_qwen3(get) | dict(F=get("intermediate_size", int))


def experts_of(get: Entries, *names: str, order: str = "topk_softmax", shared: int = 0) -> ExpertsConfig:
    """Return the config of the feed-forward experts, for a model type that has experts in every layer.

    `names`: one or two names. The entry with the number of experts has one of them. `order` and `shared` become fields
    of the result.
    """
    if (E := get.either(names[0], names[-1], int)) < 1:
        raise ValueError(f"{names[0]}={E} must be at least 1")
    k = get("num_experts_per_tok", int)
    return ExpertsConfig(E, k, order, shared=shared, switch_weight=switch_weight(get, "router_aux_loss_coef", k))


def switch_weight(get: Entries, name: str, k: int) -> float:
    """Return the weight of the load-balancing loss in stickjax, from its coefficient in the entry `name`.

    transformers computes the loss once, from the mean loads and the mean probabilities of all L layers, and adds
    coefficient * loss. stickjax computes a loss for every layer, and adds weight * loss for each of them. The loss of
    transformers is k times as large, where k is the number of experts per token. With weight = coefficient * k / L,
    both libraries add the same value if all layers have the same means. If the entry is missing, the weight is 0.
    """
    L = get.either("num_hidden_layers", "num_layers", int)
    return get(name, float, 0.0) * k / max(L, 1)  # ModelConfig refuses L=0


def mixtral(get: Entries) -> dict:
    get("num_key_value_heads", int)  # required: the default of this type is a fixed number
    fields = dict(F=get("intermediate_size", int), experts=experts_of(get, "num_local_experts"))
    return plain(get, eps=1e-5, theta=1e6) | fields


def routed(get: Entries) -> ExpertsConfig:
    """Return the config of the experts of qwen3_moe or olmoe. With norm_topk_prob, the k gates of a token sum to 1."""
    order = "topk_softmax" if get("norm_topk_prob", bool, False) else "softmax_topk"
    return experts_of(get, "num_experts", "num_local_experts", order=order)


def qwen3_moe(get: Entries) -> dict:
    get.only({"decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": 0})
    get.unused("intermediate_size")  # the width of dense layers, which the model does not have
    return like_qwen3(get) | dict(F=get("moe_intermediate_size", int), experts=routed(get))


def olmoe(get: Entries) -> dict:
    return plain(get, eps=1e-5) | dict(F=get("intermediate_size", int), experts=routed(get), query_key_norm="all")


def granite(get: Entries, own: tuple = ()) -> dict:
    return like_llama(get, own=own) | heads(get) | dict(
        F=get("intermediate_size", int),
        m_emb=get("embedding_multiplier", float, 1.0), m_res=get("residual_multiplier", float, 1.0),
        attention_scale=get("attention_multiplier", float, 1.0), logits_scaling=get("logits_scaling", float, 1.0),
    )  # fmt: skip


def granitemoe(get: Entries) -> dict:
    return granite(get) | dict(experts=experts_of(get, "num_local_experts"))


def granitemoeshared(get: Entries) -> dict:
    shared, fields = get("shared_intermediate_size", int), granite(get, own=("shared_intermediate_size",))
    return fields | dict(experts=experts_of(get, "num_local_experts", shared=shared))


def granitemoehybrid(get: Entries) -> dict:
    """Return {field of ModelConfig: value} for a granitemoehybrid model.

    Every layer must have attention. If a layer is a Mamba layer, the function raises ValueError.
    """
    get("layer_types", list)  # without it, all layers would be mamba layers
    get.unused(
        "mamba_chunk_size mamba_conv_bias mamba_d_conv mamba_d_head mamba_d_state mamba_expand mamba_n_groups "
        "mamba_n_heads mamba_proj_bias time_step_limit time_step_min time_step_max time_step_floor"
    )
    positions = get("position_embedding_type", str, "nope")
    if positions not in ("rope", "nope"):
        raise ValueError(
            f"position_embedding_type={positions!r} is not supported; position_embedding_type must be 'rope' or 'nope'"
        )
    shared = get("shared_intermediate_size", int)
    fields = granite(get, own=("shared_intermediate_size", "position_embedding_type"))
    if get("num_local_experts", int):
        fields |= dict(experts=experts_of(get, "num_local_experts", shared=shared))
    else:
        get.unused("num_experts_per_tok router_aux_loss_coef")  # the shared network is the only one
        fields |= dict(F=shared)
    return fields if positions == "rope" else fields | dict(rope_theta=None, rope_scaling=RopeScaling())


def stickbreaking_attn(get: Entries) -> dict:
    """Return {field of ModelConfig: value} for the stick-breaking model of flash-linear-attention."""
    get.only(_ONLY | {"hidden_act": "swish", "window_size": None, "elementwise_affine": True})
    get.unused(
        "hidden_ratio fuse_norm fuse_swiglu fuse_cross_entropy fuse_linear_cross_entropy use_l2warp"
    )  # hidden_ratio only gives a default for intermediate_size
    N = get("num_heads", int)
    return dict(
        V=get("vocab_size", int), D=get("hidden_size", int), L=get("num_hidden_layers", int), N=N,
        K=get("num_kv_heads", int, N), H=get.quotient("hidden_size", "num_heads"), F=get("intermediate_size", int),
        attention="stick_breaking", attend_current=get("attend_current", bool, False), activation="swiglu",
        query_key_norm="head" if get("qk_norm", bool, False) else "none",
        query_key_value_bias=get("qkv_bias", bool, False), norm_eps=get("norm_eps", float, 1e-6),
        tied=get("tie_word_embeddings", bool, False), logits_scaling=1.0,
    )  # fmt: skip


def stickbreaking(get: Entries) -> dict:
    """Return {field of ModelConfig: value} for the type of the released 3B stick-breaking model.

    The entry `use_interleaved_weights` is not read here, but in `configs.type_of`. If the entry `tie_word_embeddings`
    is missing or false, the output matrix is the tensor lm_head.weight, even if it is a copy of the embedding.
    """
    get.only(_ONLY | {"activation_function": "swiglu", "add_bias": False, "normalization_function": "rmsnorm"})
    get.only({"position_embedding_type": "nope", "scale_attn_weights": True, "multi_query": False})
    get.unused("attention_head_type attention_softmax_in_fp32 init_method upcast_logits_for_loss")
    get.unused("use_interleaved_weights")
    return dict(
        V=get("vocab_size", int), D=get("n_embd", int), L=get("n_layer", int), N=get("n_head", int),
        K=get("num_key_value_heads", int), H=get.quotient("n_embd", "n_head"), F=get("n_inner", int),
        attention="stick_breaking", remainder="value" if get("sb_remainder", bool, True) else "none",
        activation="swiglu", query_key_value_bias=get("add_qkv_bias", bool, False),
        norm_eps=get("layer_norm_epsilon", float), tied=get("tie_word_embeddings", bool, False),
        m_emb=get("m_emb", float, 1.0), m_res=get("m_residual", float, 1.0), m_width=get("m_width", float, 1.0),
        attention_scale=get("attention_multiplier", float, None),
    )  # fmt: skip


def stickjax(get: Entries) -> dict:
    """Return {field of ModelConfig: value} for the type whose code is in the folder `remote_code`."""
    get.unused("tie_word_embeddings")  # the code itself uses the embedding as the output matrix
    model, known = get("model", dict), [f.name for f in dataclasses.fields(ModelConfig)]
    for name in model:
        if name not in known:
            raise ValueError(f"model.{name} is not a field of a decoder{nearest(name, known)}")
    fields = Entries(model, "model: ")
    fields("V", int)
    one_of("model.attention", fields("attention", str), ("stick_breaking", "softmax"))
    for name in ("experts", "attention_experts"):
        mixture = Entries(fields(name, dict, {}), f"{name}: ")
        mixture.only({"added": 0, "pruned": 0, "pruning": "no"})
    return model


def jetmoe(get: Entries) -> dict:
    """Return {field of ModelConfig: value} for the config.json of a jetmoe model. `get` reads its entries.

    Some entries have one name in transformers and another name in the original code of JetMoE. Both names are accepted.
    """
    get.only({"activation_function": "silu", "glu": True, "bias": True})
    get.unused("layer_norm_epsilon")  # all normalisations are RMSNorm, with the epsilons below
    E, k = (
        get.either(*names, int)
        for names in (("num_local_experts", "moe_num_experts"), ("num_experts_per_tok", "moe_top_k"))
    )
    K = get("num_key_value_heads", int)
    N = get("num_attention_heads", int, K * k)
    if N != K * k:
        raise ValueError(f"num_attention_heads={N} must be num_key_value_heads * num_experts_per_tok = {K} * {k}")
    read, F = like_llama(get, tied=True), get.either("intermediate_size", "ffn_hidden_size", int)
    # transformers computes one loss from all routers, and counts the routers of attention twice.
    third = switch_weight(get, "aux_loss_coef", k) / 3
    # The normalisations of a block always use 1e-6. The epsilon in the file is for the last normalisation only.
    return read | dict(
        N=N, K=K, H=get.either("kv_channels", "head_dim", int), F=F,
        experts=ExpertsConfig(E, k, bias=True, switch_weight=third),
        attention_experts=ExpertsConfig(E, bias=True, switch_weight=2 * third),
        logits_scaling=1.0, norm_eps=1e-6, final_norm_eps=read["norm_eps"],
    )  # fmt: skip


def moduleformer(get: Entries) -> dict:
    get.only(_ONLY | {"tie_word_embeddings": False, "activation_function": "gelu_new", "n_inner": None})
    get.only({"att_func": "stickbreaking", "moe_type": "moe", "pre_norm": True, "universal": False, "local_size": 1})
    get("layer_norm_epsilon", float, None)  # the original code always uses 1e-5
    D, A, K = (get(name, int) for name in ("n_embd", "att_hidden", "n_head"))
    loss, weight = get("aux_loss_type", str, "mi"), get("aux_loss_weight", float, 0.0)
    if loss not in ("mi", "switch"):
        raise ValueError(f"aux_loss_type={loss!r} is not supported; aux_loss_type must be 'mi' or 'switch'")
    losses = dict(mi_weight=weight) if loss == "mi" else dict(switch_weight=weight, z_weight=0.1 * weight)
    router = (
        MODULE_ROUTER
        | losses
        | dict(network=get("gate_type", str), hidden=get("gating_size", int), sample_topk=get("sample_topk", int, 0))
    )
    return MODULES | dict(
        V=get("vocab_size", int), D=D, L=get("n_layer", int), N=K * get("k_att", int), K=K,
        H=get.quotient("att_hidden", "n_head"), F=get("ffd_hidden", int),
        experts=ExpertsConfig(get("n_mlp_experts", int), get("k_mlp", int), **router),
        attention_experts=ExpertsConfig(get("n_att_experts", int), **router),
        # The original code has no projections to keys and values if these have the size of the input.
        key_value="input" if (A, K) == (D, 1) else "biased",
        norm_eps=1e-5,
    )  # fmt: skip
