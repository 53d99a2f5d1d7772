"""The tables of tensor names: one function per model_type returns the rows of its table.

The top of `names` explains the letters of the axes. A tensor is an array of a Hugging Face folder, and a leaf is a
parameter of the stickjax model.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from pallas_kernels.scatter_moe.call import GATED
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


def _biases(layer: str) -> list[Row]:
    sizes = {"query": "NH", "key": "KH", "value": "KH"}
    return [Row(f"blocks/attention/{n}_bias", f"{layer}.{n[0]}_proj.bias", size) for n, size in sizes.items()]


def _norms(layer: str, query: str, key: str) -> list[Row]:
    return [
        Row("blocks/attention/query_norm/scale", f"{layer}.q_norm.weight", query),
        Row("blocks/attention/key_norm/scale", f"{layer}.k_norm.weight", key),
    ]


def _qwen3(c: ModelConfig) -> list[Row]:
    return [*_granite(c), *_norms("model.layers.{}.self_attn", "H", "H")]


def _each_expert(c: ModelConfig, moe: str, names: tuple[str, str, str]) -> list[Row]:
    """Return the rows of the router and of the experts, for a model type that has separate tensors for each expert.

    `moe` is the name of the module with the router and the experts. `names` are the names of the matrices of an expert:
    (gate, up, down). The rows of one leaf come one after the other. `names.tensors_from_leaves` keeps only one layer of
    one leaf in memory, so it would read a layer several times if the rows of two leaves alternated.
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
    """Return the table of granitemoeshared and granitemoehybrid. Without experts, there is only the shared network."""
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
    rows += _biases(f"{layer}.attn") if c.query_key_value_bias else []
    rows += _norms(f"{layer}.attn", "H", "H") if c.query_key_norm != "none" else []
    return rows + ([] if c.tied else [Row("unembed", "lm_head.weight", "V D")])


def _stickbreaking(c: ModelConfig, interleaved: bool = False) -> list[Row]:
    """Return the table of stickbreaking.

    The tensor c_fc has gate rows, and up rows, which the gate multiplies. `interleaved`: True if gate and up rows
    alternate; False if all up rows come first.
    """
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

    Each row of the table maps one of these N / K + 2 heads, for all key heads. `theirs` is the name of the tensor, and
    `axes` are its axes. `end` is the end of the names of the parameters: "" for the matrices, "_bias" for the biases.
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
    hidden = "S" if count == "A" else "R"
    if mixture.network == "linear":
        return [Row(f"{ours}/weight", f"{theirs}.w_gate.0.weight", f"{count} D")]
    if mixture.network == "mlp":
        return [
            Row(f"{ours}/hidden", f"{theirs}.w_gate.0.weight", f"{hidden} D"),
            Row(f"{ours}/hidden_bias", f"{theirs}.w_gate.0.bias", hidden),
            Row(f"{ours}/weight", f"{theirs}.w_gate.3.weight", f"{count} {hidden}"),
        ]
    return [
        Row(f"{ours}/hidden", f"{theirs}.w_gate.weight", f"{hidden} D"),
        Row(f"{ours}/weight", f"{theirs}.expert_centroids", f"{count} {hidden}"),
        Row(f"{ours}/log_scale", f"{theirs}.temperature", "1"),
    ]


def _stickjax(c: ModelConfig) -> list[Row]:
    """Return the table of the type `stickjax`. The names of the tensors come from the modules in `remote_code`."""
    layer = "model.layers.{}"
    norms = {
        "blocks/attention_norm": f"{layer}.input_layernorm",
        "blocks/ffn_norm": f"{layer}.post_attention_layernorm",
        "norm": "model.norm",
    }
    rows = [Row("embed", "model.embed_tokens.weight", "V D")]
    rows += [] if c.tied else [Row("unembed", "lm_head.weight", "V D")]
    for ours, theirs in norms.items():
        rows += _layer_norm(ours, theirs)[: 2 if c.norm == "layer" else 1]
    heads = _mixture_of_heads if c.attention_experts.E else _heads
    return rows + heads(c, f"{layer}.self_attn") + _feed_forward(c, f"{layer}.mlp")


def _heads(c: ModelConfig, theirs: str) -> list[Row]:
    ours, all_heads = "blocks/attention", c.query_key_norm == "all"
    rows = _attention(theirs)
    rows += _biases(theirs) if c.query_key_value_bias else []
    if c.query_key_norm != "none":
        rows += _norms(theirs, "NH" if all_heads else "H", "KH" if all_heads else "H")
    rows += [Row(f"{ours}/head_bias", f"{theirs}.head_bias", "N H")] if c.remainder == "bias" else []
    if c.head_norm:
        rows += [Row(f"{ours}/norm/scale", f"{theirs}.head_norm.weight", "N H")]
        rows += [Row(f"{ours}/norm/bias", f"{theirs}.head_norm.bias", "N H")]
    return rows


def _mixture_of_heads(c: ModelConfig, theirs: str) -> list[Row]:
    ours, mixture = "blocks/attention", c.attention_experts
    rows = _routed(mixture, ours, theirs, "A")
    rows += [Row(f"{ours}/expert_query", f"{theirs}.query", "A KH D")]
    rows += [Row(f"{ours}/expert_output", f"{theirs}.output", "A D KH")]
    for name in ("key", "value") if c.key_value != "input" else ():
        rows += [Row(f"{ours}/{name}", f"{theirs}.{name[0]}_proj.weight", "KH D")]
    return rows + (_biases(theirs)[1:] if c.key_value == "biased" else [])


def _feed_forward(c: ModelConfig, theirs: str) -> list[Row]:
    ours, gates = "blocks/ffn", 2 if c.activation in GATED else ""
    if not c.experts.E:
        return [
            Row(f"{ours}/w_in", f"{theirs}.input_linear.weight", f"{gates}F D"),
            Row(f"{ours}/w_out", f"{theirs}.output_linear.weight", "D F"),
        ]
    rows = _routed(c.experts, ours, theirs, "E")
    rows += [Row(f"{ours}/w_in", f"{theirs}.input", f"E {gates}F D"), Row(f"{ours}/w_out", f"{theirs}.output", "E D F")]
    if c.experts.shared:
        rows += [Row(f"{ours}/shared/w_in", f"{theirs}.shared.input_linear.weight", f"{gates}W D")]
        rows += [Row(f"{ours}/shared/w_out", f"{theirs}.shared.output_linear.weight", "D W")]
    return rows


def _routed(mixture: ExpertsConfig, ours: str, theirs: str, count: str) -> list[Row]:
    """Return the rows of the router of a mixture and of its output bias, for the type `stickjax`.

    `ours` and `theirs` are the names of the mixture in stickjax and in the folder. `count` is the letter of the number
    of experts: "A" in attention, "E" in a feed-forward network.
    """
    linear, hidden = mixture.network == "linear", "S" if count == "A" else "R"
    rows = [Row("router/weight", "router.weight", f"{count} {'D' if linear else hidden}")]
    rows += [] if linear else [Row("router/hidden", "router.hidden.weight", f"{hidden} D")]
    rows += [Row("router/hidden_bias", "router.hidden.bias", hidden)] if mixture.network == "mlp" else []
    rows += [Row("router/log_scale", "router.log_scale", "1")] if mixture.network == "gmm" else []
    rows += [Row("router/selection_bias", "router.selection_bias", count)] if mixture.bias_rate else []
    rows += [Row("output_bias", "output_bias", "D")] if mixture.bias else []
    return [row._replace(ours=f"{ours}/{row.ours}", theirs=f"{theirs}.{row.theirs}") for row in rows]


# {type: function that returns its table}. The types are the types in `configs`.
TABLES: dict[str, Callable[[ModelConfig], list[Row]]] = {
    "granite": _granite,
    "granitemoe": _granitemoe,
    "granitemoeshared": _granitemoeshared,
    "granitemoehybrid": _granitemoeshared,
    "jetmoe": _jetmoe,
    "llama": _granite,  # the same tensors as granite
    "mixtral": _mixtral,
    "moduleformer": _moduleformer,
    "olmoe": _olmoe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "stickbreaking": _stickbreaking,
    "stickbreaking_attn": _stickbreaking_attn,
    "stickjax": _stickjax,
    "stickbreaking_interleaved": functools.partial(_stickbreaking, interleaved=True),
}
# The model types that have one tensor for each feed-forward expert.
PER_EXPERT = frozenset({"mixtral", "olmoe", "qwen3_moe"})
