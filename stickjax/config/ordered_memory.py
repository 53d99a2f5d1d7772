"""The config of the classifier `ordered_memory`. A field of one capital letter is the size of an axis."""

from dataclasses import dataclass
from typing import Literal

from stickjax.config.family import FamilyConfig
from stickjax.config.fields import Dtype, check_fields, field


@dataclass(frozen=True)
class OrderedMemoryConfig(FamilyConfig):
    """The config of a classifier of one sentence, or of a pair of sentences, with an Ordered Memory encoder.

    The encoder reads a sentence token by token, and stores phrases in a memory of N slots. A slot is a vector [H].
    """

    family: Literal["ordered_memory"] = field(
        "ordered_memory", "name of the model family; it belongs to the config class, so it cannot be changed"
    )
    V: int | None = field(
        None, "vocabulary size, with id 0 for padding; None: the number of token ids of the data", at_least=1
    )
    D: int = field(128, "width of the embeddings", at_least=1)
    H: int = field(128, "width of one memory slot", at_least=1)
    N: int = field(12, "number of memory slots", at_least=2)
    evaluation_N: int = field(
        0, "number of memory slots in evaluation, for deeper sentences than in training; 0: N", at_least=0
    )
    directions: int = field(1, "1, or 2: a second encoder reads the sentence from right to left", at_least=1, at_most=2)
    sentences: int = field(2, "number of sentences of an example: 1, or 2 for a pair", at_least=1, at_most=2)
    classes: int | None = field(None, "number of labels; None: the number of labels of the data", at_least=2)
    hidden: bool = field(True, "whether the classifier has a hidden layer, as wide as its features")
    embedding_std: float = field(0.06, "standard deviation of the initial embeddings", above=0)
    cell_dropout: float = field(
        0.0, "dropout in training: of the inputs of the two layers of the cell", at_least=0, below=1
    )
    memory_dropout: float = field(0.0, "dropout in training: in the distribution over the slots", at_least=0, below=1)
    input_dropout: float = field(0.0, "dropout in training: of the embeddings", at_least=0, below=1)
    output_dropout: float = field(0.0, "dropout in training: in the classifier", at_least=0, below=1)
    norm_eps: float = field(1e-5, "epsilon of every normalisation", above=0)
    dtype: Dtype = field("float32", "number type of the computation")
    param_dtype: Dtype = field(
        "float32", "number type of the parameters; for 16-bit types the optimizer keeps float32 copies (masters)"
    )
    implementation: str | None = field(None, "not used: Ordered Memory has no kernels")

    accumulates = False  # because gradient accumulation needs the array `loss_mask`, which these batches do not have

    def __post_init__(self):
        check_fields(self)
        if 0 < self.evaluation_N < self.N:
            raise ValueError(f"evaluation_N={self.evaluation_N} must be at least N={self.N}, or 0, which means N")

    @property
    def reads(self) -> str:
        return "pairs" if self.sentences == 2 else "sentences"
