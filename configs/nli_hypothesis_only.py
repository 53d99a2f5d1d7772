"""Natural language inference from the second sentence alone, to measure how much it tells about the label.

In SNLI, the second sentence of a pair is the hypothesis. A classifier that reads only the hypothesis is right far more
often than a classifier that always answers the most frequent label (Tan, Shen, Huang and Courville, 2019, arXiv
1906.09635). The reason is that the people who wrote the hypotheses used some words mostly for one label.

The commands below train a model on the hypothesis alone, and print the words with the highest pointwise mutual
information with each label. They save the held-out pairs that this model gets wrong to a file, snli_hard.jsonl. Then
they train a model of both sentences, and score it on all held-out pairs and on the saved pairs.

With the files of SNLI 1.0 in the working directory:

python -m stickjax.train configs/nli_hypothesis_only.py --data.path=snli_1.0_train.jsonl \\
  --data.heldout_path=snli_1.0_test.jsonl
python -m stickjax.evaluate runs/nli_hypothesis_only --max-pairs=10000 --filtered=snli_hard.jsonl
python -m stickjax.train configs/nli_hypothesis_only.py --run runs/nli_both --data.path=snli_1.0_train.jsonl \\
  --data.heldout_path=snli_1.0_test.jsonl --model.sentences=2 --data.left_field=sentence1 --data.right_field=sentence2
python -m stickjax.evaluate runs/nli_both --max-pairs=10000
python -m stickjax.evaluate runs/nli_both --max-pairs=10000 --data.heldout_path=snli_hard.jsonl

The commands were run on generated files in which some words tell the label (tests/test_bias.py), but not on SNLI.
"""

from stickjax import Config, DataConfig, OptimConfig, TrainConfig
from stickjax.config import OrderedMemoryConfig


def get_config() -> Config:
    model = OrderedMemoryConfig(
        D=64, H=64, N=8, sentences=1, cell_dropout=0.1, memory_dropout=0.1, input_dropout=0.1, output_dropout=0.2
    )
    data = DataConfig(
        source="labelled", path="snli_1.0_train.jsonl", left_field="sentence2", label_field="gold_label",
        unlabelled="-", tokenizer="words", T=100, B=128,
    )  # fmt: skip
    step = data.tokens_per_step
    optim = OptimConfig(schedule="cosine", peak_lr=0.002, warmup_tokens=100 * step, eps=1e-9, weight_decay=0.01)
    return Config(model, data, optim, TrainConfig(steps=8000, log_every=20, checkpoint_every=500))
