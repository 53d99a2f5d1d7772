"""The config of the translation model `latent_tree`. A field of one capital letter is the size of an axis."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from stickjax.config.family import FamilyConfig
from stickjax.config.fields import Dtype, check_fields, field


def _dropout(rate: float, of: str) -> float:
    return field(rate, f"dropout in training: {of}", at_least=0, below=1)


@dataclass(frozen=True)
class TreeConfig(FamilyConfig):
    """The config of a model that translates a sentence by building a binary tree from its root down.

    An encoder reads the source. For every node of a complete binary tree of depth `depth`, a decoder computes the
    probability that the node is a leaf, and the probability of every word at this leaf. The probability of a target
    sentence is the sum of the probabilities of all trees whose leaves have the words of the sentence, in their order
    (arXiv 2010.04704). A target has at most 2^depth words.

    The defaults are the sizes and dropout rates of the original code for SCAN.
    """

    reads: ClassVar[Literal["translation"]] = "translation"
    accumulates = False  # because the loss is a mean over the sentences of the whole batch
    padded_to = 16  # fewer lengths: the gradient compiles 42 s for each length (depth=5, one CPU core, 2026-11-30)

    family: Literal["latent_tree"] = field(
        "latent_tree", "name of the model family; it belongs to the config class, so it cannot be changed"
    )
    V: int | None = field(
        None, "number of source ids, with id 0 for padding; None: the number of source ids of the data", at_least=2
    )
    V_target: int | None = field(
        None,
        "number of target ids, with id 0 for padding; None: the number of target ids of the data; without data: V",
        at_least=2,
    )
    H: int = field(128, "width of all hidden vectors", at_least=2)
    N: int = field(5, "encoder=ordered_memory: number of memory slots; encoder=gru: number of layers", at_least=1)
    depth: int = field(8, "depth of the complete tree: a target has at most 2^depth words", at_least=1, at_most=12)
    encoder: Literal["ordered_memory", "tree", "gru"] = field(
        "ordered_memory",
        "ordered_memory: induces a tree over the source; tree: reads the tree of the source from the data; gru: "
        "bidirectional GRU without a tree",
    )
    early_root: bool = field(
        False, "take the root vector at the second-to-last word, as the original code does (ordered_memory only)"
    )
    encoder_dropout: float = _dropout(0.1, "encoder=ordered_memory: in the cell; encoder=gru: of the root vector")
    memory_dropout: float = _dropout(0.1, "encoder=ordered_memory: in slot distributions; encoder=gru: between layers")
    split_dropout: float = _dropout(0.1, "of the vector of a node from which its children are computed")
    leaf_dropout: float = _dropout(0.1, "of the vectors from which the probability that a node is a leaf is computed")
    output_dropout: float = _dropout(0.1, "of the vector from which the word of a node is chosen")
    attention_dropout: float = _dropout(0.6, "of the inputs of the queries and keys of the attention")
    norm_eps: float = field(1e-5, "epsilon of every normalisation", above=0)
    dtype: Dtype = field("float32", "number type of the computation")
    param_dtype: Dtype = field(
        "float32", "number type of the parameters; for 16-bit types the optimizer keeps float32 copies (masters)"
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
        """The number of target ids: `V_target`, or the size of the source vocabulary if `V_target` is None."""
        return self.vocabulary if self.V_target is None else self.V_target

    def check_mesh(self, sizes: dict[str, int], T: int) -> None:
        super().check_mesh(sizes, T)
        self.check_words(T)

    def check_words(self, T: int) -> None:
        """Raise ValueError if a target of T words has more words than the complete tree has leaves, 2^depth.

        >>> TreeConfig(depth=4).check_words(17)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: a target of T=17 words does not fit in ... 2^4=16 leaves; raise model.depth, or lower data.T
        """
        if T > 2**self.depth:
            raise ValueError(
                f"a target of T={T} words does not fit in a tree of depth={self.depth}, "
                f"which has at most 2^{self.depth}={2**self.depth} leaves; raise model.depth, or lower data.T"
            )
