"""The config.json of each published model loads unchanged, and the model has the published number of parameters.

The configs here keep the entries that have no effect, because users load the whole config.json. In PUBLISHED, a source
of the form owner/name is a model repository on the Hugging Face hub, and "safetensors" means that the number of
parameters was counted in the safetensors files of the repository. A number of parameters that is a string, such as
"3.51B", is from a model card or a paper, and is rounded or truncated.
"""

from pathlib import Path

import jax
import pytest

from stickjax.config import ModelConfig
from stickjax.models.transformer import init
from stickjax.storage.hugging_face.configs import _effective, to_model_config

_GRANITE = dict(
    architectures=["GraniteForCausalLM"], model_type="granite", attention_bias=False, attention_dropout=0.1,
    attention_multiplier=1 / 64, bos_token_id=0, embedding_multiplier=12.0, eos_token_id=0, hidden_act="silu",
    hidden_size=2048, initializer_range=0.02, intermediate_size=8192, logits_scaling=8.0,
    max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32, num_hidden_layers=40,
    num_key_value_heads=8, pad_token_id=0, residual_multiplier=0.22, rms_norm_eps=1e-5, rope_scaling=None,
    rope_theta=5e6, tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.47.0", use_cache=True,
    vocab_size=49155,
)  # fmt: skip
_GRANITE_8B = dict(
    attention_multiplier=1 / 128, hidden_size=4096, intermediate_size=12800, logits_scaling=16.0, rope_theta=1e7
)
_GRANITEMOE = {name: x for name, x in _GRANITE.items() if name != "mlp_bias"} | dict(
    architectures=["GraniteMoeForCausalLM"], model_type="granitemoe", attention_dropout=0.0, hidden_size=1536,
    intermediate_size=512, logits_scaling=6.0, num_attention_heads=24, num_experts_per_tok=8, num_hidden_layers=32,
    num_local_experts=40, output_router_logits=False, rms_norm_eps=1e-6, rope_theta=10000, router_aux_loss_coef=0.001,
)  # fmt: skip
_GRANITE_4 = _GRANITE | dict(
    architectures=["GraniteMoeHybridForCausalLM"], model_type="granitemoehybrid", attention_dropout=0.0,
    bos_token_id=100257, embedding_multiplier=12, eos_token_id=100257, hidden_size=2560, initializer_range=0.1,
    layer_types=["attention"] * 40, logits_scaling=10, mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4,
    mamba_d_head=40, mamba_d_state=256, mamba_expand=2, mamba_n_groups=1, mamba_n_heads=128, mamba_proj_bias=False,
    normalization_function="rmsnorm", num_attention_heads=40, num_experts_per_tok=0, num_local_experts=0,
    position_embedding_type="rope", rope_theta=1e7, shared_intermediate_size=8192, vocab_size=100352,
)  # fmt: skip
_POWER = dict(vocab_size=49152, rope_theta=10000)
_JETMOE = dict(
    activation_function="silu", architectures=["JetMoEForCausalLM"], bias=True, bos_token_id=1, eos_token_id=2,
    ffn_hidden_size=5632, glu=True, hidden_size=2048, initializer_range=0.01, kv_channels=128,
    layer_norm_epsilon=1e-5, max_position_embeddings=4096, model_type="jetmoe", moe_num_experts=8, moe_top_k=2,
    n_positions=4096, num_attention_heads=32, num_hidden_layers=24, num_key_value_heads=16, num_layers=24,
    rms_norm_eps=1e-5, rope_theta=10000.0, rotary_percent=1.0, torch_dtype="bfloat16", use_cache=True,
    vocab_size=32000,
)  # fmt: skip
_MOLM = dict(
    activation_function="gelu_new", architectures=["ModuleFormerForCausalLM"], att_func="stickbreaking",
    att_hidden=1024, attn_pdrop=0, aux_loss_type="mi", aux_loss_weight=0, block_size=512, bos_token_id=50256,
    embd_pdrop=0, eos_token_id=50256, ffd_hidden=2048, gate_type="mlp", gating_size=256, history_length=512,
    initializer_range=0.02, k_att=2, k_mlp=2, layer_norm_epsilon=1e-5, local_size=1, model_type="moduleformer",
    moe_pdrop=0, moe_type="moe", n_att_experts=16, n_ctx=24576, n_embd=1024, n_head=1, n_layer=48, n_mlp_experts=32,
    pre_norm=True, resid_pdrop=0, sample_topk=0, tie_word_embeddings=False, torch_dtype="bfloat16", universal=False,
    use_cache=True, vocab_size=50295, world_size=None,
)  # fmt: skip
_LLAMA = dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009], hidden_act="silu", hidden_size=2048, initializer_range=0.02,
    intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, model_type="llama",
    num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5,
    rope_scaling={
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True, vocab_size=128256,
)  # fmt: skip
_LLAMA_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, tie_word_embeddings=False,
    rope_scaling=_LLAMA["rope_scaling"] | {"factor": 8.0},
)  # fmt: skip
_SMOLLM2 = _LLAMA | dict(
    bos_token_id=0, eos_token_id=0, head_dim=64, hidden_size=576, initializer_range=1 / 24, intermediate_size=1536,
    is_llama_config=True, max_position_embeddings=8192, num_attention_heads=9, num_hidden_layers=30,
    num_key_value_heads=3, rope_interleaved=False, rope_scaling=None, rope_theta=100000, vocab_size=49152,
)  # fmt: skip
_SMOLLM2_17B = dict(
    hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_hidden_layers=24, num_key_value_heads=32,
    rope_theta=130000, **{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
)  # fmt: skip
_MIXTRAL = dict(
    architectures=["MixtralForCausalLM"], attention_dropout=0.0, bos_token_id=1, eos_token_id=2, hidden_act="silu",
    hidden_size=4096, initializer_range=0.02, intermediate_size=14336, max_position_embeddings=32768,
    model_type="mixtral", num_attention_heads=32, num_experts_per_tok=2, num_hidden_layers=32, num_key_value_heads=8,
    num_local_experts=8, output_router_logits=False, rms_norm_eps=1e-5, rope_theta=1e6, router_aux_loss_coef=0.02,
    sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, vocab_size=32000,
)  # fmt: skip
_QWEN3 = dict(
    architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
    eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=1024, initializer_range=0.02,
    intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, model_type="qwen3",
    num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None,
    rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True,
    use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
_QWEN3_MOE = _QWEN3 | dict(
    architectures=["Qwen3MoeForCausalLM"], decoder_sparse_step=1, hidden_size=2048, intermediate_size=6144,
    max_window_layers=48, mlp_only_layers=[], model_type="qwen3_moe", moe_intermediate_size=768, norm_topk_prob=True,
    num_attention_heads=32, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48, num_key_value_heads=4,
    output_router_logits=False, router_aux_loss_coef=0.001, tie_word_embeddings=False,
)  # fmt: skip
_OLMOE = dict(
    architectures=["OlmoeForCausalLM"], attention_bias=False, attention_dropout=0.0, clip_qkv=None,
    eos_token_id=50279, hidden_act="silu", hidden_size=2048, initializer_range=0.02, intermediate_size=1024,
    max_position_embeddings=4096, model_type="olmoe", norm_topk_prob=False, num_attention_heads=16, num_experts=64,
    num_experts_per_tok=8, num_hidden_layers=16, num_key_value_heads=16, output_router_logits=False, pad_token_id=1,
    rope_scaling=None, rope_theta=10000.0, router_aux_loss_coef=0.01, tie_word_embeddings=False,
    torch_dtype="bfloat16", use_cache=True, vocab_size=50304,
)  # fmt: skip

# The published file lacks use_interleaved_weights, the order of the rows of mlp.c_fc. Users must add this entry.
_STICKBREAKING = dict(
    activation_function="swiglu", add_bias=False, add_qkv_bias=False, attention_head_type="mha",
    attention_multiplier=1 / 64, attention_softmax_in_fp32=True, attn_pdrop=0, bos_token_id=0, embd_pdrop=0,
    eos_token_id=0, init_method="mup", initializer_range=0.1, layer_norm_epsilon=1e-5, m_emb=12, m_residual=0.22,
    m_width=9, model_type="stickbreaking", multi_query=False, n_embd=2304, n_head=36, n_inner=9216, n_layer=40,
    n_positions=4096, normalization_function="rmsnorm", num_key_value_heads=36, pad_token_id=50256,
    position_embedding_type="nope", resid_pdrop=0, sb_remainder=False, scale_attn_weights=True,
    transformers_version="4.45.0", upcast_logits_for_loss=True, use_cache=True, vocab_size=50304,
    use_interleaved_weights=False,
)  # fmt: skip

# {model: (config.json, number of parameters, where the two are published)}
PUBLISHED = {
    "Granite 3.1 2B": (_GRANITE, 2_533_531_648, "ibm-granite/granite-3.1-2b-instruct: config.json, safetensors"),
    "Granite 3.1 8B": (
        _GRANITE | _GRANITE_8B, 8_170_848_256, "ibm-granite/granite-3.1-8b-instruct: config.json, safetensors"
    ),
    "Granite 3.1 1B-A400M": (
        _GRANITEMOE | dict(
            hidden_size=1024, num_attention_heads=16, num_hidden_layers=24, num_local_experts=32, rope_theta=1.5e6,
            router_aux_loss_coef=0.0,
        ), 1_334_628_352, "ibm-granite/granite-3.1-1b-a400m-instruct: config.json, safetensors",
    ),
    "Granite 3.0 3B-A800M": (
        _GRANITEMOE, 3_298_793_472, "ibm-granite/granite-3.0-3b-a800m-instruct: config.json, safetensors"
    ),
    # 4.0 Micro and 4.1 3B have the same sizes and different model types.
    "Granite 4.0 Micro": (_GRANITE_4, 3_402_836_480, "ibm-granite/granite-4.0-micro: config.json, GGUF, safetensors"),
    "Granite 4.1 3B": (
        _GRANITE | dict(hidden_size=2560, num_attention_heads=40, logits_scaling=10.0, vocab_size=100352),
        3_402_836_480, "ibm-granite/granite-4.1-3b: config.json (sizes, multipliers), safetensors",
    ),
    "PowerLM-3b": (
        _GRANITE | _POWER | dict(hidden_size=2304, intermediate_size=9216, num_attention_heads=36,
                                 num_key_value_heads=36),
        "3.51B", "arXiv 2408.13359: sizes, multipliers; ibm/PowerLM-3b: 14.05 GB of safetensors in float32",
    ),
    "PowerMoE-3b": (
        _GRANITEMOE | _POWER, "3.30B", "arXiv 2408.13359: sizes, multipliers; ibm/PowerMoE-3b: model_type"
    ),
    "JetMoE-8b": (_JETMOE, "8B", "jetmoe/jetmoe-8b: config.json, model card"),
    "MoLM-700M-8B": (_MOLM, 8_182_046_720, "ibm/MoLM-700M-8B: config.json, bytes of the tensors"),
    "MoLM-350M-4B": (_MOLM | dict(n_layer=24), 4_142_526_464, "ibm/MoLM-350M-4B: bytes of the tensors"),
    "stickbreaking-3b": (_STICKBREAKING, "3.629B", "shawntan/stickbreaking-3b: config.json, tensors with lm_head"),
    "Llama 3.1 8B": (
        _LLAMA | _LLAMA_8B, 8_030_261_248, "meta-llama/Llama-3.1-8B-Instruct: config.json, safetensors"
    ),
    "Llama 3.2 1B": (
        _LLAMA | dict(head_dim=64), "1.23B", "meta-llama/Llama-3.2-1B-Instruct: config.json; "
        "github meta-llama/llama-models, models/llama3_2/MODEL_CARD.md",
    ),
    "Llama 3.2 3B": (
        _LLAMA | dict(head_dim=128, hidden_size=3072, num_attention_heads=24, num_hidden_layers=28), "3.21B",
        "meta-llama/Llama-3.2-3B-Instruct: config.json; github meta-llama/llama-models, "
        "models/llama3_2/MODEL_CARD.md",
    ),
    "SmolLM2 135M": (_SMOLLM2, 134_515_008, "HuggingFaceTB/SmolLM2-135M: config.json, safetensors"),
    "SmolLM2 1.7B": (
        _SMOLLM2 | _SMOLLM2_17B, 1_711_376_384, "HuggingFaceTB/SmolLM2-1.7B-Instruct: config.json, safetensors"
    ),
    "Mixtral 8x7B": (_MIXTRAL, 46_702_792_704, "mistralai/Mixtral-8x7B-v0.1: config.json, safetensors"),
    "Qwen3 0.6B": (_QWEN3, 596_049_920, "Qwen/Qwen3-0.6B: config.json, safetensors"),
    "Qwen3 30B-A3B": (_QWEN3_MOE, 30_532_122_624, "Qwen/Qwen3-30B-A3B: config.json, safetensors"),
    "OLMoE-1B-7B": (_OLMOE, 6_919_161_856, "allenai/OLMoE-1B-7B-0924: config.json, safetensors"),
}  # fmt: skip
# The config.json of these models was not found. Their entries above have the sizes and multipliers of the papers, under
# the names that the model_type uses. docs/guides/hugging_face.md lists these models as unverified.
UNVERIFIED = ("PowerLM-3b", "PowerMoE-3b", "MoLM-350M-4B")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_loads_and_has_the_published_number_of_parameters(name):
    tree, total, source = PUBLISHED[name]
    model, T = to_model_config(tree)
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    if isinstance(total, int):
        assert count == total, source
    else:  # a rounded or cut-off number differs by less than one unit of its last digit
        unit = 10.0 ** (9 - len(total[:-1].partition(".")[2]))
        assert abs(count - float(total[:-1]) * 1e9) < unit, (count, source)
    assert T == next(tree[n] for n in ("max_position_embeddings", "block_size", "n_positions") if n in tree)


def test_the_preset_of_the_released_stick_breaking_model_is_its_config():
    assert _effective(to_model_config(_STICKBREAKING)[0]) == _effective(ModelConfig.stickbreaking_3b())


def test_the_guide_lists_these_models():
    guide = (Path(__file__).parent.parent / "docs/guides/hugging_face.md").read_text()
    listed, unverified = (" ".join(x.split()) for x in guide.split("## Published models")[1].split("Unverified:"))
    for name in PUBLISHED:
        assert name in listed
        assert (name in unverified.split(". ")[0]) == (name in UNVERIFIED)
