"""The config of a mixture of experts, in the feed-forward network or in the attention."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from stickjax.config.fields import accept_former_names, check_fields, field


@accept_former_names
@dataclass(frozen=True)
class ExpertsConfig:
    """The config of one mixture: its number of experts, how tokens are routed to them, and the router losses."""

    E: int = field(0, "number of experts; 0: none", at_least=0)
    k: int = field(0, "experts chosen per token; for attention experts, 0 means N / K", at_least=0)
    order: Literal["topk_softmax", "softmax_topk"] = field("topk_softmax", "order of the selection and the softmax")
    network: Literal["linear", "mlp", "gmm"] = field(
        "linear", "network that computes the router logits; gmm: cosine similarity with a centroid per expert"
    )
    hidden: int = field(256, "hidden width of the mlp and gmm router networks", at_least=1)
    bias: bool = field(False, "add a bias to the output")
    sample_topk: int = field(
        0, "in training, this many of the k experts are sampled from the router's probabilities", at_least=0
    )
    token_rounding: int = field(
        0, "token rounding in training: drop an expert's smallest gates, to a multiple of rows; 0: no", at_least=0
    )
    switch_weight: float = field(0.0, "weight of the load-balancing loss E * sum_e f_e P_e", at_least=0)
    z_weight: float = field(0.0, "weight of mean(logsumexp(router logits)^2)", at_least=0)
    mi_weight: float = field(0.0, "weight of the mutual-information loss H(e|x) - H(e)", at_least=0)
    concentration_weight: float = field(
        0.0, "weight of the entropy H(e); fine-tuning with it concentrates the tokens on few experts", at_least=0
    )
    bias_rate: float = field(0.0, "update step of the auxiliary-loss-free router bias; 0: no bias", at_least=0)
    added: int = field(0, "new experts beside the E trained ones; their parameters are separate leaves", at_least=0)
    pruned: int = field(0, "number of pruned experts that still count in the router's softmax", at_least=0)
    pruning: Literal["no", "old_denominator", "new_denominator"] = field(
        "no", "whether experts were pruned, and whether they still count in the router's softmax"
    )

    def __post_init__(self):
        check_fields(self)

    def check(self, name: str, k: int, options: tuple[str, ...] | None = None) -> None:
        """Raise ValueError if the fields contradict each other, or if the model does not support one of them.

        Args:
          name: the field of the model that contains this mixture, such as "experts", for the message.
          k: the number of experts per token.
          options: the fields that the model supports; all other fields must keep their defaults. None: all fields.
        """
        E = self.E
        for f in dataclasses.fields(self) if options else ():
            if f.name not in options and (value := getattr(self, f.name)) != f.default:
                fields = ", ".join(options)
                raise ValueError(f"{name}.{f.name}={value!r}: of the fields of {name}, this model reads only {fields}")
        if not E:
            counts = ("k", "token_rounding", "bias_rate", "added", "pruned")
            if used := [f"{field}={value}" for field in counts if (value := getattr(self, field))]:
                raise ValueError(f"{name}: {', '.join(used)} needs experts, but E=0")
            return
        if k > E:
            raise ValueError(f"{name}: k={k} experts per token cannot exceed E={E} experts")
        if not k:
            raise ValueError(f"{name}: E={E} experts need k >= 1 experts per token")
        if k == 1 < E and self.order == "topk_softmax":  # a single expert leaves nothing for a router to learn
            raise ValueError(
                f"{name}: k=1 with order='topk_softmax' has a constant gate and trains no router; use k >= 2 or "
                "'softmax_topk'"
            )
        if self.sample_topk > k:
            raise ValueError(f"{name}: sample_topk={self.sample_topk} cannot exceed k={k}")
        if self.pruned and self.pruning != "old_denominator":
            raise ValueError(f"{name}: pruned={self.pruned} needs pruning='old_denominator'")
