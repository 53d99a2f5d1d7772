"""Convert the config.json of a Hugging Face folder to a ModelConfig, and a ModelConfig to a config.json.

Some entries that matter only in training are not converted: the dropout rates, and the weights of the router losses of
all types but moduleformer. In these types, one router loss is computed from all layers together, but stickjax
computes one router loss per layer.
"""

import dataclasses

from stickjax.config.decoder import ModelConfig
from stickjax.config.family import FamilyConfig
from stickjax.config.fields import nearest, one_of
from stickjax.models.router import ROUTER_LOSSES
from stickjax.storage.hugging_face import readers, writers
from stickjax.storage.hugging_face.entries import ROPE_ENTRIES, Entries

# Fields of ModelConfig that do not change the logits, or only change how the logits are computed.
_FREE = ("m_width", "init_std", "dtype", "param_dtype", "remat", "implementation", "skip_below")
_FREE_OF_EXPERTS = (*ROUTER_LOSSES.values(), "sample_topk", "token_rounding")
OWN = "stickjax"  # the type of folders that have their own code; it is written only if the user asks for it


# {model_type: (function that reads config.json, function that writes config.json, class in transformers or in
# flash-linear-attention, entry of config.json that has the length of the longest sequence)}
_TYPES = {
    "granite": (readers.granite, writers.granite, "GraniteForCausalLM", "max_position_embeddings"),
    "granitemoe": (readers.granitemoe, writers.granitemoe, "GraniteMoeForCausalLM", "max_position_embeddings"),
    "granitemoeshared": (
        readers.granitemoeshared, writers.granitemoeshared, "GraniteMoeSharedForCausalLM", "max_position_embeddings"
    ),
    "granitemoehybrid": (
        readers.granitemoehybrid, writers.granitemoehybrid, "GraniteMoeHybridForCausalLM", "max_position_embeddings"
    ),
    "moduleformer": (readers.moduleformer, writers.moduleformer, "ModuleFormerForCausalLM", "block_size"),
    "jetmoe": (readers.jetmoe, writers.jetmoe, "JetMoeForCausalLM", "max_position_embeddings"),
    "llama": (readers.llama, writers.llama, "LlamaForCausalLM", "max_position_embeddings"),
    "mixtral": (readers.mixtral, writers.mixtral, "MixtralForCausalLM", "max_position_embeddings"),
    "olmoe": (readers.olmoe, writers.olmoe, "OlmoeForCausalLM", "max_position_embeddings"),
    "qwen3": (readers.qwen3, writers.qwen3, "Qwen3ForCausalLM", "max_position_embeddings"),
    "qwen3_moe": (readers.qwen3_moe, writers.qwen3_moe, "Qwen3MoeForCausalLM", "max_position_embeddings"),
    "stickbreaking_attn": (
        readers.stickbreaking_attn, writers.stickbreaking_attn, "StickBreakingAttentionForCausalLM",
        "max_position_embeddings",
    ),
    OWN: (readers.stickjax, writers.stickjax, "StickjaxForCausalLM", "max_position_embeddings"),
}  # fmt: skip


def to_model_config(tree: dict) -> tuple[ModelConfig, int | None]:
    """Convert `tree`, the content of a config.json, to (ModelConfig, longest sequence length of the model).

    The length is None if the file does not have it. Raise ValueError if the model_type is unknown, or if an entry is
    missing, is unknown, or has a wrong type or a value that is not supported.
    """
    kind = tree["model_type"]
    if kind not in _TYPES:
        raise ValueError(f"model_type={kind!r} is not one of {', '.join(_TYPES)}{nearest(str(kind), _TYPES)}")
    read, _, _, length = _TYPES[kind]
    get = Entries(tree)
    model, T = read(get), get(length, int, None)
    get.end()
    return ModelConfig(**model), T


def model_type_for(c: FamilyConfig, wanted: str | None = None) -> str:
    """Return the model_type for a model with the config `c`: `wanted`, or the only one that can hold the model.

    A model_type can hold the model if its config.json can express all fields of `c` that change the logits.

    Raises:
      ValueError: `wanted` is unknown or cannot hold the model, or `wanted` is None and no type or several types can
        hold it. The message names the fields that are lost, or the types.

    >>> model_type_for(ModelConfig(V=8, attention="softmax", m_emb=12.0), "granite")
    'granite'
    """
    if not isinstance(c, ModelConfig):
        raise ValueError(f"no Hugging Face model_type fits a model of family={c.family!r}")
    if wanted is not None:
        one_of("type", wanted, tuple(_TYPES))
        if lost := _lost(wanted, c):
            raise ValueError(f"model_type {wanted!r} cannot express {lost}")
        return wanted
    fitting = [kind for kind in _TYPES if kind != OWN and not _lost(kind, c)]
    if len(fitting) > 1:
        raise ValueError(
            f"the model_types {', '.join(fitting)} can all hold this model; choose one with --type (in Python: type=)"
        )
    if not fitting:
        similar = _most_similar(c)
        advice = "" if _lost(OWN, c) else f"; --remote-code (in Python: type={OWN!r}) can"
        raise ValueError(
            f"model_type {similar!r}, the most similar to this model, cannot express {_lost(similar, c)}{advice}"
        )
    return fitting[0]


def _most_similar(c: ModelConfig) -> str:
    if c.attention == "stick_breaking":
        return "moduleformer" if c.mixtures() else "stickbreaking_attn"
    return "jetmoe" if c.attention_experts.E else "granitemoe" if c.experts.E else "granite"


def _lost(kind: str, c: ModelConfig) -> str:
    """Return the fields of `c` that a config.json of the model_type `kind` cannot express, or '' if there are none."""
    read, write, _, _ = _TYPES[kind]
    try:
        found = _effective(ModelConfig(**read(Entries({"model_type": kind} | write(c)))))
    except (ValueError, ZeroDivisionError) as error:
        return f"this model: {error}"
    wanted = _effective(c)
    return ", ".join(f"{name}={value!r}" for name, value in wanted.items() if value != found.get(name))


def to_config_json(c: ModelConfig, T: int, kind: str | None = None) -> dict:
    """Return the content of a Hugging Face config.json for a model with the config `c`.

    The model was trained with sequences of T tokens. T is written as the longest sequence length. `kind` is the
    model_type; None: the only model_type that can hold the model. Raise ValueError as `model_type_for` does.
    """
    kind = model_type_for(c, kind)
    _, write, architecture, length = _TYPES[kind]
    return {"model_type": kind, "architectures": [architecture], length: T, "torch_dtype": c.param_dtype} | write(c)


def _effective(c: ModelConfig) -> dict:
    """Return {name: value} for all fields of a config that can change the logits of the model.

    If these dictionaries are equal for two configs, models with the two configs compute the same function. In the
    dictionary, a field that is None has the value that None stands for, such as 1 / sqrt(H) for `attention_scale`.
    """
    c = writers.explicit(c)
    free = {*_FREE} | ({"rope_theta", "rope_scaling"} if c.attention == "stick_breaking" else set())
    fields = {name: value for name, value in dataclasses.asdict(c).items() if name not in free}
    if (scaling := fields.get("rope_scaling")) is not None:
        used = {"kind", *(ours for ours, _ in ROPE_ENTRIES.get(scaling["kind"], {}).values())}
        fields["rope_scaling"] = {name: value for name, value in scaling.items() if name in used}
    for name in ("experts", "attention_experts"):
        mixture = fields.pop(name)
        unused = {*_FREE_OF_EXPERTS} | ({"hidden"} if mixture["network"] == "linear" else set())
        unused |= {"k"} if name == "attention_experts" else set()  # it is always N / K
        fields |= {f"{name}.{n}": value for n, value in mixture.items() if n not in unused}
    return fields
