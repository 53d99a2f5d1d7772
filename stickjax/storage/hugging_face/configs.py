"""Convert the config.json of a Hugging Face folder to a ModelConfig, and a ModelConfig to a config.json.

The dropout rates, which matter only in training, are not converted.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from stickjax.config.decoder import ModelConfig
from stickjax.config.family import FamilyConfig
from stickjax.config.fields import nearest, one_of
from stickjax.models.router import ROUTER_LOSSES
from stickjax.storage.hugging_face import readers, writers
from stickjax.storage.hugging_face.entries import ROPE_ENTRIES, Entries
from stickjax.storage.hugging_face.folding import folded

# Fields of ModelConfig that do not change the logits, or only change how the logits are computed.
_FREE = ("m_width", "init_std", "dtype", "param_dtype", "remat", "implementation", "skip_below")
_FREE_OF_EXPERTS = (*ROUTER_LOSSES.values(), "sample_topk", "token_rounding")
OWN = "stickjax"  # the type of folders that also have the PyTorch code of the model; only written on request


class Type(NamedTuple):
    """How the config.json of a model_type is read and written.

    `read`: a function of `readers`. `write`: a function of `writers`.
    `architecture`: the class in transformers or in flash-linear-attention, for the entry `architectures`; None: there
      is no such entry.
    `length`: the entry that has the length of the longest sequence.
    `folds`: whether the multipliers of a model are folded into its parameters, because config.json has none.
    """

    read: Callable[[Entries], dict]
    write: Callable[[ModelConfig], dict]
    architecture: str | None
    length: str = "max_position_embeddings"
    folds: bool = False


# {type: how it is read and written}. A type is a model_type; stickbreaking_interleaved is stickbreaking with another
# order of the rows of a tensor (`type_of`).
_TYPES = {
    "granite": Type(readers.granite, writers.granite, "GraniteForCausalLM"),
    "granitemoe": Type(readers.granitemoe, writers.granitemoe, "GraniteMoeForCausalLM"),
    "granitemoeshared": Type(readers.granitemoeshared, writers.granitemoeshared, "GraniteMoeSharedForCausalLM"),
    "granitemoehybrid": Type(readers.granitemoehybrid, writers.granitemoehybrid, "GraniteMoeHybridForCausalLM"),
    "moduleformer": Type(readers.moduleformer, writers.moduleformer, "ModuleFormerForCausalLM", "block_size"),
    "jetmoe": Type(readers.jetmoe, writers.jetmoe, "JetMoeForCausalLM"),
    "llama": Type(readers.llama, writers.llama, "LlamaForCausalLM"),
    "mixtral": Type(readers.mixtral, writers.mixtral, "MixtralForCausalLM"),
    "olmoe": Type(readers.olmoe, writers.olmoe, "OlmoeForCausalLM"),
    "qwen3": Type(readers.qwen3, writers.qwen3, "Qwen3ForCausalLM"),
    "qwen3_moe": Type(readers.qwen3_moe, writers.qwen3_moe, "Qwen3MoeForCausalLM"),
    "stickbreaking": Type(readers.stickbreaking, writers.stickbreaking, None, "n_positions"),
    "stickbreaking_interleaved": Type(readers.stickbreaking, writers.stickbreaking_interleaved, None, "n_positions"),
    "stickbreaking_attn": Type(
        readers.stickbreaking_attn, writers.stickbreaking_attn, "StickBreakingAttentionForCausalLM", folds=True
    ),
    OWN: Type(readers.stickjax, writers.stickjax, "StickjaxForCausalLM"),
}


def to_model_config(tree: dict) -> tuple[ModelConfig, int | None]:
    """Convert `tree`, the content of a config.json, to (ModelConfig, longest sequence length of the model).

    The length is None if the file does not have it. Raise ValueError if the model_type is unknown, or if an entry is
    missing, is unknown, or has a wrong type or a value that is not supported.
    """
    kind, get = type_of(tree), Entries(tree)
    model, T = _TYPES[kind].read(get), get(_TYPES[kind].length, int, None)
    get.end()
    return ModelConfig(**model), T


def type_of(tree: dict) -> str:
    """Return the type of a config.json with the content `tree`: its `model_type`, or "stickbreaking_interleaved".

    In the type stickbreaking, the tensor mlp.c_fc.weight has two kinds of rows: the gate rows, and the up rows, which
    the gate multiplies. In the released model of 2024, all up rows come first, and then all gate rows. In later models,
    gate and up rows alternate. The entry `use_interleaved_weights` is true if they alternate. If this entry is missing,
    the user must add it, because nothing else in the folder shows the order.

    Raise ValueError if the model_type is unknown, or if it is "stickbreaking" and `use_interleaved_weights` is missing
    or is neither true nor false.

    >>> type_of({"model_type": "stickbreaking", "use_interleaved_weights": True})
    'stickbreaking_interleaved'
    """
    kind, interleaved = tree["model_type"], tree.get("use_interleaved_weights")
    known = [name for name in _TYPES if name != "stickbreaking_interleaved"]
    if kind not in known:
        raise ValueError(f"model_type={kind!r} is not one of {', '.join(known)}{nearest(str(kind), known)}")
    if kind == "stickbreaking" and type(interleaved) is not bool:
        raise ValueError(
            "model_type='stickbreaking' has two possible orders of the rows of mlp.c_fc, and config.json does not say "
            'which one the files have; add "use_interleaved_weights" to config.json: false if all up rows come first '
            "and then all gate rows (the released model of 2024), or true if gate and up rows alternate"
        )
    return "stickbreaking_interleaved" if kind == "stickbreaking" and interleaved else kind


def model_type_for(c: FamilyConfig, wanted: str | None = None) -> str:
    """Return the model_type for a model with the config `c`: `wanted`, or the only type that can hold the model.

    A model_type can hold the model if its config.json can express all fields of `c` that change the logits. The type
    "stickjax" is returned only if it is `wanted`.

    Raises:
      ValueError: the model is not a decoder, `wanted` is unknown, or `wanted` cannot hold the model. If `wanted` is
        None: no type can hold the model, or more than one type can. The message names the fields that a type cannot
        express, or the types that can hold the model.

    >>> model_type_for(ModelConfig(V=8, attention="softmax", m_emb=12.0), "granite")
    'granite'
    """
    if not isinstance(c, ModelConfig):
        raise ValueError(f"no Hugging Face model_type fits a model of family={c.family!r}; only decoders have one")
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
        fits = f"only the model_type {OWN!r} can hold this model; use --remote-code (in Python: type={OWN!r})"
        fits = "no model_type can hold this model" if _lost(OWN, c) else fits
        raise ValueError(
            f"{fits}; model_type {similar!r}, the most similar to this model, cannot express {_lost(similar, c)}"
        )
    return fitting[0]


def _most_similar(c: ModelConfig) -> str:
    if c.attention == "stick_breaking":
        return "moduleformer" if c.mixtures() else "stickbreaking_attn"
    return "jetmoe" if c.attention_experts.E else "granitemoe" if c.experts.E else "granite"


def _lost(kind: str, c: ModelConfig) -> str:
    """Return the fields of `c` that a config.json of the model_type `kind` cannot express, as a text for messages.

    The text is like "m_res=0.5, norm='layer'". It is '' if there are no such fields. If no config.json can be made or
    read back, the text is "this model: " and the reason.
    """
    read, write = _TYPES[kind].read, _TYPES[kind].write
    try:
        c, _ = stored(c, kind)
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
    c, _ = stored(c, kind)
    _, write, architecture, length, _ = _TYPES[kind]
    named = {} if architecture is None else {"architectures": [architecture]}
    return {"model_type": kind, **named, length: T, "torch_dtype": c.param_dtype} | write(c)


def stored(c: ModelConfig, kind: str) -> tuple[ModelConfig, dict[str, float]]:
    """Return (config, factors): how a folder of the model_type `kind` stores a model with the config `c`.

    `config` is the config that the folder has. `factors` is {name of a parameter: factor}. The folder has the
    parameters of the model, multiplied by these factors (see `folding.folded`).
    """
    return folded(c) if _TYPES[kind].folds else (c, {})


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
