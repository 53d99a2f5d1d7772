"""Data: token streams of texts, examples of tasks, windows of held-out text for evaluation, and training batches."""

from stickjax.data.batches import make_batch, task_loader, text_data, train_loader
from stickjax.data.corpus import Corpus, load_corpus
from stickjax.data.heldout import EvalWindows, heldout_windows
from stickjax.data.readers import training_data
from stickjax.data.token_files import tokenize

__all__ = [
    "Corpus", "EvalWindows", "heldout_windows", "load_corpus", "make_batch", "task_loader", "text_data", "tokenize",
    "train_loader", "training_data",
]  # fmt: skip
