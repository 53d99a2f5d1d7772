"""The config.json of a Hugging Face folder as a ModelConfig, and the other way round.

What only training looks at is not carried over: dropouts, and the routers' losses of granitemoe and jetmoe, which are
of all layers together where ours are of each.
"""

import dataclasses
from typing import Any

from stickjax.fields import nearest
from stickjax.model_config import MODULES, ModelConfig
from stickjax.sut_config import SutConfig

# Values that change what a model computes and that ours has no counterpart of; absent and null are these.
_ONLY = {
    "quantization_config": None, "sliding_window": None, "partial_rotary_factor": 1, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
# Fields that change no logits, or only how they are computed.
_FREE = (
    "sample_topk", "round_rows", "switch_weight", "z_weight", "mi_weight", "concentration_weight", "m_width",
    "init_std", "dtype", "param_dtype", "remat", "implementation", "skip_below",
)  # fmt: skip


class _Tree:
    """A config.json, whose entries are asked for by name and type."""

    def __init__(self, tree: dict, where: str = ""):
        self._tree, self._where = tree, where

    def __call__(self, name: str, kind: type, default=...) -> Any:
        value = self._tree.get(name)
        if value is None:
            if default is ...:
                raise ValueError(f"it has no {name}")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{name}={value!r} must be of type {kind.__name__}")
        return value

    def only(self, known: dict) -> None:
        for name, wanted in known.items():
            if (value := self._tree.get(name)) is not None and value != wanted:
                raise ValueError(f"{self._where}{name}={value!r} is not supported, only {wanted!r}")

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
        return theta


def _llama(get: _Tree, tied: bool) -> dict:
    get.only(_ONLY)
    return dict(
        V=get("vocab_size", int), D=get("hidden_size", int), L=get("num_hidden_layers", int),
        F=get("intermediate_size", int), attention="softmax", activation="swiglu", rope_theta=get.rope_theta(),
        norm_eps=get("rms_norm_eps", float, 1e-6), tied=get("tie_word_embeddings", bool, tied),
    )  # fmt: skip


def _granite(get: _Tree) -> dict:
    N = get("num_attention_heads", int)
    H = get("head_dim", int, None) or get.quotient("hidden_size", "num_attention_heads")
    return _llama(get, tied=False) | dict(
        N=N, K=get("num_key_value_heads", int, N), H=H,
        m_emb=get("embedding_multiplier", float, 1.0), m_res=get("residual_multiplier", float, 1.0),
        attention_scale=get("attention_multiplier", float, 1.0), logits_scaling=get("logits_scaling", float, 1.0),
    )  # fmt: skip


def _granitemoe(get: _Tree) -> dict:
    return _granite(get) | dict(E=get("num_local_experts", int), k=get("num_experts_per_tok", int))


def _jetmoe(get: _Tree) -> dict:
    get.only({"activation_function": "silu"})
    E, k, K = (get(name, int) for name in ("num_local_experts", "num_experts_per_tok", "num_key_value_heads"))
    N = get("num_attention_heads", int, K * k)
    if N != K * k:
        raise ValueError(f"num_attention_heads={N} must be num_key_value_heads * num_experts_per_tok = {K} * {k}")
    return _llama(get, tied=True) | dict(
        N=N, K=K, H=get("kv_channels", int), E=E, k=k, attention_experts=E, logits_scaling=1.0, expert_bias=True
    )


def _moduleformer(get: _Tree) -> dict:
    get.only({"tie_word_embeddings": False, "activation_function": "gelu_new"})
    D, A, K = (get(name, int) for name in ("n_embd", "att_hidden", "n_head"))
    loss, weight = get("aux_loss_type", str, "mi"), get("aux_loss_weight", float, 0.0)
    if loss not in ("mi", "switch"):
        raise ValueError(f"aux_loss_type={loss!r} is not supported, only 'mi' and 'switch'")
    losses = dict(mi_weight=weight) if loss == "mi" else dict(switch_weight=weight, z_weight=0.1 * weight)
    return MODULES | losses | dict(
        V=get("vocab_size", int), D=D, L=get("n_layer", int), N=K * get("k_att", int), K=K,
        H=get.quotient("att_hidden", "n_head"), F=get("ffd_hidden", int), E=get("n_mlp_experts", int),
        k=get("k_mlp", int), attention_experts=get("n_att_experts", int),
        # The original has no projections where their result has the size of the input.
        key_value="input" if (A, K) == (D, 1) else "biased",
        router_network=get("gate_type", str), router_hidden=get("gating_size", int),
        norm_eps=get("layer_norm_epsilon", float), sample_topk=get("sample_topk", int, 0),
    )  # fmt: skip


def _to_moduleformer(c: ModelConfig) -> dict:
    loss = "switch" if c.switch_weight else "mi"
    return dict(
        vocab_size=c.V, n_embd=c.D, n_layer=c.L, n_head=c.K, att_hidden=c.K * c.H, k_att=c.N // c.K, k_mlp=c.k,
        n_att_experts=c.attention_experts, n_mlp_experts=c.E, ffd_hidden=c.F, activation_function="gelu_new",
        gate_type=c.router_network, gating_size=c.router_hidden, aux_loss_type=loss,
        aux_loss_weight=c.switch_weight or c.mi_weight, sample_topk=c.sample_topk,
        layer_norm_epsilon=c.norm_eps, tie_word_embeddings=False,
    )  # fmt: skip


def _to_llama(c: ModelConfig) -> dict:
    return dict(
        vocab_size=c.V, hidden_size=c.D, num_hidden_layers=c.L, intermediate_size=c.F, rms_norm_eps=c.norm_eps,
        num_attention_heads=c.N, num_key_value_heads=c.K, tie_word_embeddings=c.tied,
        # transformers 5 reads the dictionary, 4 the number.
        rope_theta=c.rope_theta, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )  # fmt: skip


def _to_granite(c: ModelConfig) -> dict:
    return _to_llama(c) | dict(
        hidden_act="silu", attention_bias=False, mlp_bias=False, head_dim=c.H, embedding_multiplier=c.m_emb,
        residual_multiplier=c.m_res, attention_multiplier=c.scale, logits_scaling=_logits_scaling(c),
    )  # fmt: skip


def _to_granitemoe(c: ModelConfig) -> dict:
    return _to_granite(c) | dict(num_local_experts=c.E, num_experts_per_tok=c.k)


def _to_jetmoe(c: ModelConfig) -> dict:
    return _to_llama(c) | dict(
        activation_function="silu", kv_channels=c.H, num_local_experts=c.E, num_experts_per_tok=c.k
    )


def _logits_scaling(c: ModelConfig) -> float:
    return c.m_width if c.logits_scaling is None else c.logits_scaling


# model_type: (from config.json, to config.json, the class in transformers, where it says how long a sequence may be)
_TYPES = {
    "granite": (_granite, _to_granite, "GraniteForCausalLM", "max_position_embeddings"),
    "granitemoe": (_granitemoe, _to_granitemoe, "GraniteMoeForCausalLM", "max_position_embeddings"),
    "moduleformer": (_moduleformer, _to_moduleformer, "ModuleFormerForCausalLM", "block_size"),
    "jetmoe": (_jetmoe, _to_jetmoe, "JetMoeForCausalLM", "max_position_embeddings"),
}


def to_ours(tree: dict) -> tuple[ModelConfig, int | None]:
    """The model that a config.json describes, and the longest sequence it names.

    ValueError for a model_type that is not known (with the nearest), and for an entry that is missing, of a wrong type
    or not supported.
    """
    kind = tree["model_type"]
    if kind not in _TYPES:
        raise ValueError(f"model_type={kind!r} is not one of {', '.join(_TYPES)}{nearest(str(kind), _TYPES)}")
    read, _, _, length = _TYPES[kind]
    get = _Tree(tree)
    return ModelConfig(**read(get)), get(length, int, None)


def kind_of(c: ModelConfig | SutConfig) -> str:
    """The model_type that is nearest to a model; ValueError when there is none near."""
    if c.family != "decoder":
        raise ValueError(f"no model_type is of family={c.family!r}: only decoders have one")
    if c.attention == "stick_breaking":
        if not (c.attention_experts and c.E):
            raise ValueError(
                "no model_type has stick-breaking attention without experts of both kinds, but "
                f"attention_experts={c.attention_experts} and E={c.E}"
            )
        return "moduleformer"
    return "jetmoe" if c.attention_experts else "granitemoe" if c.E else "granite"


def to_theirs(c: ModelConfig, T: int) -> dict:
    """The config.json of a model that was trained with sequences of T tokens.

    ValueError, naming the fields, when the model_type cannot express what the model computes.
    """
    kind = kind_of(c)
    _, write, architecture, length = _TYPES[kind]
    tree = {"model_type": kind, "architectures": [architecture], length: T, "torch_dtype": c.param_dtype} | write(c)
    found, wanted = (_effective(config) for config in (to_ours(tree)[0], c))
    if lost := [f"{n}={wanted[n]!r}" for n in wanted if wanted[n] != found[n]]:
        raise ValueError(f"model_type {kind!r}, the nearest to this model, has no {', '.join(lost)}")
    return tree


def _effective(c: ModelConfig) -> dict:
    """The fields that decide over the logits, with what None stands for."""
    c = dataclasses.replace(c, attention_scale=c.scale, logits_scaling=_logits_scaling(c))
    free = {*_FREE}
    free |= {"rope_theta"} if c.attention == "stick_breaking" else set()
    free |= {"router_hidden"} if c.router_network == "linear" else set()
    free |= set() if c.E or c.attention_experts else {"k", "router", "router_network", "router_hidden", "expert_bias"}
    return {name: value for name, value in dataclasses.asdict(c).items() if name not in free}
