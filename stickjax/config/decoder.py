"""The decoder as a dataclass; its capital letters are the shape letters of the code (README, "Letters")."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from stickjax.config.attention import OPTIONS, variant, variants_with
from stickjax.config.family import FamilyConfig
from stickjax.config.fields import Dtype, accept_former_names, check_fields, field


@accept_former_names
@dataclass(frozen=True)
class ModelConfig(FamilyConfig):
    """A decoder-only language model. Capital letters are the shape letters of the code."""

    family: Literal["decoder"] = field("decoder", "the kind of model; a config file chooses it by its class")
    V: int | None = field(None, "vocabulary size; None: the ids of the tokenizer", at_least=1)
    D: int = field(128, "width of the residual stream", at_least=1)
    L: int = field(4, "number of layers", at_least=1)
    N: int = field(4, "query heads", at_least=1)
    K: int = field(4, "key/value heads; N must be a multiple of K", at_least=1)
    H: int = field(32, "dimension of one head", at_least=1)
    F: int = field(384, "hidden width of the feed-forward network, of one expert when E > 0", at_least=1)
    E: int = field(0, "experts; 0 makes the feed-forward network dense", at_least=0)
    k: int = field(0, "experts chosen per token", at_least=0)
    attention_experts: int = field(
        0,
        "experts that own K query heads each; a token chooses N / K of them. 0: all tokens share the heads",
        at_least=0,
    )
    attention: str = field(
        "stick_breaking", "stick_breaking, or softmax with rotary positions, or a registered variant"
    )
    remainder: Literal["none", "value", "bias"] = field("none", "what is added for the unbroken rest of the stick")
    head_norm: bool = field(
        False, "normalise every head's output (GroupNorm, a group per head) before the output projection"
    )
    attend_current: bool = field(False, "let a token attend to itself (stick-breaking only)")
    window: int | None = field(None, "attend only to keys at most this far to the left; None: to all", at_least=0)
    skip_below: float | None = field(
        None, "skip blocks once log2 of the stick left is below this (stick-breaking only)"
    )
    rope_theta: float = field(10_000.0, "base of the rotary frequencies (softmax only)", above=0)
    activation: Literal["swiglu", "geglu", "reglu", "gelu", "gelu_tanh", "relu", "relu2", "silu"] = field(
        "swiglu", "feed-forward activation"
    )
    key_value: Literal["projected", "biased", "input"] = field(
        "projected", "keys and values of attention experts: projected, the same with a bias, or the input (K=1, H=D)"
    )
    expert_bias: bool = field(False, "add a bias to the output of every mixture of experts")
    router: Literal["topk_softmax", "softmax_topk"] = field("topk_softmax", "order of the selection and the softmax")
    router_network: Literal["linear", "mlp", "gmm"] = field(
        "linear", "what makes a router's logits; gmm: cosines with a centroid per expert"
    )
    router_hidden: int = field(256, "hidden width of the mlp and gmm router networks", at_least=1)
    new_experts: int = field(0, "experts added to the E of a trained model, in leaves of their own", at_least=0)
    new_attention_experts: int = field(0, "the same for attention_experts", at_least=0)
    pruned_experts: int = field(
        0, "pruned experts that keep their share of the router's softmax", was="gone_experts", at_least=0
    )
    pruned_attention_experts: int = field(0, "the same for attention_experts", was="gone_attention_experts", at_least=0)
    pruned: Literal["no", "old_denominator", "new_denominator"] = field(
        "no", "whether experts were pruned, and whether they still count in the router's softmax"
    )
    sample_topk: int = field(0, "in training, how many of the k experts are sampled instead of the best", at_least=0)
    token_rounding: int = field(
        0,
        "token rounding in training: drop rows with the smallest gates, to a multiple per expert and device; 0: no",
        was="round_rows",
        at_least=0,
    )
    switch_weight: float = field(0.0, "weight of the load-balancing loss E * sum_e f_e P_e", at_least=0)
    z_weight: float = field(0.0, "weight of mean(logsumexp(router logits)^2)", at_least=0)
    mi_weight: float = field(0.0, "weight of the mutual-information loss H(e|x) - H(e)", at_least=0)
    concentration_weight: float = field(
        0.0, "weight of H(e): fine-tuning with it leaves few experts in use", at_least=0
    )
    bias_rate: float = field(0.0, "step of the auxiliary-loss-free router bias; 0: no bias", at_least=0)
    tied: bool = field(True, "share the embedding with the output projection")
    norm: Literal["rms", "layer"] = field("rms", "normalisation: RMSNorm, or LayerNorm with a bias")
    norm_eps: float = field(1e-5, "epsilon of every normalisation", above=0)
    final_norm_eps: float | None = field(None, "epsilon of the last normalisation; None: norm_eps", above=0)
    m_width: float = field(1.0, "muP width multiplier: D / 256 by its usual base width", above=0)
    m_emb: float = field(1.0, "multiplier of the embedding output", above=0)
    m_res: float = field(1.0, "multiplier of every residual branch", at_least=0)
    attention_scale: float | None = field(
        None, "multiplier of q.k; None: 1/sqrt(H). muP asks for one that is constant / H"
    )
    logits_scaling: float | None = field(None, "divisor of the output logits; None: m_width", above=0)
    init_std: float = field(0.1, "standard deviation of the embedding; matrices have init_std / sqrt(m_width)", above=0)
    dtype: Dtype = field("float32", "type of the computation")
    param_dtype: Dtype = field(
        "float32", "type of the stored parameters; if it is below float32, the optimizer state has float32 masters"
    )
    remat: Literal["none", "dots", "full"] = field(
        "none", "what a layer recomputes in the backward pass; none also keeps the parameters that fsdp gathers"
    )
    implementation: str | None = field(None, "kernels: mosaic, triton, xla, reference; None: the best that works")

    def __post_init__(self):
        check_fields(self)
        if self.N % self.K:
            raise ValueError(f"N={self.N} query heads must be a multiple of K={self.K} key heads")
        if self.k > self.E:
            raise ValueError(f"k={self.k} experts per token cannot exceed E={self.E} experts")
        if self.E and not self.k:
            raise ValueError(f"E={self.E} experts need k >= 1 experts per token")
        if self.E and self.k == 1 and self.router == "topk_softmax":
            raise ValueError(
                "k=1 with router='topk_softmax' has a constant gate and trains no router; use k >= 2 or 'softmax_topk'"
            )
        if self.attention_experts:
            self._check_attention_experts()
        elif self.key_value != "projected":
            raise ValueError(f"key_value={self.key_value!r} needs attention_experts, which own the queries alone")
        self._check_modules()
        if self.token_rounding and not (self.E or self.attention_experts):
            raise ValueError(f"token_rounding={self.token_rounding} needs experts, but E=0")
        if self.bias_rate and not (self.E or self.attention_experts):
            raise ValueError(f"bias_rate={self.bias_rate} needs experts, but E=0")
        if self.sample_topk > self.k and (self.E or not self.attention_experts):
            raise ValueError(f"sample_topk={self.sample_topk} cannot exceed k={self.k}")
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
        chosen, E = self.N // self.K, self.attention_experts
        choice = f"N / K = {chosen} experts of K={self.K} heads per token"
        if chosen > E:
            raise ValueError(f"{choice} cannot exceed attention_experts={E}")
        if chosen == 1 and self.router == "topk_softmax":
            raise ValueError(
                f"{choice} with router='topk_softmax' train no router; use N = 2 K or more or 'softmax_topk'"
            )
        if self.sample_topk > chosen:
            raise ValueError(f"sample_topk={self.sample_topk} cannot exceed {choice}")
        if self.key_value == "input" and (self.K, self.H) != (1, self.D):
            raise ValueError(f"key_value='input' needs K=1 and H=D={self.D}, not K={self.K} and H={self.H}")
        if self.key_value == "input" and variant(self.attention).rotary:
            known = variants_with(lambda kind: not kind.rotary)
            raise ValueError(f"key_value='input' needs attention={known}: rotary positions turn only the keys")
        if self.head_norm or self.remainder == "bias":
            raise ValueError("head_norm and remainder='bias' need heads that all tokens share, not attention_experts")

    def _check_modules(self):
        for experts in ("experts", "attention_experts"):
            E, new, pruned = (
                getattr(self, "E" if experts == "experts" else experts),
                *(getattr(self, f"{what}_{experts}") for what in ("new", "pruned")),
            )
            if (new or pruned) and not E:
                raise ValueError(f"new_{experts}={new} and pruned_{experts}={pruned} need experts, but there are none")
            if pruned and self.pruned != "old_denominator":
                raise ValueError(f"pruned_{experts}={pruned} needs pruned='old_denominator'")

    def check_mesh(self, sizes: dict[str, int], T: int) -> None:
        """Raise ValueError for axes that do not divide the model or its sequences of T tokens."""
        if sizes["expert"] > 1 and not self.E:
            raise ValueError(f"expert={sizes['expert']} divides the experts, but E=0")
        if sizes["expert"] > 1 and self.new_experts:
            raise ValueError(
                f"expert={sizes['expert']} cannot divide new_experts={self.new_experts} from E={self.E} old ones"
            )
        if sizes["context"] > 1 and not variant(self.attention).divides_sequence:
            raise ValueError(
                f"context={sizes['context']} needs attention={variants_with(lambda kind: kind.divides_sequence)}"
            )
        tensor, context = sizes["tensor"], sizes["context"]
        divided = [
            (
                "T",
                T,
                context > 1 and 2 * context,
                f"2 x context={context}, because every device takes two pieces",
            ),
            ("D", self.D, sizes["fsdp"], f"fsdp={sizes['fsdp']}"),
            ("E", self.E, sizes["expert"], f"expert={sizes['expert']}"),
            (
                "router_hidden",
                self.router_hidden,
                self.router_network != "linear" and sizes["fsdp"],
                f"fsdp={sizes['fsdp']}",
            ),
            *((letter, getattr(self, letter), tensor, f"tensor={tensor}") for letter in "NKF"),
            ("V", self.V or tensor, tensor, f"tensor={tensor}"),  # if V is None, it will become a multiple
        ]
        for letter, size, parts, divisor in divided:
            if parts and size % parts:
                near = -(-size // parts) * parts
                raise ValueError(f"{letter}={size} must be a multiple of {divisor}; {letter}={near} would do")

    @property
    def scale(self) -> float:
        """Multiplier of q.k."""
        return 1 / math.sqrt(self.H) if self.attention_scale is None else self.attention_scale

    @classmethod
    def powerlm_1b(cls, **changes) -> "ModelConfig":
        """1.2B dense model of the Power scheduler paper (arXiv 2408.13359)."""
        return cls(**dict(_POWER, D=1536, L=40, N=24, K=24, F=4096, m_width=6.0, m_res=0.22) | changes)

    @classmethod
    def powermoe_1b(cls, **changes) -> "ModelConfig":
        """1.3B model with 377M active parameters of the Power scheduler paper."""
        return cls(**dict(_POWER, D=1024, L=24, N=16, K=8, F=512, E=32, k=8, m_width=4.0, m_res=0.28) | changes)

    @classmethod
    def powerlm_3b(cls, **changes) -> "ModelConfig":
        """PowerLM-3B; its published m_width is 8, though 2304 / 256 = 9."""
        return cls(**dict(_POWER, D=2304, L=40, N=36, K=36, F=9216, m_width=8.0, m_res=0.22) | changes)

    @classmethod
    def powermoe_3b(cls, **changes) -> "ModelConfig":
        """PowerMoE-3B: 3.3B parameters, 800M active."""
        return cls(**dict(_POWER, D=1536, L=32, N=24, K=8, F=512, E=40, k=8, m_width=6.0, m_res=0.22) | changes)

    @classmethod
    def stickbreaking_3b(cls, **changes) -> "ModelConfig":
        """The released 3B stick-breaking model: no positions, no remainder, an output matrix of its own."""
        return cls(
            **dict(_POWER, V=50304, D=2304, L=40, N=36, K=36, F=9216, m_width=9.0, m_res=0.22)
            | dict(attention="stick_breaking", tied=False)
            | changes
        )

    @classmethod
    def molm_350m_4b(cls, **changes) -> "ModelConfig":
        """MoLM-350M-4B, a released ModuleFormer (arXiv 2306.04640): 4.1B parameters, 366M active.

        A new model is initialised like every decoder here, by a normal distribution with `init_std`. The original's
        experts were initialised uniformly within 1 / (number of inputs of the matrix).
        """
        return cls(**dict(_MOLM, L=24, N=2, k=2) | changes)

    @classmethod
    def molm_700m_4b(cls, **changes) -> "ModelConfig":
        """MoLM-700M-4B: the same parameters, with four active modules of each kind."""
        return cls(**dict(_MOLM, L=24, N=4, k=4) | changes)

    @classmethod
    def molm_700m_8b(cls, **changes) -> "ModelConfig":
        """MoLM-700M-8B: 8.2B parameters in 48 layers."""
        return cls(**dict(_MOLM, L=48, N=2, k=2) | changes)


# With these fields the decoder is a ModuleFormer: it has modules for attention and for the feed-forward part, a softmax
# over all modules gives the gates, and attention includes the token itself and ignores the remainder of the stick.
MODULES: dict[str, Any] = dict(
    attention="stick_breaking", attend_current=True, remainder="none", router="softmax_topk", router_network="mlp",
    activation="gelu_tanh", norm="layer", tied=False,
)  # fmt: skip
_MOLM: dict[str, Any] = MODULES | dict(
    V=50295, D=1024, K=1, H=1024, F=2048, E=32, attention_experts=16, key_value="input", init_std=0.02,
    dtype="bfloat16", remat="full",
)  # fmt: skip
_POWER: dict[str, Any] = dict(
    V=49152, H=64, m_emb=12.0, attention="softmax", attention_scale=1 / 64, dtype="bfloat16", remat="full"
)
