"""One experiment as nested frozen dataclasses: every field has a default, a type and a sentence.

Field names of the model are the shape letters (README, "Letters"). A config is stored as plain JSON and
read back with `Config.from_dict`; `stickjax.options` changes one by the words of a command line.
"""

import dataclasses
import difflib
import json
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal


def _f(default, doc: str, group: type | None = None):
    """A dataclass field with its sentence for --help; `group` makes it a nested section."""
    if group is not None:
        return dataclasses.field(default_factory=group, metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


def nearest(name: str, known) -> str:
    """' (did you mean X?)', or nothing when no known name is close."""
    match = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _check_choices(config) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        options = [o for o in alternatives(hint) if typing.get_origin(o) is Literal]
        choices = [c for o in options for c in typing.get_args(o)]
        value = getattr(config, name)
        if choices and value is not None and value not in choices:
            raise ValueError(
                f"{name}={value!r} is not one of {', '.join(map(repr, choices))}{nearest(str(value), choices)}"
            )


def _at_least(config, low, *names) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= low:  # `not >=` also refuses NaN
            raise ValueError(f"{name}={value} must be at least {low}")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model. Capital letters are the shape letters of the code."""

    V: int = _f(257, "vocabulary size (bytes and the end-of-text token by default)")
    D: int = _f(128, "width of the residual stream")
    L: int = _f(4, "number of layers")
    N: int = _f(4, "query heads")
    K: int = _f(4, "key/value heads; N must be a multiple of K")
    H: int = _f(32, "dimension of one head")
    F: int = _f(384, "hidden width of the feed-forward network, of one expert when E > 0")
    E: int = _f(0, "experts; 0 makes the feed-forward network dense")
    k: int = _f(0, "experts chosen per token")
    attention_experts: int = _f(
        0, "experts that own the query heads, K each, of which a token chooses N / K; 0: all tokens share the heads"
    )
    attention: Literal["stick_breaking", "softmax"] = _f("stick_breaking", "softmax comes with RoPE")
    remainder: Literal["none", "value", "bias"] = _f("none", "what is added for the unbroken rest of the stick")
    head_norm: bool = _f(
        False, "normalise every head's output (GroupNorm, a group per head) before the output projection"
    )
    attend_current: bool = _f(False, "let a token attend to itself (stick-breaking only)")
    window: int | None = _f(None, "keys at most this far to the left are attended; None: all")
    skip_below: float | None = _f(None, "skip blocks once log2 of the stick left is below this (stick-breaking only)")
    rope_theta: float = _f(10_000.0, "base of the rotary frequencies (softmax only)")
    activation: Literal["swiglu", "geglu", "reglu", "gelu", "gelu_tanh", "relu", "relu2", "silu"] = _f(
        "swiglu", "feed-forward activation"
    )
    router: Literal["topk_softmax", "softmax_topk"] = _f("topk_softmax", "order of the selection and the softmax")
    sample_topk: int = _f(0, "in training, how many of the k experts are sampled instead of the best")
    round_rows: int = _f(
        0,
        "in training, an expert's rows on a device are rounded down to a multiple, smallest gates first; 0: no",
    )
    switch_weight: float = _f(0.0, "weight of the load-balancing loss E * sum_e f_e P_e")
    z_weight: float = _f(0.0, "weight of mean(logsumexp(router logits)^2)")
    mi_weight: float = _f(0.0, "weight of the mutual-information loss H(e|x) - H(e)")
    bias_rate: float = _f(0.0, "step of the auxiliary-loss-free router bias; 0: no bias")
    tied: bool = _f(True, "share the embedding with the output projection")
    norm_eps: float = _f(1e-5, "epsilon of every normalisation")
    m_width: float = _f(1.0, "muP width multiplier: D / 256 by its usual base width")
    m_emb: float = _f(1.0, "multiplier of the embedding output")
    m_res: float = _f(1.0, "multiplier of every residual branch")
    attention_scale: float | None = _f(
        None, "multiplier of q.k; None: 1/sqrt(H). muP asks for one that is constant / H"
    )
    logits_scaling: float | None = _f(None, "divisor of the output logits; None: m_width")
    init_std: float = _f(0.1, "standard deviation of the embedding; matrices have init_std / sqrt(m_width)")
    dtype: Literal["float32", "bfloat16", "float16"] = _f("float32", "type of the computation")
    param_dtype: Literal["float32", "bfloat16", "float16"] = _f("float32", "type of the stored parameters")
    remat: Literal["none", "dots", "full"] = _f(
        "none", "what a layer recomputes in the backward pass; none also keeps the parameters that fsdp gathers"
    )
    implementation: str | None = _f(None, "kernels: mosaic, triton, xla, reference; None: the best that works")

    def __post_init__(self):
        _check_choices(self)
        _at_least(self, 1, "V", "D", "L", "N", "K", "H", "F")
        _at_least(self, 0, "E", "k", "attention_experts", "sample_topk", "round_rows", "window", "bias_rate")
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
        if self.round_rows and not (self.E or self.attention_experts):
            raise ValueError(f"round_rows={self.round_rows} needs experts, but E=0")
        if self.bias_rate and not (self.E or self.attention_experts):
            raise ValueError(f"bias_rate={self.bias_rate} needs experts, but E=0")
        if self.sample_topk > self.k and (self.E or not self.attention_experts):
            raise ValueError(f"sample_topk={self.sample_topk} cannot exceed k={self.k}")
        _at_least(self, 0, "m_res")
        for name in ("m_width", "m_emb", "init_std", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.attention == "softmax":
            if self.H % 2:
                raise ValueError(f"H={self.H} must be even for rotary positions")
            for name in ("attend_current", "skip_below"):
                if getattr(self, name):
                    raise ValueError(f"{name}={getattr(self, name)} needs attention='stick_breaking'")
            if self.remainder != "none":
                raise ValueError(f"remainder={self.remainder!r} needs attention='stick_breaking': softmax leaves none")

    def _check_attention_experts(self):
        chosen, E = self.N // self.K, self.attention_experts
        said = f"N / K = {chosen} experts of K={self.K} heads per token"
        if chosen > E:
            raise ValueError(f"{said} cannot exceed attention_experts={E}")
        if chosen == 1 and self.router == "topk_softmax":
            raise ValueError(
                f"{said} with router='topk_softmax' train no router; use N = 2 K or more or 'softmax_topk'"
            )
        if self.sample_topk > chosen:
            raise ValueError(f"sample_topk={self.sample_topk} cannot exceed {said}")
        if self.head_norm or self.remainder == "bias":
            raise ValueError("head_norm and remainder='bias' need heads that all tokens share, not attention_experts")

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


_POWER: dict[str, Any] = dict(
    V=49152, H=64, m_emb=12.0, attention="softmax", attention_scale=1 / 64, dtype="bfloat16", remat="full"
)


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how a batch is cut from them."""

    source: Literal["stdlib", "text", "tokens"] = _f(
        "stdlib", "stdlib: the running Python's standard library; text: files, folders or jsonl; tokens: a token file"
    )
    path: str | None = _f(None, "file or folder of the text and tokens sources")
    heldout_path: str | None = _f(None, "held-out file or folder; None: every heldout_every-th document is held out")
    heldout_every: int = _f(10, "one document in this many is held out")
    tokenizer: str = _f("byte", "byte, or the path of a Hugging Face tokenizer.json")
    text_field: str = _f("text", "field of a jsonl line that holds the text")
    T: int = _f(256, "tokens in one sequence")
    B: int = _f(16, "sequences in one step, over all processes and accumulation steps")
    seed: int = _f(0, "order of the sequences")

    def __post_init__(self):
        _check_choices(self)
        _at_least(self, 1, "T", "B")
        _at_least(self, 0, "seed")
        _at_least(self, 2, "heldout_every")
        if self.source == "stdlib" and self.path is not None:
            raise ValueError(f"path={self.path!r} is not used by source='stdlib'; did you mean source='text'?")
        if self.source != "stdlib" and self.path is None:
            raise ValueError(f"source={self.source!r} needs a path")

    @property
    def tokens_per_step(self) -> int:
        return self.B * self.T


@dataclass(frozen=True)
class OptimConfig:
    """AdamW under muP with the Power schedule; all lengths in tokens."""

    schedule: Literal["power", "wsd", "cosine", "constant"] = _f("power", "learning rate against tokens")
    peak_lr: float = _f(0.02, "highest learning rate: the cap of the power law, the plateau of the others")
    a: float = _f(4.0, "power: scale of the law beta * a * n^b")
    b: float = _f(-0.51, "power: exponent of the law")
    warmup_tokens: int = _f(0, "length of the linear warmup")
    decay_tokens: int = _f(0, "length of the decay at the end of the run; 0: the run never decays")
    decay: Literal["exponential", "linear", "sqrt", "cosine"] = _f("exponential", "shape of the decay")
    end_ratio: float = _f(0.0, "last learning rate as a share of the one where the decay began")
    beta1: float = _f(0.9, "Adam: decay of the first moment")
    beta2: float = _f(0.95, "Adam: decay of the second moment")
    eps: float = _f(1e-10, "Adam: epsilon")
    weight_decay: float = _f(0.1, "decoupled weight decay, not on norms and biases")
    scale_decay: bool = _f(False, "strict muP: multiply the decay of internal matrices by m_width")
    clip: float | None = _f(1.0, "largest global norm of the gradient; None: no clipping")

    def __post_init__(self):
        _check_choices(self)
        _at_least(self, 0, "warmup_tokens", "decay_tokens", "end_ratio", "weight_decay", "eps")
        for name in ("peak_lr", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive")


@dataclass(frozen=True)
class TrainConfig:
    """The length of a run and what it leaves behind."""

    steps: int = _f(400, "optimizer steps")
    accumulate: int = _f(1, "microbatches per step; B must be a multiple of it")
    seed: int = _f(0, "initialisation and sampled routing")
    log_every: int = _f(10, "steps between lines of metrics.jsonl")
    checkpoint_every: int = _f(100, "steps between checkpoints; the last step always has one")
    keep: int = _f(3, "checkpoints kept")
    max_bad_steps: int = _f(10, "stop after this many steps in a row with a loss or gradient that is not finite")

    def __post_init__(self):
        _at_least(self, 1, "steps", "accumulate", "log_every", "checkpoint_every", "keep", "max_bad_steps")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices share the work, by axis; one may be -1, what the others leave. All 1 is a single device."""

    data: int = _f(1, "parts of the batch on devices that each keep all parameters")
    fsdp: int = _f(1, "parts of the batch on devices that also divide parameters and optimizer state")
    expert: int = _f(1, "parts of the batch on devices that also divide the experts")
    context: int = _f(1, "parts of every sequence (stick-breaking only)")
    tensor: int = _f(1, "parts of the heads, the hidden units and the vocabulary")

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"{axis}={size} must be at least 1, or -1 for what the other axes leave")
        if len(left := [axis for axis, size in sizes.items() if size == -1]) > 1:
            raise ValueError(f"only one axis may be -1, not {' and '.join(left)}")


@dataclass(frozen=True)
class Config:
    """A whole experiment."""

    model: ModelConfig = _f(None, "the model", ModelConfig)
    data: DataConfig = _f(None, "the data", DataConfig)
    optim: OptimConfig = _f(None, "the optimizer", OptimConfig)
    train: TrainConfig = _f(None, "the run", TrainConfig)
    mesh: MeshConfig = _f(None, "the devices", MeshConfig)

    def __post_init__(self):
        total = self.total_tokens
        if self.data.B % self.train.accumulate:
            raise ValueError(f"B={self.data.B} sequences must be a multiple of accumulate={self.train.accumulate}")
        if self.optim.warmup_tokens + self.optim.decay_tokens > total:
            raise ValueError(
                f"warmup_tokens={self.optim.warmup_tokens} and decay_tokens={self.optim.decay_tokens} "
                f"exceed the run of steps * B * T = {total} tokens"
            )

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.train.steps * self.data.tokens_per_step

    def replace(self, changes: dict[str, Any]) -> "Config":
        """A copy with `{"section.field": value}` changed; all changes are checked together."""
        sections: dict[str, dict] = {}
        for key, value in changes.items():
            section, name = locate(self, key)
            sections.setdefault(section, {})[name] = value
        return dataclasses.replace(
            self, **{s: dataclasses.replace(getattr(self, s), **fields) for s, fields in sections.items()}
        )

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict) -> "Config":
        """Read a stored config; a field or section that does not exist is an error."""
        flat = {f"{section}.{name}": value for section, fields in tree.items() for name, value in fields.items()}
        return cls().replace(flat)

    def diff(self, other: "Config") -> list[str]:
        """'section.field: here -> there' for every field that differs."""
        here, there = self.to_dict(), other.to_dict()
        return [
            f"{s}.{n}: {here[s][n]!r} -> {there[s][n]!r}" for s in here for n in here[s] if here[s][n] != there[s][n]
        ]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def alternatives(hint) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) not in (None, Literal) else (hint,)


def locate(config: Config, key: str) -> tuple[str, str]:
    known = [
        f"{s.name}.{f.name}" for s in dataclasses.fields(config) for f in dataclasses.fields(getattr(config, s.name))
    ]
    if key not in known:
        # A bare or mistyped field name is matched against the last parts as well.
        ends = [k for k in known if k.split(".")[1] == key.split(".")[-1]]
        hint = f" (did you mean {ends[0]!r}?)" if ends else nearest(key, known)
        raise ValueError(f"unknown config key {key!r}{hint}")
    section, name = key.split(".")
    return section, name
