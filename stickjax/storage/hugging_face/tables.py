"""The tables of tensor names: one function per model_type returns the rows of its table.

The top of `names` explains the letters of the axes. A tensor is an array of a Hugging Face folder, and a leaf is a
parameter of the stickjax model.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from stickjax.config import ModelConfig
from stickjax.config.experts import ExpertsConfig


class Row(NamedTuple):
    """A row of a table: it maps a tensor to a leaf. The top of `names` explains the fields."""

    ours: str
    theirs: str
    axes: str
    part: int = 0
    expert: int | None = None


def _attention(layer: str) -> list[Row]:
    return [
        Row("blocks/attention/query", f"{layer}.q_proj.weight", "NH D"),
        Row("blocks/attention/key", f"{layer}.k_proj.weight", "KH D"),
        Row("blocks/attention/value", f"{layer}.v_proj.weight", "KH D"),
        Row("blocks/attention/output", f"{layer}.o_proj.weight", "D NH"),
    ]


def _llama(c: ModelConfig) -> list[Row]:
    """Return the rows that the tables of all types like Llama share.

    They are the rows of the embedding, the normalisations and the output matrix.
    """
    return [
        Row("embed", "model.embed_tokens.weight", "V D"),
        Row("blocks/attention_norm/scale", "model.layers.{}.input_layernorm.weight", "D"),
        Row("blocks/ffn_norm/scale", "model.layers.{}.post_attention_layernorm.weight", "D"),
        Row("norm/scale", "model.norm.weight", "D"),
    ] + ([] if c.tied else [Row("unembed", "lm_head.weight", "V D")])


def _mlp() -> list[Row]:
    mlp = "model.layers.{}.mlp"
    return [
        Row("blocks/ffn/w_in", f"{mlp}.gate_proj.weight", "F D", 0),
        Row("blocks/ffn/w_in", f"{mlp}.up_proj.weight", "F D", 1),
        Row("blocks/ffn/w_out", f"{mlp}.down_proj.weight", "D F"),
    ]


def _granite(c: ModelConfig) -> list[Row]:
    return [*_llama(c), *_attention("model.layers.{}.self_attn"), *_mlp()]


def _norms(layer: str, query: str, key: str) -> list[Row]:
    return [
        Row("blocks/attention/query_norm/scale", f"{layer}.q_norm.weight", query),
        Row("blocks/attention/key_norm/scale", f"{layer}.k_norm.weight", key),
    ]


def _qwen3(c: ModelConfig) -> list[Row]:
    return [*_granite(c), *_norms("model.layers.{}.self_attn", "H", "H")]


def _each_expert(c: ModelConfig, moe: str, names: tuple[str, str, str]) -> list[Row]:
    """Return the rows of a mixture that has its own tensors for each expert, named `names`: (gate, up, down).

    The rows of one leaf come one after the other, because `names.tensors_from_leaves` keeps only the newest layer of a
    leaf in memory. In this order, it reads each layer once.
    """
    gate, up, down = (f"{moe}.experts.%d.{name}.weight" for name in names)
    w_in = [("blocks/ffn/w_in", name, "F D", part) for part, name in enumerate((gate, up))]
    return [
        Row("blocks/ffn/router/weight", f"{moe}.gate.weight", "E D"),
        *(Row(ours, name % e, axes, part, e) for e in range(c.experts.E) for ours, name, axes, part in w_in),
        *(Row("blocks/ffn/w_out", down % e, "D F", 0, e) for e in range(c.experts.E)),
    ]


def _mixtral(c: ModelConfig) -> list[Row]:
    moe = _each_expert(c, "model.layers.{}.block_sparse_moe", ("w1", "w3", "w2"))
    return [*_llama(c), *_attention("model.layers.{}.self_attn"), *moe]


def _qwen3_moe(c: ModelConfig) -> list[Row]:
    layer = "model.layers.{}"
    moe = _each_expert(c, f"{layer}.mlp", ("gate_proj", "up_proj", "down_proj"))
    return [*_llama(c), *_attention(f"{layer}.self_attn"), *_norms(f"{layer}.self_attn", "H", "H"), *moe]


def _olmoe(c: ModelConfig) -> list[Row]:
    layer = "model.layers.{}"
    moe = _each_expert(c, f"{layer}.mlp", ("gate_proj", "up_proj", "down_proj"))
    return [*_llama(c), *_attention(f"{layer}.self_attn"), *_norms(f"{layer}.self_attn", "NH", "KH"), *moe]


def _granitemoeshared(c: ModelConfig) -> list[Row]:
    """The table of granitemoeshared and granitemoehybrid. Without experts, the shared network is the only one."""
    shared, width = "model.layers.{}.shared_mlp", "W" if c.experts.E else "F"
    ours = "blocks/ffn/shared" if c.experts.E else "blocks/ffn"
    rows = [
        Row(f"{ours}/w_in", f"{shared}.input_linear.weight", f"2{width} D"),
        Row(f"{ours}/w_out", f"{shared}.output_linear.weight", f"D {width}"),
    ]
    if c.experts.E:
        return [*_granitemoe(c), *(rows if c.experts.shared else [])]
    return [*_llama(c), *_attention("model.layers.{}.self_attn"), *rows]


def _stickbreaking_attn(c: ModelConfig) -> list[Row]:
    layer = "model.layers.{}"
    rows = [
        Row("embed", "model.embeddings.weight", "V D"),
        Row("blocks/attention_norm/scale", f"{layer}.attn_norm.weight", "D"),
        *_attention(f"{layer}.attn"),
        Row("blocks/ffn_norm/scale", f"{layer}.mlp_norm.weight", "D"),
        *_mlp(),
        Row("norm/scale", "model.norm.weight", "D"),
    ]
    if c.query_key_value_bias:
        for name, size in (("query", "NH"), ("key", "KH"), ("value", "KH")):
            rows.append(Row(f"blocks/attention/{name}_bias", f"{layer}.attn.{name[0]}_proj.bias", size))
    rows += _norms(f"{layer}.attn", "H", "H") if c.query_key_norm != "none" else []
    return rows + ([] if c.tied else [Row("unembed", "lm_head.weight", "V D")])


def _stickbreaking(c: ModelConfig, interleaved: bool = False) -> list[Row]:
    """The table of stickbreaking. `interleaved`: whether the rows of c_fc are gate, up, gate, ...; else [up; gate]."""
    layer, c_attn = "transformer.h.{}", "transformer.h.{}.attn.c_attn"
    rows = [
        Row("embed", "transformer.wte.weight", "V D"),
        Row("blocks/attention_norm/scale", f"{layer}.ln_1.weight", "D"),
        *_grouped(c, "", f"{c_attn}.weight", "KPH D"),
        *(_grouped(c, "_bias", f"{c_attn}.bias", "KPH") if c.query_key_value_bias else []),
        Row("blocks/attention/output", f"{layer}.attn.c_proj.weight", "D NH"),
        Row("blocks/ffn_norm/scale", f"{layer}.ln_2.weight", "D"),
    ]
    w_in = Row("blocks/ffn/w_in", f"{layer}.mlp.c_fc.weight", "F2 D" if interleaved else "UF D")
    rows += [w_in] if interleaved else [w_in, w_in._replace(part=1)]
    rows += [
        Row("blocks/ffn/w_out", f"{layer}.mlp.c_proj.weight", "D F"),
        Row("norm/scale", "transformer.ln_f.weight", "D"),
    ]
    return rows + ([] if c.tied else [Row("unembed", "lm_head.weight", "V D")])


def _grouped(c: ModelConfig, end: str, theirs: str, axes: str) -> list[Row]:
    """Return the rows of a tensor that has, for each key head, its N / K query heads, the key head and the value head.

    In each row, one of these N / K + 2 heads is mapped, for all key heads.
    """
    parts = [*(("query", q) for q in range(c.N // c.K)), ("key", -2), ("value", -1)]
    return [Row(f"blocks/attention/{name}{end}", theirs, axes, part) for name, part in parts]


def _granitemoe(c: ModelConfig) -> list[Row]:
    moe = "model.layers.{}.block_sparse_moe"
    return [
        *_llama(c),
        *_attention("model.layers.{}.self_attn"),
        Row("blocks/ffn/router/weight", f"{moe}.router.layer.weight", "E D"),
        Row("blocks/ffn/w_in", f"{moe}.input_linear.weight", "E 2F D"),
        Row("blocks/ffn/w_out", f"{moe}.output_linear.weight", "E D F"),
    ]


def _jetmoe(c: ModelConfig) -> list[Row]:
    heads, mlp = "model.layers.{}.self_attention", "model.layers.{}.mlp"
    return [
        *_llama(c),
        Row("blocks/attention/router/weight", f"{heads}.experts.router.layer.weight", "A D"),
        Row("blocks/attention/expert_query", f"{heads}.experts.input_linear.weight", "A KH D"),
        Row("blocks/attention/expert_output", f"{heads}.experts.output_linear.weight", "A D KH"),
        Row("blocks/attention/output_bias", f"{heads}.experts.bias", "D"),
        Row("blocks/attention/key", f"{heads}.kv_proj.weight", "2KH D", 0),
        Row("blocks/attention/value", f"{heads}.kv_proj.weight", "2KH D", 1),
        Row("blocks/ffn/router/weight", f"{mlp}.router.layer.weight", "E D"),
        Row("blocks/ffn/w_in", f"{mlp}.input_linear.weight", "E 2F D"),
        Row("blocks/ffn/w_out", f"{mlp}.output_linear.weight", "E D F"),
        Row("blocks/ffn/output_bias", f"{mlp}.bias", "D"),
    ]


def _moduleformer(c: ModelConfig) -> list[Row]:
    layer = "transformer.h.{}"
    heads, mlp = f"{layer}.attn.q_proj", f"{layer}.mlpf"
    rows = [
        Row("embed", "transformer.wte.weight", "V D"),
        *_layer_norm("blocks/attention_norm", f"{layer}.ln_1"),
        Row("blocks/attention/expert_query", f"{heads}.experts.weight", "A D KH"),
        Row("blocks/attention/expert_output", f"{heads}.output_experts.weight", "A KH D"),
        *_router(c.attention_experts, "blocks/attention/router", f"{heads}.gate", "A"),
        *_layer_norm("blocks/ffn_norm", f"{layer}.ln_2"),
        Row("blocks/ffn/w_in", f"{mlp}.experts.weight", "E D F"),
        Row("blocks/ffn/w_out", f"{mlp}.output_experts.weight", "E F D"),
        *_router(c.experts, "blocks/ffn/router", f"{mlp}.gate", "E"),
        *_layer_norm("norm", "transformer.ln_f"),
        Row("unembed", "lm_head.weight", "V D"),
    ]
    for name in ("key", "value") if c.key_value == "biased" else ():
        theirs = f"{layer}.attn.{name[0]}_proj"
        rows.append(Row(f"blocks/attention/{name}", f"{theirs}.weight", "KH D"))
        rows.append(Row(f"blocks/attention/{name}_bias", f"{theirs}.bias", "KH"))
    return rows


def _layer_norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/scale", f"{theirs}.weight", "D"), Row(f"{ours}/bias", f"{theirs}.bias", "D")]


def _router(mixture: ExpertsConfig, ours: str, theirs: str, count: str) -> list[Row]:
    if mixture.network == "linear":
        return [Row(f"{ours}/weight", f"{theirs}.w_gate.0.weight", f"{count} D")]
    if mixture.network == "mlp":
        return [
            Row(f"{ours}/hidden", f"{theirs}.w_gate.0.weight", "R D"),
            Row(f"{ours}/hidden_bias", f"{theirs}.w_gate.0.bias", "R"),
            Row(f"{ours}/weight", f"{theirs}.w_gate.3.weight", f"{count} R"),
        ]
    return [
        Row(f"{ours}/hidden", f"{theirs}.w_gate.weight", "R D"),
        Row(f"{ours}/weight", f"{theirs}.expert_centroids", f"{count} R"),
        Row(f"{ours}/log_scale", f"{theirs}.temperature", "1"),
    ]


# {type: function}, with the types of `configs`.
TABLES: dict[str, Callable[[ModelConfig], list[Row]]] = {
    "granite": _granite,
    "granitemoe": _granitemoe,
    "granitemoeshared": _granitemoeshared,
    "granitemoehybrid": _granitemoeshared,
    "jetmoe": _jetmoe,
    "llama": _granite,  # the same tensors
    "mixtral": _mixtral,
    "moduleformer": _moduleformer,
    "olmoe": _olmoe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "stickbreaking": _stickbreaking,
    "stickbreaking_attn": _stickbreaking_attn,
    "stickbreaking_interleaved": functools.partial(_stickbreaking, interleaved=True),
}
# The model types that have one tensor for each feed-forward expert.
PER_EXPERT = frozenset({"mixtral", "olmoe", "qwen3_moe"})
