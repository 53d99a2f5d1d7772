"""The config of a mixture of experts, which replaces the feed-forward network or the attention of every layer."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from stickjax.config.fields import accept_former_names, check_fields, field


@accept_former_names
@dataclass(frozen=True)
class ExpertsConfig:
    """The config of a mixture: the number of experts, the routing of tokens, and the weights of the router losses."""

    E: int = field(0, "number of experts; 0: no mixture of experts", at_least=0)
    k: int = field(0, "number of experts that a token uses; for attention experts, 0 means N / K", at_least=0)
    order: Literal["topk_softmax", "softmax_topk"] = field(
        "topk_softmax",
        "gates: softmax over the k chosen logits (topk_softmax), or the k chosen values of the softmax over all logits "
        "(softmax_topk)",
    )
    network: Literal["linear", "mlp", "gmm"] = field(
        "linear",
        "network that computes the router logits: a matrix (linear), two layers (mlp), or the cosine similarity with "
        "one centroid for each expert (gmm)",
    )
    hidden: int = field(256, "hidden width of the mlp and gmm router networks", at_least=1)
    bias: bool = field(False, "add a trainable bias to the output of the mixture")
    shared: int = field(
        0, "hidden width of a dense network that every token uses beside its k experts; 0: none", at_least=0
    )
    sample_topk: int = field(
        0,
        "in training, this many of the k experts are drawn at random with the router's probabilities; the others are "
        "the most probable experts",
        at_least=0,
    )
    token_rounding: int = field(
        0,
        "n: in training, each expert drops its tokens with the smallest gates, so that its number of tokens is a "
        "multiple of n; 0: off",
        at_least=0,
    )
    switch_weight: float = field(
        0.0, "weight of the load-balancing loss E * sum_e (load of e) * (mean probability of e)", at_least=0
    )
    z_weight: float = field(0.0, "weight of the z-loss, mean(logsumexp(router logits)^2)", at_least=0)
    mi_weight: float = field(
        0.0, "weight of the mutual-information loss H(e|x) - H(e): clear choices, balanced experts", at_least=0
    )
    concentration_weight: float = field(
        0.0, "weight of the loss H(e), the entropy of the mean probabilities: few experts get the tokens", at_least=0
    )
    bias_rate: float = field(0.0, "update step of the auxiliary-loss-free router bias; 0: no bias", at_least=0)
    added: int = field(0, "number of new experts beside the E trained ones, as separate parameters", at_least=0)
    pruned: int = field(0, "number of pruned experts that are still in the router's softmax", at_least=0)
    pruning: Literal["no", "old_denominator", "new_denominator"] = field(
        "no",
        "whether experts were pruned; if so, whether the router's softmax still includes them (old_denominator) or not "
        "(new_denominator)",
    )

    def __post_init__(self):
        check_fields(self)

    def check(self, name: str, k: int, options: tuple[str, ...] | None = None) -> None:
        """Raise ValueError if the fields contradict each other, or if an unsupported field does not have its default.

        Args:
          name: the field of the model's config that contains this mixture, such as "experts", for the message.
          k: the number of experts per token.
          options: the fields that the model family supports. All other fields must have their defaults. None: the
            model family supports all fields.
        """
        E = self.E
        for f in dataclasses.fields(self) if options else ():
            if f.name not in options and (value := getattr(self, f.name)) != f.default:
                fields = ", ".join(options)
                raise ValueError(
                    f"{name}.{f.name}={value!r} must be {f.default!r}, the default: this model family supports only "
                    f"the fields {fields} of {name}"
                )
        if not E:
            counts = ("k", "shared", "token_rounding", "bias_rate", "added", "pruned")
            if used := [f"{field}={value}" for field in counts if (value := getattr(self, field))]:
                raise ValueError(f"{name}: {', '.join(used)} needs E >= 1 experts, got E=0")
            return
        if k > E:
            raise ValueError(f"{name}: k={k} experts per token cannot exceed E={E} experts")
        if not k:
            raise ValueError(f"{name}: E={E} experts need k >= 1 experts per token, got k=0")
        if k == 1 < E and self.order == "topk_softmax":  # with E=1 the router has no choice to learn
            if options and "order" not in options:
                raise ValueError(
                    f"{name}: k=1 expert per token has a constant gate, so the router is not trained; use k >= 2"
                )
            raise ValueError(
                f"{name}: k=1 with order='topk_softmax' has a constant gate, so the router is not trained; use k >= 2 "
                "or order='softmax_topk'"
            )
        if self.sample_topk > k:
            raise ValueError(f"{name}: sample_topk={self.sample_topk} cannot exceed k={k}")
        if self.pruned and self.pruning != "old_denominator":
            raise ValueError(f"{name}: pruned={self.pruned} needs pruning='old_denominator', got {self.pruning!r}")
