"""The implementation of `stickjax.fit`, `stickjax.load` and `TrainedModel`."""

import hashlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from stickjax.config import Config
from stickjax.config.command_line import config_name, load_config
from stickjax.data.chat import Conversation
from stickjax.evaluate import LENGTHS, evaluate
from stickjax.evaluation import answers, examples, pairs
from stickjax.generate import generate_text
from stickjax.models.ordered_memory.parse import Tree
from stickjax.storage import run_folder
from stickjax.storage.checkpoints import Checkpoints
from stickjax.storage.run_folder import Loaded
from stickjax.system.tables import Columns
from stickjax.training import loop
from stickjax.training.loop import Result
from stickjax.training.metrics import metrics_of


def fit(config: Config | str | os.PathLike, run: str | os.PathLike | None, *, quiet: bool, **options) -> Result:
    """Train a model in a run folder. This is the implementation of `stickjax.fit`, with the same arguments.

    `options` are the arguments `init_from`, `branch` and `on_metrics`.
    """
    name = None
    if not isinstance(config, Config):
        config, name = load_config(os.fspath(config)), config_name(config)
    if run is None:
        name = name or hashlib.sha256(config.to_json().encode()).hexdigest()[:8]
        run = Path("runs") / name
        if not quiet:
            print(f"run folder {run}")
    run = os.fspath(run)
    try:
        return loop.fit(config, run, quiet=quiet, **options)
    except KeyboardInterrupt:  # Ctrl-C before the first step, or a second Ctrl-C
        if not quiet:
            newest = max(Checkpoints(run).steps(), default=None)
            kept = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is step {newest}"
            print(f"interrupted; {kept}")
        return Result(None, False, None, 0.0, int(signal.SIGINT), run)


def load(run: str | os.PathLike, **options) -> "TrainedModel":
    """Load the model of a folder. This is the implementation of `stickjax.load`, with the same arguments."""
    model = TrainedModel(*run_folder.load(run, **options))
    model.run = os.fspath(run)
    return model


class TrainedModel(Loaded):
    """A trained model with its config and tokenizer: the result of `stickjax.load`.

    `model`: the module with the parameters. A decoder is called as `model(tokens).logits`. The other families are
      called as `model(batch).logits`, with a dictionary of arrays, such as {"tokens": tokens}.
    `config`: the config of the experiment.
    `tokenizer`: the tokenizer; None if the model was converted from a folder without a tokenizer.
    `step`: the training step of the checkpoint; 0 if the folder has one model without checkpoints.
    `run`: the path of the folder, or the name of the model on the Hugging Face hub.
    """

    run: str = ""

    def __repr__(self) -> str:
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.model))
        return f"TrainedModel({self.run!r}, step={self.step}, {parameters:,} parameters)"

    @property
    def metrics(self) -> Columns:
        """The metrics that the training logged: {name: numpy array with a value per logged step}.

        The table is empty if the folder has no metrics.
        """
        return metrics_of(self.run)

    def generate(
        self,
        prompts: Conversation | Sequence[Conversation],
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        special_tokens: bool = False,
        chat: bool = False,
        on_text: Callable[[int, str], None] | None = None,
    ) -> str | list[str]:
        """Generate the text that follows a prompt. For a list of prompts, return a list of texts.

        Args:
          prompts: one string, or a list of strings. With `chat`, a prompt may also be a conversation, a list of
            messages: [{"role": "user", "content": text}, ...].
          max_new_tokens: the largest number of new tokens in a text.
          temperature: the logits are divided by it; with 0, the most likely token is always chosen.
          top_k: draw only from the k most likely tokens.
          top_p: draw only from the fewest tokens whose total probability is at least top_p.
          seed: the seed of the random draws; the same seed gives the same text.
          stop: strings or special tokens that end a text; the text does not contain them.
          special_tokens: True to encode the special tokens in a prompt, such as <|user|>, as special tokens; False to
            encode them as ordinary text.
          chat: True if the prompts are conversations; a string is then one message of the user. The chat template of
            the model converts a conversation to text.
          on_text: `on_text(row, piece)` is called with each new piece of text for the prompt with the index `row`.

        Raises:
          ValueError: an option is out of range, the model has no tokenizer, or the model cannot generate text.
        """
        one = isinstance(prompts, str) or (chat and len(prompts) > 0 and isinstance(next(iter(prompts)), Mapping))
        texts = generate_text(
            self, [prompts] if one else prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed, stop=stop, special_tokens=special_tokens, chat=chat, on_text=on_text,
        )  # fmt: skip
        return texts[0] if one else texts

    def predict(self, texts: Sequence[str | tuple[str, str]]) -> list[str]:
        """Return the most probable label of each text, or its translation (`stickjax.evaluation.answers.predict`)."""
        return answers.predict(self.model, self.config, texts)

    def trees(self, texts: Sequence[str | tuple[str, str]]) -> list[Tree] | list[tuple[Tree, Tree]]:
        """Return the tree that the model induces over each text (`stickjax.evaluation.answers.induced_trees`)."""
        return answers.induced_trees(self.model, self.config, texts)

    def evaluate(self, *, lengths: Sequence[int] = LENGTHS, max_tokens: int = 2**17, max_pairs: int = 1024) -> Columns:
        """Compute the loss on held-out text, in bits per byte, with contexts of m * T tokens for every m in `lengths`.

        T is the training length. Each m must divide the largest m. The smallest m is always used. A larger m is left
        out if no document has m * T tokens. For every m, the same tokens are predicted: at most `max_tokens`, but
        always at least one piece of text. The result is {name: numpy array with a value per m}. The names are the keys
        of the records of `stickjax.evaluate.evaluate`, such as "bits_per_byte".

        For a model that reads examples, such as a classifier, this method computes the accuracy instead. The examples
        are divided into buckets, for example by the number of logical operators. At most `max_pairs` examples of each
        bucket are used, and the arrays have a value per bucket. The names are the keys of the records of
        `stickjax.evaluation.examples.accuracy`. If the model is a Universal Transformer, `data.source` is "logic" and
        `data.split` is None, they are the keys of the records of `stickjax.evaluation.pairs.accuracy`.

        Nothing is written into the run folder.
        """
        if pairs.scores_halting(self.config):
            return Columns.of(pairs.accuracy(self.model, self.config, max_pairs=max_pairs))
        if self.config.model.reads != "text":
            return Columns.of(examples.accuracy(self.model, self.config, max_examples=max_pairs))
        return Columns.of(evaluate(self.model, self.config, lengths=tuple(lengths), max_tokens=max_tokens))
