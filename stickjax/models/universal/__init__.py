"""The Sparse Universal Transformer: one block of experts, applied up to L times, until every token has halted."""

from stickjax.models.universal.family import Universal, apply, init, loss
from stickjax.models.universal.model import (
    LanguageModel,
    PairClassifier,
    SparseUniversalTransformer,
    SutOutput,
    UniversalStack,
)

__all__ = [
    "LanguageModel", "PairClassifier", "SparseUniversalTransformer", "SutOutput", "Universal", "UniversalStack",
    "apply", "init", "loss",
]  # fmt: skip
