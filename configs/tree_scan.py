"""Latent trees on SCAN: the model translates commands to actions. The tests are longer than all training examples.

python -m stickjax.train configs/tree_scan.py

The config uses the split "length": training has at most 22 actions per command, and the tests have more. We have not
trained this config. The sizes, the dropout rates and the optimizer come from the original code (arXiv 2010.04704). The
learning rate differs: the original code halves it when the validation accuracy stops rising. Here it follows a cosine
over 6000 steps, which are about 39 epochs.
"""

from stickjax import Config, DataConfig, OptimConfig, TrainConfig
from stickjax.config import TreeConfig


def get_config() -> Config:
    model = TreeConfig(H=128, N=5, depth=7)
    data = DataConfig(source="scan", split="length", valid_every=10, T=24, B=100)
    optim = OptimConfig(
        schedule="cosine", peak_lr=6e-4, warmup_tokens=200 * data.tokens_per_step, beta1=0.0, beta2=0.999, eps=1e-9,
        weight_decay=0.0, clip=1.0,
    )  # fmt: skip
    return Config(model, data, optim, TrainConfig(steps=6000, log_every=20, checkpoint_every=500))
