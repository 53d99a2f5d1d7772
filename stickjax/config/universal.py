"""The config of the Sparse Universal Transformer. A field of one capital letter is the size of an axis."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from stickjax.config.experts import ExpertsConfig
from stickjax.config.family import FamilyConfig
from stickjax.config.fields import Dtype, accept_former_names, check_fields, field


@accept_former_names
@dataclass(frozen=True)
class SutConfig(FamilyConfig):
    """The config of a Sparse Universal Transformer: a model whose single layer, the block, is applied up to L times.

    After each application of the block, a halting probability is computed for every token. A token halts when the sum
    of its halting probabilities exceeds `halting_threshold`. Then its output no longer changes.

    `act_weight` and the `mi_weight` of the experts multiply losses that are added to the *mean* cross-entropy of the
    tokens. The original code adds these losses to the *sum* of the cross-entropy over the 8192 tokens of a worker. So a
    weight of 0.1 in the original code corresponds to 0.1 / 8192 here.
    """

    MOVED: ClassVar = {
        "E": ("experts.E",), "k": ("experts.k",), "attention_experts": ("attention_experts.E",),
        "attention_k": ("attention_experts.k",), "sample_topk": ("attention_experts.sample_topk",),
        "mi_weight": ("experts.mi_weight", "attention_experts.mi_weight"),
    }  # fmt: skip

    accumulates = False  # because the mean halting step in the loss is a mean over the whole batch

    family: Literal["sut"] = field(
        "sut", "name of the model family; it belongs to the config class, so it cannot be changed"
    )
    V: int | None = field(
        None,
        "vocabulary size; None: the number of token ids of the data; for sentence pairs, id 0 is padding",
        at_least=1,
    )
    D: int = field(128, "width of the residual stream", at_least=1)
    L: int = field(6, "largest number of times that the block is applied", at_least=1)
    K: int = field(
        2, "query heads of one attention expert; also the number of key/value heads, which experts share", at_least=1
    )
    H: int = field(32, "dimension of one head", at_least=1)
    F: int = field(256, "hidden width of one feed-forward expert", at_least=1)
    experts: ExpertsConfig = field(ExpertsConfig(E=8, k=2), "experts of the feed-forward network")
    attention_experts: ExpertsConfig = field(ExpertsConfig(E=8, k=2), "experts with K query heads each")
    attention: Literal["softmax", "stick_breaking"] = field(
        "softmax",
        "softmax: with relative positions, causal in a language model but not in a classifier; stick_breaking: causal, "
        "without positions",
    )
    clip: int = field(
        64, "relative positions are -(clip - 1) to clip - 1; larger distances are clipped (softmax only)", at_least=1
    )
    sinusoidal: bool = field(True, "add sinusoidal positions to the embedding (softmax only)")
    normalize_before: bool = field(
        False,
        "True: normalise the input of attention and of the feed-forward network (pre-norm); False: normalise the "
        "residual stream after each of them (post-norm)",
    )
    halting_threshold: float = field(
        0.999,
        "a token halts when the sum of its halting probabilities exceeds this; can be changed after training",
        above=0,
        at_most=1,
    )
    halting_bias: float = field(
        0.0, "added to the logit of not halting; 2, for example, makes a new model use more steps"
    )
    act_weight: float = field(0.0, "weight of a loss: the mean halting step of the tokens", at_least=0)
    dropout: float = field(
        0.0,
        "dropout in training: of embeddings, residual branches, attention, hidden units and routers",
        at_least=0,
        below=1,
    )
    classes: int = field(0, "number of labels of a pair of sentences; 0: a causal language model", at_least=0)
    norm_eps: float = field(1e-5, "epsilon of every normalisation", above=0)
    dtype: Dtype = field("float32", "number type of the computation")
    param_dtype: Dtype = field(
        "float32", "number type of the parameters; for 16-bit types the optimizer keeps float32 copies (masters)"
    )
    remat: Literal["none", "full"] = field("none", "what the backward pass recomputes: nothing, or whole blocks")
    implementation: str | None = field(None, "kernels: mosaic, triton, xla, reference; None: the best that works")

    def __post_init__(self):
        check_fields(self)
        for name, mixture in (("experts", self.experts), ("attention_experts", self.attention_experts)):
            mixture.check(name, mixture.k, options=("E", "k", "sample_topk", "mi_weight"))
            if not mixture.E:
                raise ValueError(f"{name}.E=0 must be at least 1: every layer of family={self.family!r} has experts")
        if self.D % 2 and self.sinusoidal and not self.causal:
            raise ValueError(f"D={self.D} must be even for sinusoidal positions")

    @property
    def causal(self) -> bool:
        """Whether self-attention is causal in classifiers: True for stick-breaking attention, False for softmax.

        In language models, self-attention is always causal.
        """
        return self.attention == "stick_breaking"

    @property
    def reads(self) -> str:
        return "pairs" if self.classes else "text"

    @classmethod
    def sut_base(cls, **changes) -> "SutConfig":
        """Return the config of the base translation model of the paper arXiv 2310.07096.

        Use the config with `models.universal.SparseUniversalTransformer(config, key)`, which has an encoder and a
        decoder. V is chosen so that the model has 66M parameters, as in the paper. `changes` are fields with other
        values.
        """
        return cls(**_translation(E=24) | changes)

    @classmethod
    def sut_big(cls, **changes) -> "SutConfig":
        """Return the config of the big translation model of the paper arXiv 2310.07096, with 110M parameters.

        The model has twice as many experts as `sut_base`, but a token uses the same number of experts. `changes` are
        fields with other values.
        """
        return cls(**_translation(E=48, sample_topk=1) | dict(act_weight=1 / 8192) | changes)


def _translation(E: int, sample_topk: int = 0) -> dict[str, Any]:
    experts = ExpertsConfig(E, k=4, mi_weight=0.1 / 8192)
    heads = ExpertsConfig(E, k=4, mi_weight=0.1 / 8192, sample_topk=sample_topk)
    return dict(V=37_000, D=512, L=6, K=4, H=64, F=512, dropout=0.2, experts=experts, attention_experts=heads)
