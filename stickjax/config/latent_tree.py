"""The config of top-down production with latent trees. Its fields with one capital letter are sizes of axes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from stickjax.config.family import FamilyConfig
from stickjax.config.fields import Dtype, check_fields, field


def _dropout(rate: float, of: str) -> float:
    return field(rate, f"dropout in training: {of}", at_least=0, below=1)


@dataclass(frozen=True)
class TreeConfig(FamilyConfig):
    """The config of a model that translates a sentence by production of a binary tree from its root down.

    An encoder reads the source. Then every node of a complete binary tree of this `depth` becomes a vector. Its
    probability to be a leaf, and its distribution over words, give the probability of every target sentence, summed
    over all trees (arXiv 2010.04704). A target has at most 2^depth words.

    The defaults are the sizes and dropout rates of the original code for SCAN.
    """

    reads: ClassVar[Literal["translation"]] = "translation"
    accumulates = False  # the loss is a mean over the sentences of the whole batch

    family: Literal["latent_tree"] = field("latent_tree", "the kind of model; a config file chooses it by its class")
    V: int | None = field(None, "words of the source, and id 0, which is padding; None: those of the data", at_least=2)
    V_target: int | None = field(
        None,
        "words of the target, and id 0, which is padding; None: the target has the words of the source",
        at_least=2,
    )
    H: int = field(128, "width of all hidden vectors", at_least=2)
    N: int = field(5, "slots of the memory of the encoder ordered_memory; layers of the encoder gru", at_least=1)
    depth: int = field(8, "depth of the tree: a target has at most 2^depth words", at_least=1, at_most=12)
    encoder: Literal["ordered_memory", "tree", "gru"] = field(
        "ordered_memory",
        "ordered_memory: finds a tree of the source; tree: follows given brackets; gru: bidirectional, without a tree",
    )
    early_root: bool = field(
        False, "read the root one word before the end of the source, as the original code does (ordered_memory only)"
    )
    encoder_dropout: float = _dropout(0.1, "in the cell of ordered_memory, and of the root of gru")
    memory_dropout: float = _dropout(0.1, "in the distribution over slots of ordered_memory, and between layers of gru")
    split_dropout: float = _dropout(0.1, "of a node when it is split into its children")
    leaf_dropout: float = _dropout(0.1, "of a node when it is decided whether it is a leaf")
    output_dropout: float = _dropout(0.1, "of a node when its word is chosen")
    attention_dropout: float = _dropout(0.6, "of the inputs of queries and keys")
    norm_eps: float = field(1e-5, "epsilon of every normalisation", above=0)
    dtype: Dtype = field("float32", "type of the computation")
    param_dtype: Dtype = field(
        "float32", "type of the stored parameters; if it is below float32, the optimizer state has float32 masters"
    )
    implementation: str | None = field(None, "not used: the model has no kernels")

    def __post_init__(self):
        check_fields(self)
        if self.H % 2:
            raise ValueError(f"H={self.H} must be even: half of it is one direction of a GRU")

    @property
    def D(self) -> int:
        """The width of all hidden vectors, by the name that shared layers read."""
        return self.H

    @property
    def target_vocabulary(self) -> int:
        """The size of the target vocabulary. It is `vocabulary` if V_target is None."""
        return self.vocabulary if self.V_target is None else self.V_target

    def check_mesh(self, sizes: dict[str, int], T: int) -> None:
        super().check_mesh(sizes, T)
        self.check_words(T)

    def check_words(self, T: int) -> None:
        """Raise ValueError if a target of T words does not fit in the tree.

        >>> TreeConfig(depth=4).check_words(17)
        Traceback (most recent call last):
        ValueError: a target of T=17 words does not fit in a tree of depth=4, which has at most 2^4=16 leaves
        """
        if T > 2**self.depth:
            raise ValueError(
                f"a target of T={T} words does not fit in a tree of depth={self.depth}, "
                f"which has at most 2^{self.depth}={2**self.depth} leaves"
            )
