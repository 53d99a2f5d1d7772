"""Convert the config.json of a Hugging Face folder to a ModelConfig, and a ModelConfig to a config.json.

Some entries that matter only in training are not converted: the dropout rates, and the weights of the router losses of
granitemoe and jetmoe. In these two model types, one router loss is computed from all layers together, but stickjax
computes one router loss per layer.
"""

import dataclasses
from typing import Any

from stickjax.config.decoder import MODULE_ROUTER, MODULES, ModelConfig
from stickjax.config.experts import ExpertsConfig
from stickjax.config.fields import nearest
from stickjax.config.universal import SutConfig
from stickjax.models.router import ROUTER_LOSSES

# {entry of config.json: the only value that stickjax supports}. An entry that is absent or null means this value.
# `_ONLY` is for all model types, `_ONLY_LLAMA` for the model types that are like Llama: granite, granitemoe and jetmoe.
_ONLY = {
    "quantization_config": None, "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {},
    "cross_attention_hidden_size": None, "per_layer_config": None,
}  # fmt: skip
_ONLY_LLAMA = _ONLY | {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None,
    "use_sliding_window": False, "position_embedding_type": "rope", "rotary_percent": 1, "partial_rotary_factor": 1,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "qk_norm": False, "use_qk_norm": False,
    "clip_qkv": None, "shared_intermediate_size": 0, "normalization_function": "rmsnorm",
}  # fmt: skip
# Entries that do not change the logits: they matter only in training, in generation or in transformers itself.
_NO_LOGITS = """
    model_type architectures auto_map transformers_version torch_dtype dtype name_or_path _name_or_path _commit_hash
    _attn_implementation _attn_implementation_autoset attn_implementation use_cache torchscript use_bfloat16
    tf_legacy_loss gradient_checkpointing chunk_size_feed_forward pretraining_tp unsloth_version unsloth_fixed
    return_dict output_hidden_states output_attentions output_router_logits is_decoder tie_encoder_decoder
    tokenizer_class prefix bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    finetuning_task task_specific_params id2label label2id num_labels problem_type
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    initializer_range attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop moe_pdrop
    router_aux_loss_coef aux_loss_coef router_jitter_noise
    max_position_embeddings n_positions block_size history_length n_ctx
"""
IGNORED = frozenset(_NO_LOGITS.split())
# Fields of ModelConfig that do not change the logits, or only change how the logits are computed.
_FREE = ("m_width", "init_std", "dtype", "param_dtype", "remat", "implementation", "skip_below")
_FREE_OF_EXPERTS = (*ROUTER_LOSSES.values(), "sample_topk", "token_rounding")


class _Tree:
    """Reads entries of a config.json, and finds entries that have a wrong type or that were not read.

    With get = _Tree(tree), `get(name, type)` returns the entry `name` after a check of its type. At the end,
    `get.end()` raises ValueError if there are entries that were not read. An entry that is null counts as absent.

    `tree` is the content of config.json, or an object inside it. Messages begin with `where`, such as "rope_scaling: "
    for the object with this name.
    """

    def __init__(self, tree: dict, where: str = ""):
        self._tree, self._where, self._known = tree, where, set()

    def __call__(self, name: str, kind: type, default=...) -> Any:
        self._known.add(name)
        value = self._tree.get(name)
        if value is None:
            if default is ...:
                raise ValueError(f"{self._where}the entry {name} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self._where}{name}={value!r} must be of type {kind.__name__}")
        return value

    def only(self, known: dict) -> None:
        self._known |= known.keys()
        for name, wanted in known.items():
            if (value := self._tree.get(name)) is not None and value != wanted:
                raise ValueError(f"{self._where}{name}={value!r} is not supported; {name} must be {wanted!r}")

    def either(self, name: str, other: str, kind: type, default=...) -> Any:
        """Return the entry `name` or the entry `other`: two names of one entry. If both are absent, return `default`.

        Raise ValueError if both are present and their values differ, or if both are absent and there is no `default`.
        """
        found = {n: value for n in (name, other) if (value := self(n, kind, None)) is not None}
        if len(set(found.values())) > 1:
            both = f"{name}={found[name]!r} and {other}={found[other]!r}"
            raise ValueError(f"{both} are two names of one entry and must be equal")
        return next(iter(found.values())) if found else self(name, kind, default)

    def end(self) -> None:
        """Raise ValueError if `tree` has entries that were not read and are not in the set IGNORED."""
        rest = sorted(n for n, x in self._tree.items() if x is not None and n not in self._known | IGNORED)
        if rest:
            unread = ", ".join(f"{name}={self._tree[name]!r:.60}" for name in rest[:8])
            raise ValueError(
                f"{self._where}{unread}: unknown, and may change what the model computes; delete "
                f"{'it' if len(rest) == 1 else 'them'} from config.json if that does not change the model"
            )

    def quotient(self, name: str, by: str) -> int:
        above, below = self(name, int), self(by, int)
        if below < 1 or above % below:
            raise ValueError(f"{name}={above} must be a multiple of {by}={below}")
        return above // below

    def rope_theta(self) -> float:
        theta = self("rope_theta", float, 10_000.0)
        for name in ("rope_scaling", "rope_parameters"):
            rope = _Tree(self(name, dict, {}), f"{name}: ")
            rope.only({"rope_type": "default", "type": "default", "partial_rotary_factor": 1})
            theta = rope("rope_theta", float, theta)
            rope.end()
        return theta

    def layer_types(self) -> None:
        types = self("layer_types", list, [])
        if wrong := [kind for kind in types if kind not in ("full_attention", "attention")]:
            raise ValueError(f"layer_types has {wrong[0]!r}, which is not supported; all must be 'full_attention'")


def _llama(get: _Tree, tied: bool) -> dict:
    get.only(_ONLY_LLAMA)
    get.layer_types()
    return dict(
        V=get("vocab_size", int), D=get("hidden_size", int), L=get.either("num_hidden_layers", "num_layers", int),
        attention="softmax", activation="swiglu", rope_theta=get.rope_theta(),
        norm_eps=get("rms_norm_eps", float, 1e-6), tied=get("tie_word_embeddings", bool, tied),
    )  # fmt: skip


def _granite(get: _Tree) -> dict:
    N = get("num_attention_heads", int)
    H = get("head_dim", int, None) or get.quotient("hidden_size", "num_attention_heads")
    return _llama(get, tied=False) | dict(
        N=N, K=get("num_key_value_heads", int, N), H=H, F=get("intermediate_size", int),
        m_emb=get("embedding_multiplier", float, 1.0), m_res=get("residual_multiplier", float, 1.0),
        attention_scale=get("attention_multiplier", float, 1.0), logits_scaling=get("logits_scaling", float, 1.0),
    )  # fmt: skip


def _granitemoe(get: _Tree) -> dict:
    return _granite(get) | dict(experts=ExpertsConfig(get("num_local_experts", int), get("num_experts_per_tok", int)))


def _jetmoe(get: _Tree) -> dict:
    """Return {field of ModelConfig: value} for the config.json of a jetmoe model. `get` reads its entries.

    Some entries have one name in transformers and another name in the original code of JetMoE. Both names are accepted.
    """
    get.only({"activation_function": "silu", "glu": True, "bias": True})
    E, k = (
        get.either(*names, int)
        for names in (("num_local_experts", "moe_num_experts"), ("num_experts_per_tok", "moe_top_k"))
    )
    K = get("num_key_value_heads", int)
    N = get("num_attention_heads", int, K * k)
    if N != K * k:
        raise ValueError(f"num_attention_heads={N} must be num_key_value_heads * num_experts_per_tok = {K} * {k}")
    read, F = _llama(get, tied=True), get.either("intermediate_size", "ffn_hidden_size", int)
    # The normalisations of a block always use 1e-6. The epsilon in the file is for the last normalisation only.
    return read | dict(
        N=N, K=K, H=get.either("kv_channels", "head_dim", int), F=F,
        experts=ExpertsConfig(E, k, bias=True), attention_experts=ExpertsConfig(E, bias=True),
        logits_scaling=1.0, norm_eps=1e-6, final_norm_eps=read["norm_eps"],
    )  # fmt: skip


def _moduleformer(get: _Tree) -> dict:
    get.only(_ONLY | {"tie_word_embeddings": False, "activation_function": "gelu_new", "n_inner": None})
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
        # The original code omits the projections if their results have the size of the input.
        key_value="input" if (A, K) == (D, 1) else "biased",
        norm_eps=1e-5,
    )  # fmt: skip


def _to_moduleformer(c: ModelConfig) -> dict:
    x = c.experts
    loss = "switch" if x.switch_weight else "mi"
    return dict(
        vocab_size=c.vocabulary, n_embd=c.D, n_layer=c.L, n_head=c.K, att_hidden=c.K * c.H, k_att=c.N // c.K, k_mlp=x.k,
        n_att_experts=c.attention_experts.E, n_mlp_experts=x.E, ffd_hidden=c.F, activation_function="gelu_new",
        gate_type=x.network, gating_size=x.hidden, aux_loss_type=loss,
        aux_loss_weight=x.switch_weight or x.mi_weight, sample_topk=x.sample_topk,
        layer_norm_epsilon=c.norm_eps, tie_word_embeddings=False,
    )  # fmt: skip


def _to_llama(c: ModelConfig) -> dict:
    return dict(
        vocab_size=c.vocabulary, hidden_size=c.D, num_hidden_layers=c.L, intermediate_size=c.F, head_dim=c.H,
        rms_norm_eps=_final_norm_eps(c),
        num_attention_heads=c.N, num_key_value_heads=c.K, tie_word_embeddings=c.tied,
        # transformers 5 reads `rope_parameters`, and transformers 4 reads `rope_theta`.
        rope_theta=c.rope_theta, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )  # fmt: skip


def _to_granite(c: ModelConfig) -> dict:
    return _to_llama(c) | dict(
        hidden_act="silu", attention_bias=False, mlp_bias=False, embedding_multiplier=c.m_emb,
        residual_multiplier=c.m_res, attention_multiplier=c.scale, logits_scaling=_logits_scaling(c),
    )  # fmt: skip


def _to_granitemoe(c: ModelConfig) -> dict:
    return _to_granite(c) | dict(num_local_experts=c.experts.E, num_experts_per_tok=c.experts.k)


def _to_jetmoe(c: ModelConfig) -> dict:
    return _to_llama(c) | dict(
        activation_function="silu", kv_channels=c.H, num_local_experts=c.experts.E, num_experts_per_tok=c.experts.k
    )


def _final_norm_eps(c: ModelConfig) -> float:
    return c.norm_eps if c.final_norm_eps is None else c.final_norm_eps


def _logits_scaling(c: ModelConfig) -> float:
    return c.m_width if c.logits_scaling is None else c.logits_scaling


# {model_type: (function that reads config.json, function that writes config.json, class in transformers, entry of
# config.json that has the length of the longest sequence)}
_TYPES = {
    "granite": (_granite, _to_granite, "GraniteForCausalLM", "max_position_embeddings"),
    "granitemoe": (_granitemoe, _to_granitemoe, "GraniteMoeForCausalLM", "max_position_embeddings"),
    "moduleformer": (_moduleformer, _to_moduleformer, "ModuleFormerForCausalLM", "block_size"),
    "jetmoe": (_jetmoe, _to_jetmoe, "JetMoeForCausalLM", "max_position_embeddings"),
}


def to_model_config(tree: dict) -> tuple[ModelConfig, int | None]:
    """Convert `tree`, the content of a config.json, to (ModelConfig, longest sequence length of the model).

    The length is None if the file does not have it. Raise ValueError if the model_type is unknown, or if an entry is
    missing, is unknown, or has a wrong type or a value that is not supported.
    """
    kind = tree["model_type"]
    if kind not in _TYPES:
        raise ValueError(f"model_type={kind!r} is not one of {', '.join(_TYPES)}{nearest(str(kind), _TYPES)}")
    read, _, _, length = _TYPES[kind]
    get = _Tree(tree)
    model, T = read(get), get(length, int, None)
    get.end()
    return ModelConfig(**model), T


def kind_of(c: ModelConfig | SutConfig) -> str:
    """Return the model_type of transformers that is most similar to the config `c`, such as "granite".

    `to_config_json` then checks whether this model_type can express the config. Raise ValueError if no model_type is
    similar.
    """
    if (nearest := _NEAREST.get(type(c))) is None:
        raise ValueError(f"no Hugging Face model_type fits a model of family={c.family!r}")
    return nearest(c)


def _nearest_decoder(c: ModelConfig) -> str:
    if c.attention == "stick_breaking":
        if len(c.mixtures()) < 2:
            raise ValueError(
                "no Hugging Face model_type fits: a model with stick-breaking attention needs attention experts and "
                f"feed-forward experts, but has attention_experts.E={c.attention_experts.E} and experts.E={c.experts.E}"
            )
        return "moduleformer"
    return "jetmoe" if c.attention_experts.E else "granitemoe" if c.experts.E else "granite"


_NEAREST = {ModelConfig: _nearest_decoder}


def to_config_json(c: ModelConfig, T: int) -> dict:
    """Return the content of a Hugging Face config.json for a model with the config `c`.

    The model was trained with sequences of T tokens. T is written as the longest sequence length. The model_type comes
    from `kind_of`. Raise ValueError if this model_type cannot express all fields that change the logits. The message
    lists the fields that it cannot express.
    """
    kind = kind_of(c)
    _, write, architecture, length = _TYPES[kind]
    tree = {"model_type": kind, "architectures": [architecture], length: T, "torch_dtype": c.param_dtype} | write(c)
    found, wanted = (_effective(config) for config in (to_model_config(tree)[0], c))
    if lost := [f"{n}={wanted[n]!r}" for n in wanted if wanted[n] != found[n]]:
        raise ValueError(f"model_type {kind!r}, the most similar to this model, cannot express {', '.join(lost)}")
    return tree


def _effective(c: ModelConfig) -> dict:
    """Return {name: value} for all fields of a config that can change the logits of the model.

    If these dictionaries are equal for two configs, models with the two configs compute the same function. In the
    dictionary, a field that is None has the value that None stands for, such as 1 / sqrt(H) for `attention_scale`.
    """
    stood_for = dict(V=c.vocabulary, logits_scaling=_logits_scaling(c), final_norm_eps=_final_norm_eps(c))
    c = dataclasses.replace(c, attention_scale=c.scale, **stood_for)
    free = {*_FREE} | ({"rope_theta"} if c.attention == "stick_breaking" else set())
    fields = {name: value for name, value in dataclasses.asdict(c).items() if name not in free}
    for name in ("experts", "attention_experts"):
        mixture = fields.pop(name)
        unused = {*_FREE_OF_EXPERTS} | ({"hidden"} if mixture["network"] == "linear" else set())
        unused |= {"k"} if name == "attention_experts" else set()  # it is always N / K
        fields |= {f"{name}.{n}": value for n, value in mixture.items() if n not in unused}
    return fields
