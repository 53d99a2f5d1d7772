"""Ordered Memory on ListOps: it predicts the value of a nested list of digits, such as [MAX 2 [MIN 4 7 ] ].

python -m stickjax.train configs/om_listops.py
python -m stickjax.evaluate runs/om_listops

We have not trained this config to its end yet, so no accuracy is stated here.
"""

from stickjax import Config, DataConfig, OptimConfig, TrainConfig
from stickjax.config import OrderedMemoryConfig


def get_config() -> Config:
    # There is no dropout: a sum modulo 10 needs every digit. A training with dropout 0.1 and 100,000 lists reached 77
    # percent on the shortest lists after 6000 steps. Here 500,000 different lists prevent overfitting.
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
