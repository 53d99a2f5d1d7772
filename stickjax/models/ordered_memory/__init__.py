"""Ordered Memory: a recurrent encoder that stores phrases in memory slots, and so induces a binary tree."""

from stickjax.models.ordered_memory.encoder import Encoded, Encoder
from stickjax.models.ordered_memory.family import OrderedMemory
from stickjax.models.ordered_memory.model import ClassifierOutput, OrderedMemoryClassifier

__all__ = ["ClassifierOutput", "Encoded", "Encoder", "OrderedMemory", "OrderedMemoryClassifier"]
