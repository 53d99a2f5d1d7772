"""The config of the model family latent_tree, a translator. Its fields with one capital letter are sizes of axes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from stickjax.config.family import FamilyConfig
from stickjax.config.fields import Dtype, check_fields, field


def _dropout(rate: float, of: str) -> float:
    return field(rate, f"dropout in training: {of}", at_least=0, below=1)


@dataclass(frozen=True)
class TreeConfig(FamilyConfig):
    """The config of a model that translates a sentence by building a binary tree from its root down.

    An encoder reads the source. A decoder computes a vector for every node of a complete binary tree of this `depth`.
    The vector gives the probability that the node is a leaf, and a distribution over words. The probability of a target
    sentence is the sum over all trees with its words at the leaves (arXiv 2010.04704). A target has at most 2^depth
    words.

    The defaults are the sizes and dropout rates of the original code for SCAN.
    """

    reads: ClassVar[Literal["translation"]] = "translation"
    accumulates = False  # the loss is a mean over the sentences of the whole batch

    family: Literal["latent_tree"] = field("latent_tree", "the kind of model; a config file chooses it by its class")
    V: int | None = field(None, "number of source ids, with id 0 for padding; None: the number in the data", at_least=2)
    V_target: int | None = field(
        None,
        "number of target ids, with id 0 for padding; None: the number in the data, or V without data",
        at_least=2,
    )
    H: int = field(128, "width of all hidden vectors", at_least=2)
    N: int = field(5, "encoder=ordered_memory: number of memory slots; encoder=gru: number of layers", at_least=1)
    depth: int = field(8, "depth of the complete tree: a target has at most 2^depth words", at_least=1, at_most=12)
    encoder: Literal["ordered_memory", "tree", "gru"] = field(
        "ordered_memory",
        "ordered_memory: induces a tree over the source; tree: reads its brackets; gru: bidirectional, without a tree",
    )
    early_root: bool = field(
        False, "take the root vector at the word before the last, as the original code does (ordered_memory only)"
    )
    encoder_dropout: float = _dropout(0.1, "encoder=ordered_memory: in its cell; encoder=gru: of the root vector")
    memory_dropout: float = _dropout(0.1, "encoder=ordered_memory: in slot distributions; encoder=gru: between layers")
    split_dropout: float = _dropout(0.1, "of the vector of a node, to compute its children")
    leaf_dropout: float = _dropout(0.1, "of the vectors of a node, to compute whether it is a leaf")
    output_dropout: float = _dropout(0.1, "of the vector of a node from which its word is chosen")
    attention_dropout: float = _dropout(0.6, "of the inputs of the queries and keys of the attention")
    norm_eps: float = field(1e-5, "epsilon of every normalisation", above=0)
    dtype: Dtype = field("float32", "type of the computation")
    param_dtype: Dtype = field(
        "float32", "type of the stored parameters; if it is below float32, the optimizer state has float32 masters"
    )
    implementation: str | None = field(None, "not used: the model has no kernels")

    def __post_init__(self):
        check_fields(self)
        if self.H % 2:
            raise ValueError(f"H={self.H} must be even: a bidirectional GRU has H/2 units in each direction")

    @property
    def D(self) -> int:
        """The width H of all hidden vectors, under the name D that `LayerNorm` and other shared layers read."""
        return self.H

    @property
    def target_vocabulary(self) -> int:
        """The number of target ids: V_target, or if that is None, the size of the source vocabulary."""
        return self.vocabulary if self.V_target is None else self.V_target

    def check_mesh(self, sizes: dict[str, int], T: int) -> None:
        super().check_mesh(sizes, T)
        self.check_words(T)

    def check_words(self, T: int) -> None:
        """Raise ValueError if a target of T words has more words than the complete tree has leaves, 2^depth.

        >>> TreeConfig(depth=4).check_words(17)
        Traceback (most recent call last):
        ValueError: a target of T=17 words does not fit in a tree of depth=4, which has at most 2^4=16 leaves
        """
        if T > 2**self.depth:
            raise ValueError(
                f"a target of T={T} words does not fit in a tree of depth={self.depth}, "
                f"which has at most 2^{self.depth}={2**self.depth} leaves"
            )
