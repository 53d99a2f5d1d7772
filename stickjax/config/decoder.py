"""The config of the decoder. A field of one capital letter is the size of an axis (docs/reference/letters.md)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from stickjax.config.attention import OPTIONS, variant, variants_with
from stickjax.config.experts import ExpertsConfig
from stickjax.config.family import FamilyConfig
from stickjax.config.fields import Dtype, accept_former_names, check_fields, field
from stickjax.config.rope import RopeScaling


@accept_former_names
@dataclass(frozen=True)
class ModelConfig(FamilyConfig):
    """The config of a decoder-only language model. A field of one capital letter is the size of an axis, such as D."""

    MOVED: ClassVar = {
        "E": ("experts.E",), "k": ("experts.k",), "attention_experts": ("attention_experts.E",),
        "new_experts": ("experts.added",), "new_attention_experts": ("attention_experts.added",),
        "gone_experts": ("experts.pruned",), "gone_attention_experts": ("attention_experts.pruned",),
        "pruned": ("experts.pruning", "attention_experts.pruning"),
        "router": ("experts.order", "attention_experts.order"),
        "router_network": ("experts.network", "attention_experts.network"),
        "router_hidden": ("experts.hidden", "attention_experts.hidden"),
        "expert_bias": ("experts.bias", "attention_experts.bias"),
        "sample_topk": ("experts.sample_topk", "attention_experts.sample_topk"),
        "round_rows": ("experts.token_rounding", "attention_experts.token_rounding"),
        "switch_weight": ("experts.switch_weight", "attention_experts.switch_weight"),
        "z_weight": ("experts.z_weight", "attention_experts.z_weight"),
        "mi_weight": ("experts.mi_weight", "attention_experts.mi_weight"),
        "concentration_weight": ("experts.concentration_weight", "attention_experts.concentration_weight"),
        "bias_rate": ("experts.bias_rate", "attention_experts.bias_rate"),
    }  # fmt: skip

    can_change_experts = True

    family: Literal["decoder"] = field(
        "decoder", "name of the model family; it belongs to the config class, so it cannot be changed"
    )
    V: int | None = field(None, "vocabulary size; None: the number of ids of the tokenizer", at_least=1)
    D: int = field(128, "width of the residual stream", at_least=1)
    L: int = field(4, "number of layers", at_least=1)
    N: int = field(4, "number of query heads", at_least=1)
    K: int = field(4, "number of key/value heads; N must be a multiple of K", at_least=1)
    H: int = field(32, "dimension of one head", at_least=1)
    F: int = field(384, "hidden width of the feed-forward network, or of one expert", at_least=1)
    experts: ExpertsConfig = field(ExpertsConfig(), "experts of the feed-forward network; E=0: a dense network")
    attention_experts: ExpertsConfig = field(
        ExpertsConfig(), "experts with K query heads each; E=0: all tokens use the same heads"
    )
    attention: str = field(
        "stick_breaking", "attention variant: stick_breaking, softmax (with rotary positions), or a registered one"
    )
    remainder: Literal["none", "value", "bias"] = field(
        "none",
        "what is multiplied by the rest of the stick and added to the output of a head: nothing (none), the token's "
        "own value (value), or a trainable vector (bias)",
    )
    head_norm: bool = field(
        False, "normalise the output of every head (GroupNorm, one group per head) before the output projection"
    )
    attend_current: bool = field(False, "let a token attend to itself (stick-breaking only)")
    window: int | None = field(
        None, "attend only to keys at most this many tokens to the left; None: attend to all keys", at_least=0
    )
    skip_below: float | None = field(
        None,
        "a base-2 logarithm, such as -24: when less than 2^-24 of the stick remains, skip all keys farther to the left "
        "(stick-breaking only); None: skip no key",
    )
    rope_theta: float | None = field(
        10_000.0, "base of the rotary frequencies (softmax only); None: no positions", above=0
    )
    rope_scaling: RopeScaling = field(RopeScaling(), "how the rotary frequencies are scaled (softmax only)")
    query_key_norm: Literal["none", "head", "all"] = field(
        "none",
        "RMSNorm of queries and keys before the positions: none, one per head with one scale for all heads (head), or "
        "one over the channels of all heads (all)",
    )
    query_key_value_bias: bool = field(False, "add trainable biases to queries, keys and values")
    activation: Literal["swiglu", "geglu", "reglu", "gelu", "gelu_tanh", "relu", "relu2", "silu"] = field(
        "swiglu", "activation function of the feed-forward network"
    )
    key_value: Literal["projected", "biased", "input"] = field(
        "projected",
        "keys and values of attention experts: projected, projected with a bias, or the input itself (K=1, H=D)",
    )
    tied: bool = field(True, "use the embedding matrix also as the output projection")
    norm: Literal["rms", "layer"] = field("rms", "normalisation: RMSNorm, or LayerNorm with a bias")
    norm_eps: float = field(1e-5, "epsilon of every normalisation", above=0)
    final_norm_eps: float | None = field(None, "epsilon of the last normalisation; None: norm_eps", above=0)
    m_width: float = field(1.0, "muP width multiplier: D / base width; the base width is usually 256", above=0)
    m_emb: float = field(1.0, "multiplier of the embedding output", above=0)
    m_res: float = field(1.0, "multiplier of every residual branch: attention, feed-forward network", at_least=0)
    attention_scale: float | None = field(None, "multiplier of q.k; None: 1/sqrt(H). For muP, set it to a constant / H")
    logits_scaling: float | None = field(None, "divisor of the output logits; None: m_width", above=0)
    logits_z_weight: float = field(
        0.0, "weight of the z-loss of the output logits, mean(logsumexp(logits)^2)", at_least=0
    )
    init_std: float = field(
        0.1, "standard deviation of the initial embedding; for matrices it is divided by sqrt(m_width)", above=0
    )
    dtype: Dtype = field("float32", "number type of the computation")
    param_dtype: Dtype = field(
        "float32", "number type of the parameters; for 16-bit types the optimizer keeps float32 copies (masters)"
    )
    remat: Literal["none", "dots", "full"] = field(
        "none",
        "what the backward pass recomputes: nothing (none), all but the matrix products (dots), or whole layers "
        "(full); with remat=none, the parameters that fsdp gathers are kept too",
    )
    implementation: str | None = field(None, "kernels: mosaic, triton, xla, reference; None: the best that works")

    def __post_init__(self):
        check_fields(self)
        if self.N % self.K:
            raise ValueError(f"N={self.N} query heads must be a multiple of K={self.K} key heads")
        self.experts.check("experts", self.experts.k)
        if self.attention_experts.shared:
            raise ValueError(
                f"attention_experts.shared={self.attention_experts.shared} must be 0: only the experts of the "
                "feed-forward network can have a shared network (experts.shared)"
            )
        chosen = self.N // self.K if self.attention_experts.E else 0
        if self.attention_experts.k not in (0, chosen):
            raise ValueError(
                f"attention_experts.k={self.attention_experts.k} must be {chosen}; it is N / K if the model has "
                "attention experts, else 0"
            )
        self.attention_experts.check("attention_experts", chosen)
        if self.attention_experts.E:
            self._check_attention_experts()
        elif self.key_value != "projected":
            raise ValueError(f"key_value={self.key_value!r} needs attention_experts.E >= 1")
        self._check_attention()

    def _check_attention(self):
        kind = variant(self.attention)
        if kind.rotary and self.H % 2:
            raise ValueError(f"H={self.H} must be even for rotary positions")
        for name, absent in OPTIONS.items():
            if (value := getattr(self, name)) != absent and name not in kind.options:
                known = variants_with(lambda kind, name=name: name in kind.options)
                raise ValueError(f"{name}={value!r} needs attention={known}, not {self.attention!r}")

    def _check_attention_experts(self):
        if self.key_value == "input" and (self.K, self.H) != (1, self.D):
            raise ValueError(f"key_value='input' needs K=1 and H=D={self.D}, not K={self.K} and H={self.H}")
        if self.key_value == "input" and variant(self.attention).rotary:
            known = variants_with(lambda kind: not kind.rotary)
            raise ValueError(
                f"key_value='input' needs attention={known}, got attention={self.attention!r}: with key_value='input', "
                "keys and values are the same array, but rotary positions must change only the keys"
            )
        if self.query_key_norm != "none" or self.query_key_value_bias:
            wrong = (
                "query_key_value_bias=True" if self.query_key_value_bias else f"query_key_norm={self.query_key_norm!r}"
            )
            raise ValueError(f"{wrong} needs attention_experts.E=0: attention experts do not support it")
        if self.head_norm:
            raise ValueError("head_norm=True needs attention_experts.E=0: attention experts need head_norm=False")
        if self.remainder == "bias":
            raise ValueError(
                "remainder='bias' needs attention_experts.E=0: attention experts need remainder='none' or 'value'"
            )

    def check_mesh(self, sizes: dict[str, int], T: int) -> None:
        """Raise ValueError if the model, or its sequences of T tokens, cannot be divided over the mesh.

        `sizes` is {mesh axis: its number of devices}.
        """
        if sizes["expert"] > 1 and not self.experts.E:
            raise ValueError(
                f"mesh axis expert={sizes['expert']} needs a model with experts, but the model has experts.E=0; set "
                "mesh.expert=1"
            )
        if sizes["expert"] > 1 and self.experts.added:
            old, added = self.experts.E, self.experts.added
            raise ValueError(
                f"mesh axis expert={sizes['expert']} must be 1 for a model with added experts (it has "
                f"experts.E={old} and experts.added={added})"
            )
        if sizes["context"] > 1 and not variant(self.attention).divides_sequence:
            raise ValueError(
                f"mesh axis context={sizes['context']} needs "
                f"attention={variants_with(lambda kind: kind.divides_sequence)}, got attention={self.attention!r}"
            )
        tensor, context = sizes["tensor"], sizes["context"]
        divided = [
            (
                "T",
                T,
                context > 1 and 2 * context,
                f"2 * context with context={context}, because every device takes two pieces of a sequence",
            ),
            ("D", self.D, sizes["fsdp"], f"fsdp={sizes['fsdp']}"),
            ("E", self.experts.E, sizes["expert"], f"expert={sizes['expert']}"),
            *(
                (f"{name}.hidden", mixture.hidden, sizes["fsdp"], f"fsdp={sizes['fsdp']}")
                for name, mixture in self.mixtures().items()
                if mixture.network != "linear"
            ),
            *((letter, getattr(self, letter), tensor, f"tensor={tensor}") for letter in "NKF"),
            ("experts.shared", self.experts.shared, tensor, f"tensor={tensor}"),
            ("V", self.V or tensor, tensor, f"tensor={tensor}"),  # if V is None, a multiple of tensor is chosen later
        ]
        for letter, size, parts, divisor in divided:
            if parts and size % parts:
                near = -(-size // parts) * parts
                raise ValueError(f"{letter}={size} must be a multiple of {divisor}; {letter}={near} would do")

    def mixtures(self) -> dict[str, ExpertsConfig]:
        """Return {name: `ExpertsConfig`} for each of the fields "experts" and "attention_experts" that has E > 0."""
        return {name: x for name in ("experts", "attention_experts") if (x := getattr(self, name)).E}

    @property
    def scale(self) -> float:
        """The multiplier of the product of a query and a key: `attention_scale`, or 1/sqrt(H) if it is None."""
        return 1 / math.sqrt(self.H) if self.attention_scale is None else self.attention_scale

    @classmethod
    def powerlm_1b(cls, **changes) -> "ModelConfig":
        """Return the config of the 1.2B dense model in the Power scheduler paper, arXiv 2408.13359.

        `changes` are fields with other values, such as L=2.
        """
        return cls(**dict(_POWER, D=1536, L=40, N=24, K=24, F=4096, m_width=6.0, m_res=0.22) | changes)

    @classmethod
    def powermoe_1b(cls, **changes) -> "ModelConfig":
        """Return the config of the 1.3B mixture-of-experts model in the Power scheduler paper, arXiv 2408.13359.

        A token uses 377M of the parameters. `changes` are fields with other values, such as L=2.
        """
        return cls(
            **dict(_POWER, D=1024, L=24, N=16, K=8, F=512, m_width=4.0, m_res=0.28, experts=ExpertsConfig(E=32, k=8))
            | changes
        )

    @classmethod
    def powerlm_3b(cls, **changes) -> "ModelConfig":
        """Return the config of PowerLM-3B (arXiv 2408.13359).

        The muP width multiplier m_width is 8, as published, although its usual value, D / 256, is 9.
        `changes` are fields with other values, such as L=2.
        """
        return cls(**dict(_POWER, D=2304, L=40, N=36, K=36, F=9216, m_width=8.0, m_res=0.22) | changes)

    @classmethod
    def powermoe_3b(cls, **changes) -> "ModelConfig":
        """Return the config of PowerMoE-3B (arXiv 2408.13359). Each token uses 800M of the model's 3.3B parameters.

        `changes` are fields with other values, such as L=2.
        """
        return cls(
            **dict(_POWER, D=1536, L=32, N=24, K=8, F=512, m_width=6.0, m_res=0.22, experts=ExpertsConfig(E=40, k=8))
            | changes
        )

    @classmethod
    def stickbreaking_3b(cls, **changes) -> "ModelConfig":
        """Return the config of the released 3B stick-breaking language model (arXiv 2410.17980).

        The model has no position encoding. The rest of the stick, the attention weight that no key gets, is not used.
        The output projection is not tied to the embedding. `changes` are fields with other values, such as L=2.
        """
        return cls(
            **dict(_POWER, V=50304, D=2304, L=40, N=36, K=36, F=9216, m_width=9.0, m_res=0.22)
            | dict(attention="stick_breaking", tied=False)
            | changes
        )

    @classmethod
    def molm_350m_4b(cls, **changes) -> "ModelConfig":
        """Return the config of MoLM-350M-4B, a released ModuleFormer (arXiv 2306.04640).

        A token uses 366M of the 4.1B parameters. `changes` are fields with other values, such as L=2.

        The initial parameters are drawn from a normal distribution with `init_std`, as for all decoders here. The
        original code initialised the experts by a uniform distribution between -1/n and 1/n, where n is the number of
        inputs of the matrix.
        """
        return cls(**_molm(L=24, k=2) | changes)

    @classmethod
    def molm_700m_4b(cls, **changes) -> "ModelConfig":
        """Return the config of MoLM-700M-4B, a released ModuleFormer (arXiv 2306.04640).

        The model has the sizes of MoLM-350M-4B. In a layer, a token uses four attention experts and four feed-forward
        experts, while in MoLM-350M-4B it uses two of each. `changes` are fields with other values.
        """
        return cls(**_molm(L=24, k=4) | changes)

    @classmethod
    def molm_700m_8b(cls, **changes) -> "ModelConfig":
        """Return the config of MoLM-700M-8B, a released ModuleFormer (arXiv 2306.04640).

        The model has 8.2B parameters in 48 layers. `changes` are fields with other values.
        """
        return cls(**_molm(L=48, k=2) | changes)


# With these fields, the decoder is a ModuleFormer. Its attention and its feed-forward networks are mixtures of experts,
# called modules. The gates are a softmax over all modules of a layer. A token also attends to itself, and the rest of
# the stick is not used.
MODULES: dict[str, Any] = dict(
    attention="stick_breaking", attend_current=True, remainder="none", activation="gelu_tanh", norm="layer", tied=False
)
MODULE_ROUTER: dict[str, Any] = dict(order="softmax_topk", network="mlp")


def _molm(L: int, k: int) -> dict[str, Any]:
    return MODULES | dict(
        V=50295, D=1024, L=L, N=k, K=1, H=1024, F=2048, key_value="input", init_std=0.02,
        dtype="bfloat16", remat="full", experts=ExpertsConfig(E=32, k=k, **MODULE_ROUTER),
        attention_experts=ExpertsConfig(E=16, **MODULE_ROUTER),
    )  # fmt: skip


_POWER: dict[str, Any] = dict(
    V=49152, H=64, m_emb=12.0, attention="softmax", attention_scale=1 / 64, dtype="bfloat16", remat="full"
)
