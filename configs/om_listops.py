"""Ordered Memory on ListOps: it predicts the value of a nested list of digits, such as [MAX 2 [MIN 4 7 ] ].

python -m stickjax.train configs/om_listops.py
python -m stickjax.evaluate runs/om_listops

The accuracy on test lists of at most 10, 20, 30, 40 and 50 tokens is 100, 99.8, 99.1, 99.5 and 99.4 percent, and 96.5
percent on lists of 51 to 100 tokens (benchmarks/results/om_listops.json). The training lists have at most 50 tokens.
Longer lists are harder: 69 percent up to 200 tokens, and 22 percent up to 400. At most 1024 lists were tested for each
of these numbers. The training took 68 minutes of one CPU core, while the machine also did other work (2026-11-30).
"""

from stickjax import Config, DataConfig, OptimConfig, TrainConfig
from stickjax.config import OrderedMemoryConfig


def get_config() -> Config:
    # This config has no dropout, because a sum modulo 10 depends on every digit. With dropout 0.1 and 100,000 lists, a
    # training of 6000 steps reached an accuracy of 77 percent on the shortest lists.
    model = OrderedMemoryConfig(
        D=64, H=64, N=16, sentences=1, hidden=False, embedding_std=1.0,
        cell_dropout=0.0, memory_dropout=0.0, input_dropout=0.0, output_dropout=0.0,
    )  # fmt: skip
    data = DataConfig(source="listops", examples=500_000, T=50, B=128, valid_every=20, curriculum=6000)
    step = data.tokens_per_step
    optim = OptimConfig(
        schedule="cosine", peak_lr=0.002, warmup_tokens=100 * step, beta2=0.98, eps=1e-9, weight_decay=0.001
    )
    return Config(model, data, optim, TrainConfig(steps=16_000, log_every=20, checkpoint_every=500))
